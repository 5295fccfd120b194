"""Approximate search of a large segment: clusters that are worth looking into, and four bits for a few components at a time.

Vectors are grouped by nearest centroid (k-means). The components are dealt out to parts, so that each part varies about as
much as the others: one that varies much has a part of its own or shares it with few, those that hardly vary are many to a
part. Each part of a vector is coded as one of 16 points (a product quantizer), so a query's product with a document is a sum
of M table entries, a fast compiled look-up. The centroids are coded alike: a first look-up finds the clusters near the query,
a second scans them, and the best documents by that count are then scored exactly. What is missed is missed because its
cluster is not among the near ones, or its sketch is poor; the scores of what is found are exact.

N documents, P places in the order of the clusters (padded to whole groups of 16), L clusters (padded alike), D width, M parts,
C components of the largest part, S steps of eight parts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from openembed.index.codes import (
    LANES,
    documents_argument,
    eligible_groups,
    groups_of,
    in_parallel,
)
from openembed.index.native import scan_library, threads
from openembed.index.strings import load_array, map_file, named, save_array

REACH = 0.15
"""A cluster is scanned when its product with the query is this far from the mean of all clusters to the best of them.

So an easy question looks at less than a hard one: a fifth of a million real passages on average. See docs/index.md.
"""
LEAST_SHARE = 0.05
LEAST_TIMES = 4
"""This share of the documents is scanned at least, and this many for each of the candidates to be scored exactly."""
RESCORED = 16
"""Candidates scored exactly for each of the k wanted, and at least ``LEAST``."""
LEAST = 256
VERSION = 2
"""Which sketches this module reads: a segment with those of another version is searched exactly until it is compacted."""
THREADED = 4_096
"""Groups that are worth a thread."""
SAMPLE = 40
ROUNDS = 6
POINTS = 16
POINTS_SAMPLE = 50_000
BLOCK = 16_384
LINE = 64
FILES = (
    "sketch.u8",
    "sketch.points.npy",
    "sketch.parts.npy",
    "sketch.order.npy",
    "sketch.centroids.npy",
    "sketch.starts.npy",
)

logger = logging.getLogger(__name__)


@dataclass
class Coder:
    """How vectors are coded: ``parts_MC`` are the components of each part, ``points_MPC`` (M, 16, C) its points.

    A part of fewer than C components repeats component 0, for which its points are 0.
    """

    parts_MC: np.ndarray
    points_MPC: np.ndarray

    def tables(self, query_D: np.ndarray) -> np.ndarray:
        """Returns uint8 (S, 2, 4, 16): the products of the query with each point, all on one scale."""
        products_MP = np.matmul(self.points_MPC, query_D[self.parts_MC][:, :, None])[:, :, 0]
        products_MP -= products_MP.min(axis=1, keepdims=True)
        whole_MP = np.rint(products_MP * (255 / max(float(products_MP.max()), 1e-30))).astype(np.uint8)
        return _aligned(whole_MP.reshape(2, -1, 4, POINTS).transpose(1, 0, 2, 3))

    def coded(self, rows_PD: np.ndarray) -> np.ndarray:
        """Returns uint8 (G, S, 16, 4): the nearest point of each part, the second half of the parts in the high bits."""
        nearest_PM = np.empty((len(rows_PD), len(self.parts_MC)), dtype=np.uint8)
        for part, (components_C, points_PC) in enumerate(zip(self.parts_MC, self.points_MPC, strict=True)):
            nearest_PM[:, part] = _closest(rows_PD[:, components_C], points_PC)
        half = len(self.parts_MC) // 2
        both_PH = nearest_PM[:, :half] | (nearest_PM[:, half:] << 4)
        return np.ascontiguousarray(both_PH.reshape(-1, LANES, half // 4, 4).transpose(0, 2, 1, 3))


@dataclass
class Sketch:
    """What is on disk of a segment: ``codes_GS`` (G, S, 16, 4), ``order_P`` (-1: padding), how they were coded.

    ``centroids_GS``: the codes of the clusters, and the group at which each of them starts, ``starts_L`` (L + 1).
    """

    codes_GS: np.ndarray
    coder: Coder
    order_P: np.ndarray
    centroids_GS: np.ndarray
    starts_L: np.ndarray
    _masks: tuple[np.ndarray, np.ndarray, int] | None = None

    @cached_property
    def _loaded_GS(self) -> np.ndarray:
        """The codes in memory of their own: scanned twice as fast as a mapped file, for 48 bytes a document of width 256."""
        return _aligned(self.codes_GS)

    @cached_property
    def _clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """The codes of the clusters in memory of their own, and int64 (L, 2): which groups are theirs."""
        return _aligned(self.centroids_GS), np.stack([self.starts_L[:-1], self.starts_L[1:]], axis=1)

    def candidates(self, query_D: np.ndarray, eligible_N: np.ndarray, k: int) -> np.ndarray:
        """Returns positions of eligible documents that are likely the k of greatest product with the query."""
        wanted, tables = max(RESCORED * k, LEAST), self.coder.tables(query_D)
        ranges, mask_G = self._near(tables, wanted), self._mask(eligible_N)[0]
        parts = min(threads(), max(1, int((ranges[:, 1] - ranges[:, 0]).sum()) // THREADED))
        room = 2 * wanted + LANES
        places, sums = np.empty((parts, room), dtype=np.int32), np.empty((parts, room), dtype=np.float32)

        def run(number: int) -> int:
            documents = documents_argument(self._loaded_GS, None, mask_G, ranges[number::parts], first=0)
            outputs = (places[number].ctypes.data, sums[number].ctypes.data)
            return scan_library().openembed_sketch_scan(documents.pointer, tables.ctypes.data, wanted, *outputs)

        filled = in_parallel(run, parts)
        if min(filled) < 0:
            raise MemoryError("no memory for the candidates of a search")
        found = np.concatenate([row[:count] for row, count in zip(places, filled, strict=True)])
        if len(found) > wanted:
            scores = np.concatenate([row[:count] for row, count in zip(sums, filled, strict=True)])
            found = found[np.argpartition(scores, -wanted)[-wanted:]]
        return self.order_P[found]

    def eligible(self, eligible_N: np.ndarray) -> int:
        """Returns how many documents the mask leaves."""
        return self._mask(eligible_N)[1]

    def _mask(self, eligible_N: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns uint16 (G), the mask in the order of the clusters, and its count; the last is kept, most often the next."""
        last = self._masks
        if last is None or last[0] is not eligible_N:
            mask_G = eligible_groups(np.append(eligible_N, False)[self.order_P])
            last = self._masks = eligible_N, mask_G, int(np.count_nonzero(eligible_N))
        return last[1:]

    def _near(self, tables: np.ndarray, wanted: int) -> np.ndarray:
        """Returns int64 (R, 2): the groups of the clusters near the query."""
        centroids_GS, ranges_L = self._clusters
        scores_L = sketch_scores(centroids_GS, tables)[: len(ranges_L)]
        mean, needed = float(scores_L.mean()), max(LEAST_SHARE * self.starts_L[-1], LEAST_TIMES * wanted / LANES)
        ranges = ranges_L[scores_L >= mean + REACH * (int(scores_L.max()) - mean)]
        if (ranges[:, 1] - ranges[:, 0]).sum() < needed:
            order_L = np.argsort(-scores_L, kind="stable")
            reached = np.cumsum(ranges_L[order_L, 1] - ranges_L[order_L, 0])
            ranges = ranges_L[order_L[: int(np.searchsorted(reached, needed)) + 1]]
        return ranges


def sketch_scores(codes_GS: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Returns int32 (P): for each code the sum of its entries in the tables, which grows as the product does."""
    scores_P = np.empty(len(codes_GS) * LANES, dtype=np.int32)
    sizes = (len(codes_GS), codes_GS.shape[1])
    scan_library().openembed_sketch_scores(codes_GS.ctypes.data, tables.ctypes.data, *sizes, scores_P.ctypes.data)
    return scores_P


def _aligned(array: np.ndarray) -> np.ndarray:
    """Returns a copy at a whole line of the cache; one that begins within a line takes a fifth longer to scan."""
    room = np.empty(array.nbytes + LINE, dtype=np.uint8)
    start = -room.ctypes.data % LINE
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def write_sketch(directory: Path, vectors_ND: np.ndarray, advance: Callable[[int], None] = lambda _n: None) -> None:
    """Writes the sketch of a segment's vectors; the same vectors give the same files."""
    random = np.random.default_rng(0)
    clusters = 2 ** round(np.log2(max(16, 4 * len(vectors_ND) ** 0.5)))
    clusters = min(clusters, len(vectors_ND))
    chosen = np.sort(random.choice(len(vectors_ND), min(len(vectors_ND), SAMPLE * clusters), replace=False))
    sample_ND = np.ascontiguousarray(vectors_ND[chosen], dtype=np.float32)
    centroids_LD = _k_means(sample_ND, clusters, random)
    nearest_N = np.empty(len(vectors_ND), dtype=np.int32)
    for start in range(0, len(vectors_ND), BLOCK):
        part = slice(start, start + BLOCK)
        nearest_N[part] = _nearest(np.asarray(vectors_ND[part]), centroids_LD)
        advance(len(nearest_N[part]))
    order_P, starts_L = _grouped(nearest_N, clusters)
    coder = _coder(sample_ND[:: -(-len(sample_ND) // POINTS_SAMPLE)])
    with named(directory / "sketch.u8"), (directory / "sketch.u8").open("wb") as file:
        for start in range(0, len(order_P), BLOCK):
            file.write(coder.coded(np.asarray(vectors_ND[np.maximum(order_P[start : start + BLOCK], 0)])).tobytes())
    padded_PD = np.zeros((groups_of(clusters) * LANES, vectors_ND.shape[1]), dtype=np.float32)
    padded_PD[:clusters] = centroids_LD
    arrays = {"points": coder.points_MPC, "parts": coder.parts_MC, "order": order_P, "starts": starts_L}
    for name, array in (arrays | {"centroids": coder.coded(padded_PD)}).items():
        save_array(directory / f"sketch.{name}.npy", array)


def map_sketch(directory: Path, count: int, width: int) -> Sketch:
    """Returns the memory-mapped sketch; raises ``ValueError`` when a file is missing or does not fit the segment."""
    arrays = [load_array(directory / name) for name in FILES[1:]]
    points_MPC, parts_MC, order_P, centroids_GS, starts_L = arrays
    steps, clusters = _parts(width) // 8, len(starts_L) - 1
    shapes = {
        "sketch.points.npy": points_MPC.shape == (_parts(width), POINTS, parts_MC.shape[-1]),
        "sketch.parts.npy": len(parts_MC) == _parts(width) and int(parts_MC.max()) < width,
        "sketch.order.npy": len(order_P) >= count and len(order_P) % LANES == 0,
        "sketch.centroids.npy": centroids_GS.shape == (groups_of(clusters), steps, LANES, 4),
        "sketch.starts.npy": clusters > 0 and starts_L[-1] * LANES == len(order_P),
    }
    for name, fits in shapes.items():
        if not fits:
            raise ValueError(f"{directory / name}: damaged, it does not fit the segment; build the index anew")
    codes_GS = map_file(directory / "sketch.u8", np.uint8, (groups_of(len(order_P)), steps, LANES, 4))
    return Sketch(codes_GS, Coder(parts_MC, points_MPC), order_P, centroids_GS, starts_L)


def _parts(width: int) -> int:
    """Returns the number of parts: six bits for four components, in whole steps of eight."""
    return -(-3 * width // 64) * 8


def _k_means(sample_ND: np.ndarray, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Returns unit centroids (L, D) by spherical k-means; an empty cluster begins anew at a random vector."""
    centroids_LD = sample_ND[random.choice(len(sample_ND), clusters, replace=False)]
    for _ in range(ROUNDS):
        nearest_N = _nearest(sample_ND, centroids_LD)
        counts_L = np.bincount(nearest_N, minlength=clusters)
        order_N = np.argsort(nearest_N, kind="stable")
        starts = np.concatenate([[0], np.cumsum(counts_L)[:-1]])
        full_L = counts_L > 0
        centroids_LD = sample_ND[random.choice(len(sample_ND), clusters)]
        centroids_LD[full_L] = np.add.reduceat(sample_ND[order_N], starts[full_L], axis=0)
        centroids_LD /= np.maximum(np.linalg.norm(centroids_LD, axis=1, keepdims=True), 1e-30)
    return centroids_LD


def _nearest(values_ND: np.ndarray, centroids_LD: np.ndarray) -> np.ndarray:
    parts = [values_ND[start : start + BLOCK] @ centroids_LD.T for start in range(0, len(values_ND), BLOCK)]
    return np.concatenate([part.argmax(axis=1) for part in parts]).astype(np.int32)


def _grouped(nearest_N: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions in order of their clusters, each padded with -1 to whole groups, and where clusters start."""
    sizes_L = np.bincount(nearest_N, minlength=clusters)
    starts_L = np.concatenate([[0], np.cumsum(-(-sizes_L // LANES))]).astype(np.int64)
    order_P = np.full(int(starts_L[-1]) * LANES, -1, dtype=np.int32)
    sorted_N = np.argsort(nearest_N, kind="stable")
    within = np.arange(len(nearest_N)) - np.repeat(np.cumsum(sizes_L) - sizes_L, sizes_L)
    order_P[np.repeat(starts_L[:-1] * LANES, sizes_L) + within] = sorted_N
    return order_P, starts_L


def _coder(sample_ND: np.ndarray) -> Coder:
    """Returns parts of about equal variation, and for each 16 points by k-means."""
    dealt = _dealt(sample_ND.var(axis=0), _parts(sample_ND.shape[1]))
    widest = max(1, max(map(len, dealt)))
    coder = Coder(np.zeros((len(dealt), widest), np.int32), np.zeros((len(dealt), POINTS, widest), np.float32))
    random = np.random.default_rng(0)
    for part, components in enumerate(dealt):
        coder.parts_MC[part, : len(components)] = components
        coder.points_MPC[part, :, : len(components)] = _points(sample_ND[:, components], random)
    return coder


def _dealt(variance_D: np.ndarray, parts: int) -> list[list[int]]:
    """Returns the components of each part: first what each component is worth in bits, then the largest to the emptiest part.

    A component is worth half the logarithm of its variance above a level, at which all bits are spent (reverse water-filling).
    The power is between 1, as if queries varied alike in all components, and 2, as if they varied as documents do.
    """
    worth_D = 0.5 * np.log2(np.maximum(variance_D, 1e-30).astype(np.float64) ** 1.5)
    low, high = worth_D.min() - 4 * parts, worth_D.max()
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if np.maximum(worth_D - level, 0).sum() > 4 * parts else (low, level)
    bits_D, filled_M = np.maximum(worth_D - low, 0), np.zeros(parts)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for component in np.argsort(-bits_D, kind="stable"):
        if bits_D[component] > 0:
            part = int(filled_M.argmin())
            dealt[part].append(int(component))
            filled_M[part] += bits_D[component]
    return dealt


def _points(values_NC: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns float32 (16, C) by k-means."""
    points_PC = values_NC[random.choice(len(values_NC), POINTS, replace=len(values_NC) < POINTS)]
    for _ in range(ROUNDS):
        nearest_N = _closest(values_NC, points_PC)
        counts_P = np.bincount(nearest_N, minlength=POINTS)
        for part, values_N in enumerate(values_NC.T):
            sums_P = np.bincount(nearest_N, values_N, minlength=POINTS)
            points_PC[counts_P > 0, part] = (sums_P / np.maximum(counts_P, 1))[counts_P > 0]
    return points_PC


def _closest(values_NC: np.ndarray, points_PC: np.ndarray) -> np.ndarray:
    return (values_NC @ (2 * points_PC.T) - (points_PC**2).sum(axis=1)).argmax(axis=1)
