"""Token vectors as the nearest of K centroids and 2 or 4 bits a component of what is left (ColBERTv2, arXiv 2112.01488).

A component of the residual becomes the number of its bucket; buckets hold equally many of a sample's components, and each is
replaced by its middle quantile. Rows of buckets lie in the order of their centroids (which WARP scans), ``places_T`` leads
there from the order of the documents (which PLAID reads); one set of files serves both.

T tokens, K centroids, D width, P width padded for whole bytes of lanes, B bytes of a row, N documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import byref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from openembed.index.strings import load_array, map_file, named, save_array
from openembed.index.tokens.clusters import SAMPLE, k_means, nearest, sampled
from openembed.index.tokens.native import address, check, structure, token_library

LANES = 16
BLOCK = 16_384
MEASURED = 20_000
"""Tokens whose residuals give the buckets."""
MOST = 2**31 - 1
"""Coded tokens of a segment: their places are kept as int32."""

ResidualsStructure = structure("Residuals", "packed places codes owners centroids weights offsets", "width padded bits unit")


@dataclass(frozen=True)
class Codec:
    """What codes tokens: centroids (K, D), and of the residuals the cut-offs (2^bits - 1) and weights (2^bits) of buckets.

    ``unit``: tokens are of length 1, and reconstructed ones are brought to it. Raises ``ValueError`` for other bits.
    """

    centroids_KD: np.ndarray
    cutoffs: np.ndarray
    weights: np.ndarray
    unit: bool

    def __post_init__(self) -> None:
        if len(self.weights) not in (4, 16) or len(self.cutoffs) != len(self.weights) - 1:
            raise ValueError(
                f"{len(self.weights)} weights and {len(self.cutoffs)} cut-offs; 2 bits have 4 and 3, 4 bits 16 and 15"
            )

    @property
    def bits(self) -> int:
        """Bits of a component: 2 or 4."""
        return 2 if len(self.weights) == 4 else 4

    @property
    def width(self) -> int:
        """Components of a token."""
        return self.centroids_KD.shape[1]

    @property
    def padded(self) -> int:
        """Components of a row of buckets: whole lanes of whole bytes."""
        step = LANES * 8 // self.bits
        return -(-self.width // step) * step

    @cached_property
    def wide_KP(self) -> np.ndarray:
        """The centroids with zeros after their components."""
        wide_KP = np.zeros((len(self.centroids_KD), self.padded), dtype=np.float32)
        wide_KP[:, : self.width] = self.centroids_KD
        return wide_KP

    @cached_property
    def lane_weights(self) -> np.ndarray:
        """The weights sixteen times over, as the kernels look them up."""
        return np.tile(np.asarray(self.weights, dtype=np.float32), LANES // len(self.weights))

    @classmethod
    def train(cls, values_TD: np.ndarray, clusters: int, bits: int, seed: int = 0) -> Codec:
        """Returns a codec for tokens like these; the same tokens and seed give the same codec."""
        random = np.random.default_rng(seed)
        sample_TD = np.asarray(values_TD[sampled(len(values_TD), SAMPLE * clusters, random)], dtype=np.float32)
        unit = bool(np.abs(np.linalg.norm(sample_TD, axis=1) - 1).max() < 1e-2)
        centroids_KD = k_means(sample_TD, clusters, random, unit=unit)
        part_TD = sample_TD[sampled(len(sample_TD), MEASURED, random)]
        rest = (part_TD - centroids_KD[nearest(part_TD, centroids_KD)]).ravel()
        levels = np.quantile(rest, np.arange(1, 2 ** (bits + 1)) / 2 ** (bits + 1)).astype(np.float32)
        return cls(centroids_KD, np.ascontiguousarray(levels[1::2]), np.ascontiguousarray(levels[::2]), unit)

    def pack(self, values_TD: np.ndarray, codes_T: np.ndarray) -> np.ndarray:
        """Returns uint8 (T, B): the buckets of the residuals of float32 tokens."""
        values_TD, library = np.ascontiguousarray(values_TD, dtype=np.float32), token_library()
        codes_T = np.ascontiguousarray(codes_T, dtype=np.int32)
        packed_TB = np.zeros((len(values_TD), self.padded * self.bits // 8), dtype=np.uint8)
        if library is not None:
            fields = {"centroids": address(self.wide_KP), "width": self.width, "padded": self.padded, "bits": self.bits}
            shape, cutoffs = ResidualsStructure(**fields), np.ascontiguousarray(self.cutoffs, dtype=np.float32)
            arguments = address(values_TD), address(codes_T), len(values_TD), byref(shape), address(cutoffs)
            library.openembed_residuals_pack(*arguments, address(packed_TB))
            return packed_TB
        buckets_TP = np.zeros((len(values_TD), self.padded), dtype=np.uint8)
        buckets_TP[:, : self.width] = np.searchsorted(self.cutoffs, values_TD - self.centroids_KD[codes_T], side="left")
        for field, part_TB in enumerate(np.split(buckets_TP, 8 // self.bits, axis=1)):
            packed_TB |= part_TB << np.uint8(field * self.bits)
        return packed_TB

    def residuals_of(self, packed_TB: np.ndarray) -> np.ndarray:
        """Returns float32 (T, D): what rows of buckets stand for."""
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        buckets = (packed_TB[:, None, :] >> shifts[:, None]) & np.uint8(2**self.bits - 1)
        return np.asarray(self.weights, np.float32)[buckets.reshape(len(packed_TB), self.padded)[:, : self.width]]


@dataclass
class Residuals:
    """The coded tokens of a segment: ``packed_TB`` and ``owners_T`` (documents) in the order of the centroids.

    ``codes_T`` (centroids) and ``places_T`` in the order of the documents; ``starts_K1``: where each centroid's tokens start.
    """

    codec: Codec
    offsets_N1: np.ndarray
    packed_TB: np.ndarray
    codes_T: np.ndarray
    places_T: np.ndarray
    owners_T: np.ndarray
    starts_K1: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    def reconstruct(self, tokens: np.ndarray) -> np.ndarray:
        """Returns float32 (tokens, D): tokens of the documents' order as nearly as the code has them."""
        codec, library = self.codec, token_library()
        if library is not None:
            tokens = np.ascontiguousarray(tokens, dtype=np.int64)
            values = np.empty((len(tokens), codec.padded), dtype=np.float32)
            library.openembed_residuals_values(self.pointer, address(tokens), len(tokens), address(values))
            return np.ascontiguousarray(values[:, : codec.width])
        values = codec.centroids_KD[self.codes_T[tokens]] + codec.residuals_of(self.packed_TB[self.places_T[tokens]])
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) if codec.unit else values

    def maxsim(self, query_LD: np.ndarray, documents_C: np.ndarray) -> np.ndarray:
        """Returns float32 (C,): MaxSim of the reconstructed documents; -inf for one of no tokens."""
        scores_C, library = np.empty(len(documents_C), dtype=np.float32), token_library()
        query_LD = np.asarray(query_LD, dtype=np.float32)
        if library is not None:
            documents_C = np.ascontiguousarray(documents_C, dtype=np.int64)
            panel = self._panel(query_LD)
            arguments = address(panel), len(query_LD), address(documents_C), len(documents_C), address(scores_C)
            check(library.openembed_residuals_maxsim(self.pointer, *arguments))
            return scores_C
        for place, document in enumerate(documents_C):
            tokens = np.arange(self.offsets_N1[document], self.offsets_N1[document + 1])
            products = query_LD @ self.reconstruct(tokens).T
            scores_C[place] = products.max(axis=1).sum() if len(tokens) else -np.inf
        return scores_C

    def near(self, table_KL: np.ndarray, documents_C: np.ndarray) -> np.ndarray:
        """Returns int32 (C,): the sum over lanes of the greatest byte among a document's centroids; -1 for no tokens.

        ``table_KL``: uint8, of 16, 32 or a multiple of 64 lanes.
        """
        scores_C, library = np.full(len(documents_C), -1, dtype=np.int32), token_library()
        if library is not None:
            documents_C = np.ascontiguousarray(documents_C, dtype=np.int64)
            arguments = address(table_KL), table_KL.shape[1], address(documents_C), len(documents_C), address(scores_C)
            library.openembed_residuals_near(self.pointer, *arguments)
            return scores_C
        for place, document in enumerate(documents_C):
            codes = self.codes_T[self.offsets_N1[document] : self.offsets_N1[document + 1]]
            if len(codes):
                scores_C[place] = table_KL[codes].max(axis=0).sum(dtype=np.int32)
        return scores_C

    @property
    def pointer(self) -> object:
        """What a call is given."""
        return byref(self._structure)

    @cached_property
    def _structure(self) -> ResidualsStructure:
        codec = self.codec
        arrays = self.packed_TB, self.places_T, self.codes_T, self.owners_T, codec.wide_KP, codec.lane_weights, self.offsets_N1
        return ResidualsStructure(*map(address, arrays), codec.width, codec.padded, codec.bits, codec.unit)

    def _panel(self, query_LD: np.ndarray) -> np.ndarray:
        """Returns the query as float32 (tiles, P, 16)."""
        tiles = -(-len(query_LD) // LANES)
        wide_LP = np.zeros((tiles * LANES, self.codec.padded), dtype=np.float32)
        wide_LP[: len(query_LD), : self.codec.width] = query_LD
        return np.ascontiguousarray(wide_LP.reshape(tiles, LANES, -1).transpose(0, 2, 1))


def clusters_for(tokens: int) -> int:
    """Returns how many centroids so many tokens get: a power of two, 8 times the root of their number at most."""
    return 2 ** max(0, int(np.log2(max(1.0, 8 * tokens**0.5)))) if tokens >= 64 else max(1, min(tokens, 8))


def check_count(tokens: int) -> None:
    """Raises ``ValueError`` for more tokens than a segment can have coded."""
    if tokens > MOST:
        raise ValueError(
            f"{tokens:,} tokens to code for one segment; at most {MOST:,} can be: spread the documents over several indexes"
        )


def encode_tokens(
    codec: Codec, values_TD: np.ndarray, offsets_N1: np.ndarray, advance: Callable[[int], None] = lambda _n: None
) -> Residuals:
    """Returns the coded tokens; they are read a block at a time, from a memory-mapped file too.

    Raises ``ValueError`` for more than ``MOST`` tokens, before any is coded.
    """
    check_count(len(values_TD))
    codes_T = np.empty(len(values_TD), dtype=np.int32)
    packed_TB = np.empty((len(values_TD), codec.padded * codec.bits // 8), dtype=np.uint8)
    for start in range(0, len(values_TD), BLOCK):
        part = slice(start, min(start + BLOCK, len(values_TD)))
        block_TD = np.asarray(values_TD[part], dtype=np.float32)
        codes_T[part] = nearest(block_TD, codec.centroids_KD)
        packed_TB[part] = codec.pack(block_TD, codes_T[part])
        advance(len(block_TD))
    return arranged(codec, offsets_N1, codes_T, packed_TB)


def arranged(codec: Codec, offsets_N1: np.ndarray, codes_T: np.ndarray, packed_TB: np.ndarray) -> Residuals:
    """Returns coded tokens given in the order of the documents, put in the order of their centroids.

    Raises ``ValueError`` for more than ``MOST`` tokens.
    """
    check_count(len(codes_T))
    offsets_N1 = np.ascontiguousarray(offsets_N1, dtype=np.int64)
    order_T = np.argsort(codes_T, kind="stable").astype(np.int32)
    places_T = np.empty(len(order_T), dtype=np.int32)
    places_T[order_T] = np.arange(len(order_T), dtype=np.int32)
    owners_T = np.repeat(np.arange(len(offsets_N1) - 1, dtype=np.int32), np.diff(offsets_N1))[order_T]
    sizes_K = np.bincount(codes_T, minlength=len(codec.centroids_KD))
    starts_K1 = np.concatenate([[0], np.cumsum(sizes_K)]).astype(np.int64)
    return Residuals(codec, offsets_N1, packed_TB[order_T], codes_T, places_T, owners_T, starts_K1)


def write_residuals(directory: Path, residuals: Residuals) -> None:
    """Writes coded tokens into the folder of a segment."""
    codec = residuals.codec
    for name, array in {"packed.u8": residuals.packed_TB, **{f"{n}.i32": getattr(residuals, f"{n}_T") for n in LISTS}}.items():
        path = directory / f"residuals.{name}"
        with named(path), path.open("wb") as file:
            file.write(memoryview(np.ascontiguousarray(array).reshape(-1)).cast("B") if array.size else b"")
    arrays = {"centroids": codec.centroids_KD, "cutoffs": codec.cutoffs, "weights": codec.weights}
    for name, array in {**arrays, "starts": residuals.starts_K1}.items():
        save_array(directory / f"residuals.{name}.npy", array)


LISTS = ("codes", "places", "owners")


def map_residuals(directory: Path, offsets_N1: np.ndarray, width: int, bits: int, unit: bool) -> Residuals:
    """Returns the memory-mapped coded tokens; raises ``ValueError`` naming a file that is missing or does not fit."""
    tokens = int(offsets_N1[-1])
    load = functools.partial(_load, directory)
    centroids_KD, starts_K1 = load("centroids", (None, width)), load("starts", (None,))
    codec = Codec(centroids_KD, load("cutoffs", (2**bits - 1,)), load("weights", (2**bits,)), unit)
    fits = len(starts_K1) == len(centroids_KD) + 1 and starts_K1[0] == 0 and starts_K1[-1] == tokens
    if not fits or starts_K1.dtype != np.int64 or (np.diff(starts_K1) < 0).any():
        raise ValueError(f"{directory / 'residuals.starts.npy'}: damaged, it does not fit the segment; build the index anew")
    packed_TB = map_file(directory / "residuals.packed.u8", np.uint8, (tokens, codec.padded * bits // 8))
    lists = []
    for name, limit in zip(LISTS, (len(centroids_KD), tokens, len(offsets_N1) - 1), strict=True):
        path = directory / f"residuals.{name}.i32"
        values_T = map_file(path, np.int32, (tokens,))
        if tokens and not (int(values_T.min()) >= 0 and int(values_T.max()) < limit):
            raise ValueError(f"{path}: damaged, a number is not below {limit}; build the index anew")
        lists.append(values_T)
    return Residuals(codec, offsets_N1, packed_TB, *lists, starts_K1)


def _load(directory: Path, name: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Returns a small array in memory; raises ``ValueError`` naming its file where the shape or a value is wrong."""
    path = directory / f"residuals.{name}.npy"
    array = np.array(load_array(path))
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits or not np.isfinite(array).all():
        raise ValueError(f"{path}: damaged, it does not fit the segment; build the index anew")
    return array
