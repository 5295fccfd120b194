"""A transformers model as a backbone: packed token ids in, one hidden state a token out.

Shapes: ``T`` tokens of all texts of a micro-batch, ``D`` hidden width.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from openembed.backbones.attention import ATTENTION_NAME, install_attention
from openembed.backbones.fused import FusedLayers, Precision
from openembed.config import Config
from openembed.packing import Packed

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
"""What transformers calls a learned table of positions."""


class BackboneConfig(Config):
    """Which network, and what its tokens may see.

    ``path``: a folder or hub id with pretrained weights; or ``architecture``: a transformers configuration (with
    ``model_type``) to start from random weights. ``attention``: ``bidirectional`` removes the causal mask (NV-Embed,
    section 3.1), ``causal`` keeps it, ``model`` follows the checkpoint. ``sliding_window``: ``off`` lets every token see
    the whole text even where the checkpoint restricts it (as NV-Embed's released code does). ``quantization``: ``nf4``
    holds the linear layers in 4 bits (QLoRA, arXiv 2305.14314: double quantisation, products in bfloat16), to train
    adapters on a small GPU; what is saved is whole again.
    """

    path: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None
    attention: Literal["bidirectional", "causal", "model"] = "bidirectional"
    sliding_window: Literal["model", "off"] = "model"
    quantization: Literal["nf4"] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> BackboneConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either path (pretrained weights) or architecture (random weights)")
        if self.quantization is not None and self.path is None:
            raise ValueError("quantization needs pretrained weights (path); random ones are not worth keeping in 4 bits")
        return self


class TextBackbone(nn.Module):
    """Runs a transformers base model over packed texts; texts never see one another.

    A family whose code does not go through transformers' attention registry (MPNet, DeBERTa, ALiBi models) is run in
    groups of texts of equal length instead: also without padding and exact, only slower (``packable`` is False then).
    """

    def __init__(self, model: nn.Module, *, bidirectional: bool) -> None:
        super().__init__()
        self.model = model
        self.bidirectional = bidirectional
        self.packable = True
        self.fused: FusedLayers | None = None
        self.precision: Precision = "exact"
        self._open_masks = False
        parameters = inspect.signature(model.forward).parameters
        self._takes_cache = "use_cache" in parameters
        self._takes_positions = "position_ids" in parameters
        self.position_offset = _position_offset(model)

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.model.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.model.config.vocab_size)

    @property
    def opens_masks(self) -> bool:
        """Whether the family's code ignores ``config.is_causal``, so that it looks both ways only under masks of ours."""
        return self._open_masks

    @cached_property
    def max_positions(self) -> int | None:
        """Tokens a text may have where positions are a learned table; None where they are computed (rotary and the like)."""
        tables = [
            module.num_embeddings - max(self.position_offset, getattr(module, "offset", 0))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES
        ]
        return min(tables, default=None)

    def forward(self, packed: Packed) -> Tensor:
        """Returns the last hidden state of every token, ``(T, D)``."""
        if self.fused is None or self.training or torch.is_grad_enabled():
            if self.fused is not None and torch.is_grad_enabled():
                self.fused.forget()  # training changes it at every step
            return self.own_forward(packed)
        if packed.layout.attended_B is not None:  # expanded queries, too short to be worth a kernel
            return self.own_forward(packed)
        states_TD = self.fused(packed, bidirectional=self.bidirectional)
        return self.own_forward(packed) if states_TD is None else states_TD

    def train(self, mode: bool = True) -> TextBackbone:
        """Sets the mode, as torch does; weights may have changed in between."""
        if self.fused is not None and mode != self.training:
            self.fused.forget()
        return super().train(mode)

    def own_forward(self, packed: Packed) -> Tensor:
        """What :meth:`forward` returns, by the model's own code."""
        return self._forward_packed(packed) if self.packable else self._forward_equal_lengths(packed)

    def stop_packing(self, *, open_masks: bool) -> None:
        """Runs groups of texts of equal length through the family's own attention from now on.

        ``open_masks`` hands decoders an explicit mask that hides nothing, for those that ignore ``config.is_causal``.
        """
        self.packable, self._open_masks = False, open_masks
        if self.model.config._attn_implementation == ATTENTION_NAME:
            self.model.config._attn_implementation = "sdpa" if getattr(self.model, "_supports_sdpa", False) else "eager"

    def _forward_packed(self, packed: Packed) -> Tensor:
        if not self._takes_positions:
            raise RuntimeError(f"{type(self.model).__name__} takes no position_ids")
        output = self.model(
            input_ids=packed.ids_T.unsqueeze(0),
            position_ids=packed.positions_T.unsqueeze(0) + self.position_offset,
            layout=packed.layout,
            bidirectional=self.bidirectional,
            **({"use_cache": False} if self._takes_cache else {}),
        )
        return output.last_hidden_state[0]

    def _forward_equal_lengths(self, packed: Packed) -> Tensor:
        pieces, first = [], 0
        for run in packed.layout.runs:
            ids = packed.ids_T[run.start : run.stop].view(run.count, run.length)
            mask = self._mask(packed, run.length, slice(first, first + run.count))
            first += run.count
            options = {"use_cache": False} if self._takes_cache else {}
            hidden = self.model(input_ids=ids, attention_mask=mask, **options).last_hidden_state
            pieces.append(hidden.reshape(run.count * run.length, -1))
        return torch.cat(pieces)

    def _mask(self, packed: Packed, length: int, texts: slice) -> Tensor | None:
        """Texts' mask for the model's own code: an additive one that decoders take as given instead of a causal one of theirs,
        else one a token; None where nothing is hidden and nothing needs opening."""
        attended_B = packed.layout.attended_B
        seen = None
        if attended_B is not None:
            seen = torch.arange(length, device=packed.ids_T.device) < attended_B[texts, None]
        if not self._open_masks:
            return None if seen is None else seen.long()
        parameter, count = next(self.model.parameters()), len(packed.pool_starts_B[texts])
        mask = torch.zeros(count, 1, length, length, dtype=parameter.dtype, device=parameter.device)
        return mask if seen is None else mask.masked_fill(~seen[:, None, None], torch.finfo(mask.dtype).min)


def load_text_backbone(config: BackboneConfig, *, dtype: torch.dtype | None = None, seed: int = 0) -> TextBackbone:
    """Returns the backbone of ``config``: pretrained weights from a folder or the hub, or random ones from ``seed``.

    Raises ``ValueError`` for an unknown architecture, ``OSError``-derived errors of the hub are rewritten to say what was
    looked for. ``dtype`` None keeps float32.
    """
    from transformers import AutoConfig, AutoModel

    name = install_attention()
    dtype = dtype or torch.float32
    if config.architecture is not None:
        fields = dict(config.architecture)
        kind = fields.pop("model_type", None)
        if kind is None:
            raise ValueError("backbone.architecture needs model_type, for example model_type = 'mistral'")
        try:
            settings = AutoConfig.for_model(kind, **fields)
        except ValueError:
            raise ValueError(f"backbone.architecture: transformers knows no model_type {kind!r}") from None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _with_registry(lambda impl: AutoModel.from_config(settings, attn_implementation=impl, dtype=dtype), name)
    else:
        model = _with_registry(lambda impl: _pretrained(config, impl, dtype), name)
    return wrap(model, config)


def wrap(model: nn.Module, config: BackboneConfig) -> TextBackbone:
    """Returns ``model`` as a backbone with the mask that ``config`` asks for, recorded in the model's own config too."""
    causal = {"bidirectional": False, "causal": True, "model": is_decoder(model)}[config.attention]
    if config.attention == "bidirectional":
        model.config.is_causal = False
    if config.sliding_window == "off":
        open_sliding_window(model)
    return TextBackbone(model, bidirectional=not causal)


def open_sliding_window(model: nn.Module) -> None:
    """Removes a sliding window from the model's configuration and layers."""
    for owner in (model.config, *model.modules()):
        if getattr(owner, "sliding_window", None) is not None:
            owner.sliding_window = None


def is_decoder(model: nn.Module) -> bool:
    """True when the checkpoint's own attention is causal: its layers say so and its configuration does not object."""
    return getattr(model.config, "is_causal", None) is not False and has_causal_layers(model)


def has_causal_layers(model: nn.Module) -> bool:
    """True for a decoder's code, whatever its configuration says."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def _with_registry(load: Any, name: str) -> nn.Module:
    """Loads with our attention; a family that accepts no registered attention is loaded with its own."""
    try:
        return load(name)
    except (ValueError, KeyError) as error:
        if name not in str(error):
            raise
        logger.warning("%s; its own attention is used, in groups of texts of equal length", error)
        return load(None)


def _pretrained(config: BackboneConfig, implementation: str | None, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModel

    options: dict[str, Any] = {"attn_implementation": implementation, "dtype": dtype, "trust_remote_code": False}
    if config.revision is not None:
        options["revision"] = config.revision
    if config.quantization is not None:
        options |= {"quantization_config": _four_bits(), "dtype": torch.bfloat16}
    with quiet_unless_terminal(), _without_reports():
        model, report = AutoModel.from_pretrained(config.path, output_loading_info=True, **options)
    if any(name.startswith("pooler.") for name in report["missing_keys"]):
        model.pooler = None  # it would be random, and no head reads it
    absent = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if absent or report.get("mismatched_keys"):
        raise ValueError(
            f"{config.path}: the weights are incomplete; missing {absent[:5] or 'none'}, "
            f"misshapen {list(report.get('mismatched_keys') or [])[:5] or 'none'}. Download the model again."
        )
    return model


def _four_bits() -> Any:
    """The settings of QLoRA; ``ValueError`` where bitsandbytes is missing or cannot run."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"quantization = 'nf4' needs bitsandbytes ({error}); pip install bitsandbytes, or leave quantization out"
        ) from None
    if not torch.cuda.is_available() and "cpu" not in getattr(bitsandbytes, "supported_torch_devices", ()):
        raise ValueError("quantization = 'nf4': this bitsandbytes needs a GPU and there is none; leave quantization out")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Puts ``module`` in inference mode and afterwards every part of it back in its own mode."""
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keeps transformers from listing weights it did not use, as a language model's head; missing ones are an error here."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Keeps transformers' progress bars away from standard error where that is no terminal."""
    from transformers.utils import logging as transformers_logging

    silence = not sys.stderr.isatty() and transformers_logging.is_progress_bar_enabled()
    if silence:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            transformers_logging.enable_progress_bar()


def _position_offset(model: nn.Module) -> int:
    """The position number of the first token: RoBERTa's family counts from ``padding_idx + 1``."""
    embeddings = getattr(model, "embeddings", None)
    if embeddings is not None and hasattr(embeddings, "create_position_ids_from_input_ids"):
        return int(embeddings.padding_idx) + 1
    return 0
