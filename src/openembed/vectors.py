"""How vectors leave: all or the first dimensions, in float32, float16, int8 or one bit a dimension.

    precision   an array (N, C) of                 bytes a vector   reads back as
    float32     float32, C = D                     4 D              itself
    float16     float16, C = D                     2 D              itself, rounded to 11 bits
    int8        int8, C = D, and scales (N,)       D + 4            number · scale; scale = largest magnitude / 127
    binary      uint8, C = D / 8                   D / 8            the signs, ± 1 / √D

int8 needs no calibration data: every vector has its own scale. Bits are packed as ``numpy.packbits`` does (first dimension
highest; 1: greater than 0). Truncated vectors have length 1 again where the whole ones had.

N vectors, Q queries, D dimensions kept, C columns as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from openembed.config import Config

Precision = Literal["float32", "float16", "int8", "binary"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "binary": np.dtype("u1"),
}
"""What each precision is stored as; little-endian on every machine."""

BLOCK = 16_384


class VectorFormat(Config):
    """The first ``dimensions`` (None: all) of each vector, in a ``precision``."""

    dimensions: int | None = Field(None, ge=1)
    precision: Precision = "float32"

    @property
    def plain(self) -> bool:
        """Whether vectors stay as the encoder gives them."""
        return self == VectorFormat()

    @property
    def dtype(self) -> np.dtype:
        """What is stored."""
        return DTYPES[self.precision]

    def width(self, full: int) -> int:
        """Returns D for a model of width ``full``; raises ``ValueError`` for more than it has, or bits that fill no bytes."""
        kept = full if self.dimensions is None else self.dimensions
        if kept > full:
            raise ValueError(f"dimensions {kept} is more than the {full} this model has; use 1 to {full}, or leave it out")
        if self.precision == "binary" and kept % 8:
            raise ValueError(f"binary vectors need a multiple of 8 dimensions, got {kept}; use {kept // 8 * 8 or 8}")
        return kept

    def columns(self, full: int) -> int:
        """Returns C, the numbers stored for each vector, for a model of width ``full``."""
        return self.width(full) // 8 if self.precision == "binary" else self.width(full)

    def bytes_per_vector(self, full: int) -> int:
        """Returns what a vector takes, its scale included."""
        return self.columns(full) * self.dtype.itemsize + (4 if self.precision == "int8" else 0)

    def apply(self, vectors_ND: np.ndarray, *, normalize: bool = True) -> StoredVectors:
        """Returns float vectors in this format; with ``normalize``, what truncation leaves is scaled to length 1.

        Raises ``ValueError`` for dimensions the vectors do not have and for numbers that float16 cannot hold.
        """
        width = self.width(vectors_ND.shape[1])
        values_ND = np.asarray(vectors_ND, dtype=np.float32)
        if width < values_ND.shape[1]:
            values_ND = values_ND[:, :width]
            values_ND = unit(values_ND) if normalize else values_ND
        return quantize(values_ND, self.precision)


@dataclass(frozen=True)
class StoredVectors:
    """Vectors as they are stored, perhaps memory-mapped: (N, C), and for int8 the scale of each, float32 (N,)."""

    values_NC: np.ndarray
    scales_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.precision == "int8") != (self.scales_N is not None):
            raise ValueError("int8 vectors come with their scales, others without")
        if self.scales_N is not None and len(self.scales_N) != len(self.values_NC):
            raise ValueError(f"{len(self.values_NC)} vectors but {len(self.scales_N)} scales; encode them anew")

    def __len__(self) -> int:
        return len(self.values_NC)

    def __getitem__(self, rows: slice | np.ndarray) -> StoredVectors:
        return StoredVectors(self.values_NC[rows], None if self.scales_N is None else self.scales_N[rows])

    @property
    def precision(self) -> Precision:
        """How the values are stored."""
        for name, dtype in DTYPES.items():
            if self.values_NC.dtype == dtype:
                return name
        raise ValueError(f"vectors of {self.values_NC.dtype} are not known; use {', '.join(map(str, DTYPES.values()))}")

    @property
    def width(self) -> int:
        """D: the dimensions of each vector."""
        return self.values_NC.shape[1] * (8 if self.precision == "binary" else 1)

    def to_float32(self) -> np.ndarray:
        """Returns what the stored numbers mean, float32 (N, D): for binary ± 1 / √D, which has length 1."""
        if self.precision == "binary":
            signs_ND = np.unpackbits(np.ascontiguousarray(self.values_NC), axis=1).astype(np.float32) * 2 - 1
            return signs_ND * np.float32(self.width**-0.5)
        values_ND = np.asarray(self.values_NC, dtype=np.float32)
        return values_ND if self.scales_N is None else values_ND * self.scales_N[:, None]

    def binary(self) -> StoredVectors:
        """Returns the signs alone; of int8, numbers that were rounded to 0 count as negative."""
        if self.precision == "binary":
            return self
        return StoredVectors(np.packbits(np.asarray(self.values_NC) > 0, axis=1))


def quantize(vectors_ND: np.ndarray, precision: Precision) -> StoredVectors:
    """Returns float32 vectors in ``precision``; the same vector always gives the same bytes, whatever lies beside it."""
    if precision == "float32":
        return StoredVectors(np.ascontiguousarray(vectors_ND, dtype="<f4"))
    if precision == "float16":
        if np.abs(vectors_ND).max(initial=0) > np.finfo(np.float16).max:
            raise ValueError("a vector holds numbers above 65504, the most float16 has; normalize, or use float32")
        return StoredVectors(vectors_ND.astype("<f2"))
    if precision == "int8":
        scales_N = (np.abs(vectors_ND).max(axis=1, initial=0) / np.float32(127)).astype("<f4")
        divisors_N = np.where(scales_N > 0, scales_N, np.float32(1))
        codes_ND = np.clip(np.rint(vectors_ND / divisors_N[:, None]), -127, 127).astype(np.int8)
        return StoredVectors(codes_ND, scales_N)
    if vectors_ND.shape[1] % 8:
        raise ValueError(f"binary vectors need a multiple of 8 dimensions, got {vectors_ND.shape[1]}")
    return StoredVectors(np.packbits(vectors_ND > 0, axis=1))


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Returns the vectors scaled to length 1; a vector of zeros stays one."""
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), np.float32(1e-12))


def scores(queries: StoredVectors | np.ndarray, documents: StoredVectors) -> np.ndarray:
    """Returns float32 (Q, N) inner products of what is stored; ``queries`` may be float vectors (Q, D).

    Between two of binary precision: 1 - 2 · (Hamming distance) / D.
    """
    queries_QD = queries.to_float32() if isinstance(queries, StoredVectors) else np.asarray(queries, dtype=np.float32)
    if queries_QD.shape[1] != documents.width:
        raise ValueError(f"queries have {queries_QD.shape[1]} dimensions, the stored vectors {documents.width}; use the same")
    out_QN = np.empty((len(queries_QD), len(documents)), dtype=np.float32)
    for start in range(0, len(documents), BLOCK):
        block = documents[start : start + BLOCK]
        out_QN[:, start : start + len(block)] = queries_QD @ block.to_float32().T
    return out_QN


def truncation_warning(trained: Sequence[int], dimensions: int | None, full: int) -> str | None:
    """Returns why keeping ``dimensions`` may cost more than it should, or None.

    ``trained``: the numbers of dimensions that the model says it was trained at (Matryoshka).
    """
    if dimensions is None or dimensions >= full or (trained and dimensions >= min(trained)):
        return None
    said = f"was trained to be cut to {min(trained)} dimensions or more" if trained else "does not say it was trained to be cut"
    return (
        f"this model {said} (Matryoshka); what the first {dimensions} of {full} lose is for you to measure: "
        "openembed evaluate --dimensions"
    )
