"""Token vectors as one byte a component with bounds on what that loses, and the tokens of queries as the kernels read them.

N documents, T tokens of documents, L lanes (tokens of queries), D width, S stride: the width padded to a multiple of four.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass

import numpy as np

from openembed.index.tokens.native import address, check, structure, token_library
from openembed.token_vectors import TokenVectors

LANES = 16
LARGEST = 1e9
"""Greatest norm of a vector: the bounds of codes must not overflow, nor the products of half-precision values be lost."""
WIDEST = 32_768
"""Greatest width: sums of products of bytes must fit 32 bits."""
ROOM = 1e-4
"""Relative room for float32 rounding in a norm or an error; 2e-6 of the norms is room for it in a product."""

PanelStructure = structure("Panel", "panel start scale inner outer values bounds", "queries lanes tiles")


@dataclass(frozen=True)
class CodedRows:
    """Rows as bytes (component / scale + 128, padded with 128), and float64 lengths of each and of what rounding lost."""

    codes_TS: np.ndarray
    scale_T: np.ndarray
    error_T: np.ndarray
    norm_T: np.ndarray


def stride_of(width: int) -> int:
    """Returns the bytes of a coded row."""
    return -(-width // 4) * 4


def code_rows(values_TD: np.ndarray) -> CodedRows:
    """Returns the codes of float32 rows, each with its own scale: the greatest component becomes 127."""
    values_TD = np.ascontiguousarray(values_TD, dtype=np.float32)
    (count, width), library = values_TD.shape, token_library()
    codes_TS = np.full((count, stride_of(width)), 128, dtype=np.uint8)
    scale_T, error_T, norm_T = np.empty(count, np.float32), np.empty(count), np.empty(count)
    if library is not None:
        sizes = count, width, codes_TS.shape[1]
        outputs = (address(a) for a in (codes_TS, scale_T, error_T, norm_T))
        check(library.openembed_tokens_code(address(values_TD), *sizes, *outputs))
        return CodedRows(codes_TS, scale_T, error_T, norm_T)
    scale_T[:] = np.abs(values_TD).max(axis=1, initial=0.0) / np.float32(127)
    scale_T[scale_T < np.finfo(np.float32).tiny] = 1.0
    whole_TD = np.rint(values_TD / scale_T[:, None])
    codes_TS[:, :width] = (whole_TD + 128).astype(np.uint8)
    wide_TD = values_TD.astype(np.float64)
    error_T[:] = np.linalg.norm(wide_TD - whole_TD * scale_T[:, None].astype(np.float64), axis=1)
    norm_T[:] = np.linalg.norm(wide_TD, axis=1)
    return CodedRows(codes_TS, scale_T, error_T, norm_T)


def document_bounds(rows: CodedRows, offsets_N1: np.ndarray) -> np.ndarray:
    """Returns float32 (N, 2): the greatest error and norm among each document's tokens, rounded up; 0 where it has none."""
    bounds_N2, full_N = np.zeros((len(offsets_N1) - 1, 2), dtype=np.float32), np.diff(offsets_N1) > 0
    if full_N.any():
        for column, lengths_T in enumerate((rows.error_T, rows.norm_T)):
            bounds_N2[full_N, column] = np.maximum.reduceat(lengths_T, offsets_N1[:-1][full_N]) * (1 + ROOM)
    return bounds_N2


class Panel:
    """Queries as the kernels read them: their tokens side by side in lanes. ``queries`` must not be changed meanwhile."""

    def __init__(self, queries: TokenVectors) -> None:
        values_LD = np.ascontiguousarray(queries.values_TD, dtype=np.float32)
        count, width = values_LD.shape
        rows, tiles = code_rows(values_LD), -(-count // LANES)
        self.values_LD, self.offsets, self.count = values_LD, np.ascontiguousarray(queries.offsets_N1, np.int64), len(queries)
        error_L, norm_L = rows.error_T * (1 + ROOM), rows.norm_T * (1 + ROOM)
        self.inner_L = (norm_L + error_L).astype(np.float32)
        self.outer_L = (error_L + 2e-6 * norm_L).astype(np.float32)
        self.norm_L = norm_L
        wide_LD = np.zeros((count, -(-width // LANES) * LANES))
        wide_LD[:, :width] = values_LD
        self._arrays = (
            *in_lanes(rows),
            padded(self.inner_L, tiles * LANES),
            padded(self.outer_L, tiles * LANES),
            wide_LD,
            self.offsets,
        )
        self._structure = PanelStructure(*map(address, self._arrays), self.count, count, tiles)

    @property
    def pointer(self) -> object:
        """What a call is given."""
        return byref(self._structure)

    @property
    def lanes(self) -> int:
        """The number of tokens of all queries."""
        return len(self.values_LD)

    def sums(self, values_L: np.ndarray) -> np.ndarray:
        """Returns (queries,): the sum over the tokens of each query."""
        totals = np.concatenate([[0.0], np.cumsum(values_L, dtype=np.float64)])
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]


def in_lanes(rows: CodedRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns rows as lanes of a panel: codes int32 (tiles, steps, 16), each of four int8; starts; scales."""
    count, stride = rows.codes_TS.shape
    lanes = -(-count // LANES) * LANES
    signed_LS = np.zeros((lanes, stride), dtype=np.int8)
    signed_LS[:count] = (rows.codes_TS ^ 128).view(np.int8)
    steps = signed_LS.view(np.int32).reshape(-1, LANES, stride // 4).transpose(0, 2, 1)
    return np.ascontiguousarray(steps), -128 * signed_LS.sum(axis=1, dtype=np.int32), padded(rows.scale_T, lanes)


def padded(values: np.ndarray, count: int) -> np.ndarray:
    """Returns float32 values with zeros after them, ``count`` together."""
    out = np.zeros(count, dtype=np.float32)
    out[: len(values)] = values
    return out


def check_vectors(vectors: TokenVectors, width: int, name: Callable[[int], str]) -> None:
    """Raises ``ValueError`` for another width, a value that is not finite, or a vector longer than ``LARGEST``.

    ``name`` says which text it is.
    """
    if not isinstance(vectors, TokenVectors):
        kind = type(vectors).__name__
        raise TypeError(f"token vectors come as TokenVectors, got {kind}; TokenVectors.from_list([matrix, ...]) makes them")
    if vectors.width != width:
        raise ValueError(f"token vectors of width {vectors.width}; this index needs width {width}")
    values_TD = vectors.values_TD
    if not np.isfinite(values_TD).all():
        token = int(np.flatnonzero(~np.isfinite(values_TD).all(axis=1))[0])
        place = int(np.searchsorted(vectors.offsets_N1, token, side="right")) - 1
        raise ValueError(f"{name(place)}: a token vector holds NaN or infinity")
    if len(values_TD) and float(np.abs(values_TD).max()) * width**0.5 > LARGEST:
        raise ValueError(f"token vectors longer than {LARGEST:g}; scale them down, rankings do not change by that")
