"""Reads off a transformers model's modules what its layers compute, for the kernels to run.

Two shapes are known: encoders of BERT's kind (norms after the residual sums, biases, a two-matrix network) and decoders of
Llama's kind (root-mean-square norms first, rotary positions, shared key and value heads, a gated network). Nothing is read
from names of models or classes; a structure that is not recognised gives None, and :func:`fuse` compares the result with
the model's own code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openembed.backbones.fused import FusedLayers, LayerPlan, Plan, Precision, Weights, used_weights
from openembed.backbones.prepacked import MAX_WEIGHT_BYTES, LinearGelu, release_copies, use_int8
from openembed.backbones.text import TextBackbone, inference
from openembed.kernels.calls import Heads, Norm
from openembed.kernels.library import library, missing
from openembed.packing import Packed, TokenRows, pack

logger = logging.getLogger(__name__)

TOLERANCE = {"exact": 1e-4, "int8": 0.15}
"""Largest accepted difference to the model's own code, relative to the states' scale: root mean square."""

KNOWN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def use_kernels(backbone: TextBackbone, precision: Precision) -> None:
    """Makes ``backbone`` encode by our kernels where its structure is known; ``int8`` holds for any other model too.

    There, linear layers multiply 8-bit codes inside the model's own code.
    """
    if precision == "int8":
        use_int8(backbone.model)  # first, for it replaces modules
        use_int8(backbone.model, False)
    backbone.fused, backbone.precision = fuse(backbone, precision), precision
    if backbone.fused is not None:
        release_copies(backbone.model)  # loading has run the model's own code, which will not run again
    if precision == "int8":
        use_int8(backbone.model)
        if library() is None:
            logger.warning("int8 without our kernels (%s): slower", missing())


def leave_int8(backbone: TextBackbone) -> None:
    """Makes ``backbone`` exact again, by the model's own code."""
    backbone.fused, backbone.precision = None, "exact"
    use_int8(backbone.model, False)


def fuse(backbone: TextBackbone, precision: Precision) -> FusedLayers | None:
    """Returns what runs ``backbone`` by the kernels, or None where there are none or its structure is not known.

    Exact float32 keeps a second copy of the weights, so it is left to models below ``MAX_WEIGHT_BYTES``.
    """
    if library() is None or not backbone.packable:
        return None
    plan = read(backbone)  # before anything is packed: a large model's weights would not fit twice
    if plan is None or (precision == "exact" and not _small_float32(plan)):
        return None
    fused = FusedLayers(backbone.model, lambda: read(backbone), precision)
    try:
        difference = _difference(backbone, fused, plan.window)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.info("%s: not run by our kernels: %s", type(backbone.model).__name__, error)
        return None
    if difference <= TOLERANCE[precision]:
        return fused
    logger.info("%s: not run by our kernels, which differ by %.1e", type(backbone.model).__name__, difference)
    return None


def _small_float32(plan: Plan) -> bool:
    weights = used_weights(plan)
    return all(w.dtype == torch.float32 for w in weights) and sum(w.nbytes for w in weights) <= MAX_WEIGHT_BYTES


def read(backbone: TextBackbone) -> Plan | None:
    """Returns the plan of a backbone whose structure is known, else None."""
    model = backbone.model
    if any(p.device.type != "cpu" or not p.is_floating_point() for p in model.parameters()):
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None  # they would not be called
    try:
        return _read_decoder(model) if hasattr(model, "layers") else _read_encoder(model, backbone.position_offset)
    except (AttributeError, TypeError, LookupError):
        return None


# ---- encoders of BERT's kind


def _read_encoder(model: Any, position_offset: int) -> Plan | None:
    layers = tuple(_encoder_layer(layer) for layer in model.encoder.layer)
    if getattr(model, "embeddings_project", None) is not None or model.config.is_decoder:
        return None

    def embed(packed: Packed) -> tuple[Tensor, None]:
        ids, positions = packed.ids_T[None], packed.positions_T[None] + position_offset
        states = model.embeddings(input_ids=ids, position_ids=positions, token_type_ids=torch.zeros_like(ids))
        return states[0].float().contiguous(), None

    return Plan(layers, True, _layer_norm(model.embeddings.LayerNorm), embed, None)


def _encoder_layer(layer: Any) -> LayerPlan:
    _only(layer, {"attention", "intermediate", "output"})
    _only(layer.attention, {"self", "output"})
    _only(layer.attention.self, {"query", "key", "value", "dropout"})
    _only(layer.attention.output, {"dense", "LayerNorm", "dropout"})
    _only(layer.output, {"dense", "LayerNorm", "dropout"})
    attention, heads = layer.attention.self, layer.attention.self.num_attention_heads
    width = attention.query.out_features // heads
    inner = layer.intermediate
    activation = F.gelu if isinstance(inner, LinearGelu) else inner.intermediate_act_fn
    return LayerPlan(
        heads=_checked(Heads(heads, heads, width, width**-0.5)),
        qkv=Weights((_linear(attention.query), _linear(attention.key), _linear(attention.value))),
        out=Weights((_linear(layer.attention.output.dense),)),
        up=Weights((_linear(inner.dense),)),
        down=Weights((_linear(layer.output.dense),)),
        activation=_activation(activation),
        gated=False,
        norms=(_layer_norm(layer.attention.output.LayerNorm), _layer_norm(layer.output.LayerNorm)),
    )


# ---- decoders of Llama's kind


def _read_decoder(model: Any) -> Plan | None:
    _only(model, {"embed_tokens", "layers", "norm", "rotary_emb"})
    firsts = [_rms_norm(layer.input_layernorm) for layer in model.layers] + [_rms_norm(model.norm)]
    layers = tuple(_decoder_layer(layer, after) for layer, after in zip(model.layers, firsts[1:], strict=True))
    windows = {getattr(layer.self_attn, "sliding_window", None) for layer in model.layers} - {None}
    windows |= {getattr(model.config, "sliding_window", None)} - {None}
    multiplier = float(getattr(model, "embedding_multiplier", 1.0))

    def embed(packed: Packed) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        states_TD = (model.embed_tokens(packed.ids_T) * multiplier).float()
        cosine, sine = model.rotary_emb(states_TD[None], packed.positions_T[None])
        return states_TD.contiguous(), (cosine[0].float().contiguous(), sine[0].float().contiguous())

    return Plan(layers, False, firsts[0], embed, min(windows, default=None))


def _decoder_layer(layer: Any, after: Norm) -> LayerPlan:
    _only(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    _only(layer.mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    attention = layer.self_attn
    _only(attention, {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
    width = attention.head_dim
    norms = [_rms_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
    if any(norm is not None and len(norm.gain_D) != width for norm in norms):
        raise LookupError("norms over all heads together")
    residual = float(getattr(layer, "residual_multiplier", 1.0))
    heads = Heads(
        attention.q_proj.out_features // width,
        attention.k_proj.out_features // width,
        width,
        float(attention.scaling),
        *(None if norm is None else norm.gain_D for norm in norms),
        epsilon=next((norm.epsilon for norm in norms if norm is not None), 0.0),
    )
    if attention.v_proj.out_features != attention.k_proj.out_features or attention.q_proj.out_features % width:
        raise LookupError("heads of several widths")
    return LayerPlan(
        heads=_checked(heads),
        qkv=Weights((_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj))),
        out=Weights((_linear(attention.o_proj),), residual),
        up=Weights((_linear(layer.mlp.gate_proj), _linear(layer.mlp.up_proj))),
        down=Weights((_linear(layer.mlp.down_proj),), residual),
        activation=_activation(layer.mlp.act_fn),
        gated=True,
        norms=(_rms_norm(layer.post_attention_layernorm), after),
    )


# ---- parts


def _only(module: nn.Module, known: set[str]) -> None:
    """Refuses a module that holds more than is known: what it does with it is not known either."""
    extra = {name for name, _ in module.named_children()} - known
    extra |= {name for name, _ in module.named_parameters(recurse=False)}
    if extra:
        raise LookupError(f"unknown parts {sorted(extra)}")


def _linear(module: Any) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise TypeError(type(module).__name__)  # an adapter, or weights in 4 bits
    return module


def _checked(heads: Heads) -> Heads:
    if heads.width % 16 or heads.heads % heads.groups:
        raise LookupError(f"heads of width {heads.width}")
    return heads


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(_float(module.weight), None if module.bias is None else _float(module.bias), module.eps, centred=True)


def _rms_norm(module: Any) -> Norm:
    """A root-mean-square norm; what it multiplies by is seen by giving it ones."""
    epsilon = float(getattr(module, "variance_epsilon", None) or module.eps)
    with torch.no_grad():
        ones = torch.ones(1, module.weight.shape[0], dtype=module.weight.dtype)
        gain_D = module(ones)[0].float() * (1 + epsilon) ** 0.5
    return Norm(gain_D.contiguous(), None, epsilon, centred=False)


def _float(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()


def _activation(function: Callable[[Tensor], Tensor]) -> str:
    """The name of an activation, known by its values."""
    x = torch.linspace(-6, 6, 241)
    with torch.no_grad():
        for name, known in KNOWN_ACTIVATIONS.items():
            if torch.allclose(function(x), known(x), atol=1e-6, rtol=0):
                return name
    raise LookupError("an activation that is not known")


# ---- proof


def _difference(backbone: TextBackbone, fused: FusedLayers, window: int | None) -> float:
    """Root-mean-square difference of a few random texts' states, relative to their scale; no text beyond the window."""
    rng = np.random.default_rng(0)
    lengths = [n if window is None else min(n, window) for n in (7, 40, 23, 16)]
    texts = [rng.integers(0, backbone.vocabulary, size=n).astype(np.int32) for n in lengths]
    packed = pack(TokenRows(texts, np.zeros(len(texts), dtype=np.int32)))
    with inference(backbone), torch.inference_mode():
        own_TD = backbone.own_forward(packed).float()
        difference = (fused(packed, bidirectional=backbone.bidirectional) - own_TD).square().mean().sqrt()
    scale = own_TD.square().mean().sqrt().clamp_min(1e-12)
    found = float(difference / scale)
    return found if np.isfinite(found) else float("inf")
