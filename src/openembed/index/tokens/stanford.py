"""Indexes of other tools: directories of ColBERT (and PyLate's copy of it) and of fast-plaid, read and written.

Both hold what a coded segment of ours holds, by document: centroids, buckets, and in chunks the centroid, residual and number
of each document's tokens; ColBERT as ``.pt`` files, fast-plaid as ``.npy``. A component's bucket has its lowest bit first, and
eight such bits make a byte, highest first. Vectors are not among it: what is read has residuals alone.

T tokens, K centroids, N documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openembed.checkpoints.folder import whole_folder
from openembed.files import read_json, write_json
from openembed.index.strings import load_array, save_array
from openembed.index.tokens.codec import Codec, Residuals, arranged, write_residuals
from openembed.index.tokens.files import TokenInfo

Layout = Literal["colbert", "fast-plaid"]
CHUNK = 25_000
"""Documents of a chunk."""


def read_plaid(directory: str | Path) -> Residuals:
    """Returns the coded tokens of an index that ColBERT, PyLate or fast-plaid made.

    Raises ``ValueError`` naming the file that is missing or does not fit, and for bits other than 2 and 4.
    """
    directory = Path(directory)
    metadata = _json(directory / "metadata.json")
    chunks, bits = metadata.get("num_chunks"), metadata.get("nbits", metadata.get("config", {}).get("nbits"))
    if not isinstance(chunks, int) or bits not in (2, 4):
        raise ValueError(
            f"{directory / 'metadata.json'}: {bits!r} bits in {chunks!r} chunks; indexes of 2 or 4 bits can be read"
        )
    load = _load_npy if (directory / "centroids.npy").exists() else _load_pt
    centroids_KD = np.ascontiguousarray(load(directory, "centroids"), dtype=np.float32)
    cutoffs, weights = (np.asarray(values, dtype=np.float32) for values in _buckets(directory, load))
    codec = Codec(centroids_KD, cutoffs, weights, unit=True)
    codes, packed, lengths = [], [], [np.empty(0, np.int64)]
    for chunk in range(chunks):
        codes.append(np.asarray(load(directory, f"{chunk}.codes"), dtype=np.int32))
        packed.append(_ours(codec, np.asarray(load(directory, f"{chunk}.residuals")), directory / f"{chunk}.residuals"))
        lengths.append(np.asarray(_json(directory / f"doclens.{chunk}.json"), dtype=np.int64))
        if not len(codes[-1]) == len(packed[-1]) == lengths[-1].sum():
            raise ValueError(f"{directory}: codes, residuals and lengths of chunk {chunk} differ in number; it is damaged")
        if len(codes[-1]) and not 0 <= codes[-1].min() <= codes[-1].max() < len(centroids_KD):
            raise ValueError(f"{directory / f'{chunk}.codes'}: a centroid is not below {len(centroids_KD)}; it is damaged")
    if not codes:
        raise ValueError(f"{directory}: no documents")
    offsets_N1 = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return arranged(codec, offsets_N1, np.concatenate(codes), np.concatenate(packed))


def write_plaid(directory: str | Path, residuals: Residuals, layout: Layout = "fast-plaid") -> None:
    """Writes coded tokens as an index of ``layout`` into a new folder, whole or not at all; documents keep their order.

    Raises ``FileExistsError`` where the folder has files, and ``ValueError`` for no residuals, tokens that are not of length
    1, and a width that its format has no place for.
    """
    if residuals is None:
        raise ValueError("this segment has no residuals; write it with TokenSettings(coded_from=1) to have them")
    directory, codec = Path(directory), residuals.codec
    if not codec.unit:
        raise ValueError(f"{layout} brings every token to length 1, and these have other lengths: it would rank otherwise")
    if codec.width * codec.bits % 8 or layout not in ("colbert", "fast-plaid"):
        raise ValueError(f"{codec.width} components of {codec.bits} bits as {layout!r}; whole bytes, as colbert or fast-plaid")
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory}: not empty; write an index into a new folder")
    with whole_folder(directory.absolute()) as folder:
        _write_index(folder, residuals, layout)


def _write_index(directory: Path, residuals: Residuals, layout: Layout) -> None:
    codec, save = residuals.codec, _save_npy if layout == "fast-plaid" else _save_pt
    half = np.float16 if layout == "fast-plaid" else np.float32
    save(directory, "centroids", codec.centroids_KD.astype(half))
    save(directory, "avg_residual", np.full(codec.width, np.abs(codec.weights).mean(), dtype=half))
    _save_buckets(directory, save, codec)
    count, lengths_N = len(residuals), np.diff(residuals.offsets_N1)
    chunks = max(1, -(-count // CHUNK))
    for chunk in range(chunks):
        first, last = chunk * CHUNK, min((chunk + 1) * CHUNK, count)
        low, high = residuals.offsets_N1[first], residuals.offsets_N1[last]
        save(directory, f"{chunk}.codes", residuals.codes_T[low:high].astype(np.int64 if save is _save_npy else np.int32))
        save(directory, f"{chunk}.residuals", _theirs(codec, residuals.packed_TB[residuals.places_T[low:high]]))
        (directory / f"doclens.{chunk}.json").write_text(json.dumps(lengths_N[first:last].tolist()))
        about = {"passage_offset": first, "num_passages": last - first, "num_documents": last - first}
        about |= {"num_embeddings": int(high - low), "embedding_offset": int(low)}
        write_json(directory / f"{chunk}.metadata.json", about)
    _save_lists(directory, save, residuals)
    about = {"num_chunks": chunks, "nbits": codec.bits, "num_partitions": len(codec.centroids_KD), "num_documents": count}
    about |= {"num_embeddings": int(residuals.offsets_N1[-1]), "avg_doclen": float(lengths_N.mean()) if count else 0.0}
    config = {"nbits": codec.bits, "dim": codec.width}
    write_json(directory / "plan.json", {**about, "config": config, "num_embeddings_est": about["num_embeddings"]})
    write_json(directory / "metadata.json", about | {"config": config})


def write_segment(directory: str | Path, residuals: Residuals) -> TokenInfo:
    """Writes coded tokens as a segment that ``files.TokenSegment`` opens, into a folder, which is made where there is none."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_array(directory / "tokens.offsets.npy", residuals.offsets_N1)
    write_residuals(directory, residuals)
    codec, tokens = residuals.codec, int(residuals.offsets_N1[-1])
    sizes = {"width": codec.width, "count": len(residuals), "tokens": tokens}
    info = TokenInfo(**sizes, precision="float16", vectors=False, bits=codec.bits, unit=codec.unit)
    write_json(directory / "tokens.json", info.model_dump(exclude_none=True))
    return info


def _buckets_of(codec: Codec, packed_TB: np.ndarray) -> np.ndarray:
    """Returns uint8 (T, D): the bucket of each component."""
    shifts = np.arange(0, 8, codec.bits, dtype=np.uint8)
    buckets = (packed_TB[:, None, :] >> shifts[:, None]) & np.uint8(2**codec.bits - 1)
    return buckets.reshape(len(packed_TB), codec.padded)[:, : codec.width]


def _theirs(codec: Codec, packed_TB: np.ndarray) -> np.ndarray:
    """Returns our rows of buckets as they pack them."""
    bits = _buckets_of(codec, packed_TB)[:, :, None] >> np.arange(codec.bits, dtype=np.uint8) & 1
    return np.packbits(bits.reshape(len(packed_TB), codec.width * codec.bits), axis=1)


def _ours(codec: Codec, theirs_TB: np.ndarray, path: Path) -> np.ndarray:
    """Returns their rows of buckets as we pack them."""
    if theirs_TB.ndim != 2 or theirs_TB.shape[1] * 8 != codec.width * codec.bits:
        raise ValueError(f"{path}: rows of shape {theirs_TB.shape} for {codec.width} components of {codec.bits} bits; damaged")
    bits = np.unpackbits(np.ascontiguousarray(theirs_TB, dtype=np.uint8), axis=1).reshape(
        len(theirs_TB), codec.width, codec.bits
    )
    buckets_TP = np.zeros((len(theirs_TB), codec.padded), dtype=np.uint8)
    buckets_TP[:, : codec.width] = (bits << np.arange(codec.bits, dtype=np.uint8)).sum(axis=2)
    packed_TB = np.zeros((len(theirs_TB), codec.padded * codec.bits // 8), dtype=np.uint8)
    for field, part_TB in enumerate(np.split(buckets_TP, 8 // codec.bits, axis=1)):
        packed_TB |= part_TB << np.uint8(field * codec.bits)
    return packed_TB


def _json(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path}: missing; {path.parent} is no index of ColBERT, PyLate or fast-plaid, or is damaged")
    return read_json(path)


def _load_npy(directory: Path, name: str) -> np.ndarray:
    return load_array(directory / f"{name}.npy")


def _load_pt(directory: Path, name: str) -> Any:
    import torch

    path = directory / f"{name}.pt"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; {directory} is no index of ColBERT, PyLate or fast-plaid, or is damaged") from None
    except Exception as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    return [part.float().numpy() for part in found] if isinstance(found, tuple | list) else _numpy(found)


def _numpy(tensor: Any) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _buckets(directory: Path, load: Callable[[Path, str], Any]) -> Any:
    return (
        load(directory, "buckets")
        if load is _load_pt
        else (load(directory, "bucket_cutoffs"), load(directory, "bucket_weights"))
    )


def _save_npy(directory: Path, name: str, array: np.ndarray) -> None:
    save_array(directory / f"{name}.npy", np.ascontiguousarray(array))


def _save_pt(directory: Path, name: str, array: np.ndarray | tuple[np.ndarray, ...]) -> None:
    import torch

    made = [torch.from_numpy(np.array(part)) for part in (array if isinstance(array, tuple) else (array,))]
    torch.save(tuple(made) if isinstance(array, tuple) else made[0], directory / f"{name}.pt")


def _save_buckets(directory: Path, save: Callable[..., None], codec: Codec) -> None:
    if save is _save_pt:
        _save_pt(directory, "buckets", (codec.cutoffs, codec.weights))
    else:
        _save_npy(directory, "bucket_cutoffs", codec.cutoffs)
        _save_npy(directory, "bucket_weights", codec.weights)


def _save_lists(directory: Path, save: Callable[..., None], residuals: Residuals) -> None:
    """Writes for each centroid the documents that have a token there, each once."""
    clusters = np.repeat(np.arange(len(residuals.codec.centroids_KD)), np.diff(residuals.starts_K1))
    owners = residuals.owners_T
    kept = np.r_[True, (np.diff(clusters) != 0) | (np.diff(owners) != 0)][: len(owners)]
    documents = owners[kept].astype(np.int64)
    counts = np.bincount(clusters[kept], minlength=len(residuals.codec.centroids_KD)).astype(np.int32)
    if save is _save_pt:
        _save_pt(directory, "ivf.pid", (documents.astype(np.int32), counts))
    else:
        _save_npy(directory, "ivf", documents)
        _save_npy(directory, "ivf_lengths", counts)
