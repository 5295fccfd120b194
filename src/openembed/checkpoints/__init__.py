"""Opening models: NV-Embed layouts, sentence-transformers, plain transformers models with a head, and our own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openembed.backbones.prepacked import prepack
from openembed.backbones.probe import check
from openembed.backbones.structure import use_kernels
from openembed.backbones.text import load_text_backbone
from openembed.checkpoints.multi_vector import COLBERT_METADATA, is_multi_vector, load_multi_vector
from openembed.checkpoints.native import load_native
from openembed.checkpoints.nv_embed import load_nv_embed
from openembed.checkpoints.sentence_transformers import load_sentence_transformers
from openembed.checkpoints.sparse import IDF_NAME, is_sparse, load_sparse, open_search_head, splade_fields, take_weights
from openembed.checkpoints.weights import check_folder
from openembed.config import parse
from openembed.encoder import Encoder, EncoderConfig
from openembed.files import read_json
from openembed.forks import one_thread_in_forks
from openembed.layouts import CONFIG_NAME
from openembed.packaged import packaged
from openembed.tokenization import TextTokenizer

logger = logging.getLogger(__name__)

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*_Dense/pytorch_model.bin", COLBERT_METADATA]
HUB_OTHERS = ["onnx/*", "openvino/*", "original/*"]
"""What is downloaded of a hub repository (``*`` matches across folders), and copies for other engines that are not."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

INT8_REFUSED = "dtype 'int8' runs on CPUs, without quantization; on a GPU use bfloat16 or float16"


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    head: Mapping[str, Any] | None = None,
    head_dtype: torch.dtype | None = None,
    revision: str | None = None,
    quantization: str | None = None,
) -> Encoder:
    """Returns the encoder stored in a folder, on the hub or in the package (``openembed-nano``), ready to encode.

    What ``encode_queries`` and ``encode_documents`` return is told by its ``kind``. ``dense``: ``np.ndarray`` float32 (N, D),
    compared by inner product. ``sparse``: ``scipy.sparse.csr_matrix`` float32 (N, V), weights of 0 or more over the
    vocabulary, by inner product too. ``tokens``: ``openembed.token_vectors.TokenVectors``, a matrix a text, by MaxSim.
    ``openembed.index.exact.prepared`` searches any of them.

    Opens NV-Embed v1/v2 layouts, sentence-transformers checkpoints with one vector a text or one a token, those of PyLate and
    ColBERT, what :meth:`Encoder.save` wrote, and with ``head`` (for example ``{"kind": "mean"}``) any plain transformers
    model. No remote code is run. ``device`` defaults to a GPU where there is one; ``dtype`` (``float32``, ``bfloat16``,
    ``float16``) to float32 on a CPU, bfloat16 on a GPU.
    ``int8``, on CPUs: weights stay float32, the backbone's products are of 8-bit codes, without calibration data.
    ``head_dtype`` is that of the stored head and projections, where it should differ (training adapts them in float32).
    ``revision``: commit, tag or branch of a hub model. ``quantization``: ``nf4`` holds the backbone of a folder that
    :meth:`Encoder.save` wrote in 4 bits, to train adapters on it. Before it is returned the model is probed, where and as
    it will run: it must see what it should and not mix neighbouring texts.

    Raises ``ValueError`` for a layout that is not known, damaged weights, a failed probe, or a ``head`` for a model that
    has its own; ``FileNotFoundError`` for a model that is nowhere.
    """
    int8, dtype = dtype == "int8", None if dtype == "int8" else dtype
    chosen_device = usable_device(device or ("cuda" if torch.cuda.is_available() and not int8 else "cpu"))
    if int8 and (chosen_device.type != "cpu" or quantization is not None):
        raise ValueError(INT8_REFUSED)
    folder = resolve(path_or_hub_id, revision)
    check_folder(folder)
    if quantization is None:
        encoder = _open(folder, _dtype(dtype, chosen_device), head, head_dtype)
    elif (folder / CONFIG_NAME).is_file():
        encoder = load_native(folder, torch.bfloat16, head_dtype, quantization)
    else:
        raise ValueError(f"{folder}: quantization {quantization!r} needs a folder with {CONFIG_NAME}; save the model first")
    return _ready(encoder, chosen_device, int8=int8)


def in_int8(encoder: Encoder) -> Encoder:
    """Returns ``encoder``, from now on computed in int8, as :func:`load` has it; ``ValueError`` for one on a GPU."""
    if encoder.device.type != "cpu":
        raise ValueError(INT8_REFUSED)
    use_kernels(encoder.backbone, "int8")
    return encoder


def build(config: EncoderConfig, seed: int = 0, *, dtype: str | torch.dtype | None = None) -> Encoder:
    """Returns a new encoder: pretrained or random backbone (``seed``) and a freshly initialised head.

    A vocabulary head of the form that the pretrained language model has takes that one's weights.
    """
    encoder, _ = _built(config, seed, dtype)
    return encoder


def _built(config: EncoderConfig, seed: int, dtype: str | torch.dtype | None) -> tuple[Encoder, bool]:
    """A new encoder, and whether its head is pretrained."""
    backbone_config = config.backbone
    if backbone_config.path is not None:
        folder = resolve(backbone_config.path, backbone_config.revision)
        check_folder(folder)
        backbone_config = backbone_config.model_copy(update={"path": str(folder), "revision": None})
    backbone = load_text_backbone(backbone_config, dtype=_dtype(dtype, torch.device("cpu")), seed=seed)
    tokenizer_path = config.tokenizer_path or backbone_config.path
    if tokenizer_path is None:
        raise ValueError("tokenizer_path: a random backbone needs a tokenizer; give a folder that holds tokenizer.json")
    tokenizer = read_tokenizer(resolve(tokenizer_path), config.tokenizer)
    if tokenizer.vocabulary > backbone.vocabulary:
        raise ValueError(f"the tokenizer has {tokenizer.vocabulary} ids but the backbone's vocab_size is {backbone.vocabulary}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        encoder = Encoder(config, tokenizer, backbone, config.head.build(backbone.width))
    pretrained = encoder.kind == "sparse" and backbone_config.path is not None
    pretrained = pretrained and take_weights(encoder, Path(backbone_config.path))
    return _ready(encoder, torch.device("cpu")), pretrained


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Returns the local folder of a model: in the package (``openembed-nano``), a folder, or downloaded from the hub.

    Raises ``FileNotFoundError`` saying both places that were looked at.
    """
    name = str(path_or_hub_id)
    path = packaged(name) or Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or path.exists():
        raise FileNotFoundError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_OTHERS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name}: no such folder, and not to be had from the hub ({reason}). Check the name, the connection or your login."
        ) from None


def known_device(name: str | torch.device) -> torch.device:
    """Returns the device of a name, here or not; ``ValueError`` for one that torch does not know."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {str(name)!r} is not known; use cpu, cuda, cuda:1, ...") from None


def usable_device(name: str | torch.device) -> torch.device:
    """Returns the device of a name; ``ValueError`` for one that torch does not know or that is not in this machine."""
    device = known_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(name)!r} is not to be had: torch sees {torch.cuda.device_count()} GPUs; use cpu")
    return device


def read_tokenizer(folder: Path, config: Any) -> TextTokenizer:
    """Returns the tokenizer of a folder: ``tokenizer.json`` as it is, else what transformers makes of its older files."""
    if (folder / "tokenizer.json").is_file():
        return TextTokenizer.from_folder(folder, config)
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: holds no tokenizer that can be read ({str(error).splitlines()[0]})") from None
    return TextTokenizer(made.backend_tokenizer, config)


def _ready(encoder: Encoder, device: torch.device, *, int8: bool = False) -> Encoder:
    """The encoder on its device, in inference mode, probed, and run by our kernels where they serve."""
    one_thread_in_forks()
    if device.type == "cpu":
        prepack(encoder)
    encoder = encoder.to(device).eval()
    check(encoder.backbone)
    if device.type == "cpu":
        use_kernels(encoder.backbone, "int8" if int8 else "exact")
    return encoder


def _open(folder: Path, dtype: torch.dtype | None, head: Mapping[str, Any] | None, head_dtype: torch.dtype | None) -> Encoder:
    own = (folder / CONFIG_NAME).is_file()
    published = not own and _model_type(folder) == "nvembed"
    tokens = not own and is_multi_vector(folder)
    if head is not None and (own or published or tokens):
        raise ValueError(f"{folder}: this model has its own head; leave head (--head) out")
    if own:
        return load_native(folder, dtype, head_dtype)
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ValueError(f"{folder}: no model here (neither {CONFIG_NAME}, config.json nor modules.json)")
    if published:
        return load_nv_embed(folder, dtype, head_dtype)
    if tokens:
        return load_multi_vector(folder, dtype, head_dtype)
    if head is not None:
        return _with_head(folder, dtype, head)
    if (folder / "modules.json").is_file() and is_sparse(folder):
        return load_sparse(folder, dtype, head_dtype)
    if (folder / "modules.json").is_file():
        return load_sentence_transformers(folder, dtype, head_dtype)
    if (folder / IDF_NAME).is_file():
        return _with_head(folder, dtype, open_search_head(folder))
    raise ValueError(
        f"{folder}: a plain transformers model has no head, so its vectors are undefined. Say which: "
        "openembed.load(path, head={'kind': 'mean'}), or --head mean (also last_token, cls, weighted_mean, splade)."
    )


def _model_type(folder: Path) -> str | None:
    """``model_type`` of ``config.json``, None where there is no such file."""
    path = folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings.get("model_type")


def _with_head(folder: Path, dtype: torch.dtype | None, head: Mapping[str, Any]) -> Encoder:
    fields = {"backbone": {"path": str(folder), "attention": "model"}, "head": dict(head)}
    vocabulary = splade_fields(folder, head) if head.get("kind") == "splade" else {}
    config = parse(EncoderConfig, {**fields, **vocabulary}, "head")
    encoder, pretrained = _built(config, 0, dtype)
    if list(encoder.head.parameters()) and not pretrained:
        logger.warning("the %s head is newly initialised: train it before use", config.head.kind)
    return encoder


def _dtype(given: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if given is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = DTYPES.get(given) if isinstance(given, str) else given
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {given!r} is not supported; use {', '.join(DTYPES)}, or int8 on a CPU")
    return dtype
