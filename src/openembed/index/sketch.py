"""Approximate search of a large segment: clusters that are worth looking into, and half a byte for two components.

Vectors are grouped by nearest centroid (k-means), each group of a cluster's own. Every pair of components is one of 16 points
of its plane (a product quantizer), so a query's product with a document is a sum of D/2 table entries, a fast compiled
look-up. The clusters nearest to the query are scanned so, a share of all documents; the best by that count are then scored
exactly. What is missed is missed because its cluster is not among the nearest, or its sketch is poor; the scores of what is
found are exact.

N documents, P places in the order of the clusters (padded to whole groups of 16), L clusters, D width, M pairs of components,
S steps of eight pairs.
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
    Room,
    capacity,
    documents_argument,
    eligible_groups,
    groups_of,
    in_parallel,
    queries_argument,
)
from openembed.index.native import scan_library, threads
from openembed.index.strings import load_array, map_file, named, save_array

SHARE = 0.4
"""How many of the documents are scanned. Measured on a million real passages: see docs/index.md."""
RESCORED = 16
"""Candidates scored exactly for each of the k wanted, and at least ``LEAST``."""
LEAST = 192
THREADED = 4_096
"""Groups that are worth a thread."""
SAMPLE = 50
ROUNDS = 8
POINTS = 16
BLOCK = 16_384
FILES = ("sketch.u8", "sketch.points.npy", "sketch.order.npy", "sketch.centroids.npy", "sketch.starts.npy")

logger = logging.getLogger(__name__)


@dataclass
class Sketch:
    """What is on disk of a segment: ``codes_GS`` (G, S, 16, 4), ``points_MP`` (M, 16, 2), ``order_P`` (-1: padding).

    ``centroids_LD`` and the group at which each cluster starts, ``starts_L`` (L + 1).
    """

    codes_GS: np.ndarray
    points_MP: np.ndarray
    order_P: np.ndarray
    centroids_LD: np.ndarray
    starts_L: np.ndarray
    _masks: tuple[np.ndarray, np.ndarray] | None = None

    @cached_property
    def _loaded_GS(self) -> np.ndarray:
        """The codes in memory of their own: scanned twice as fast as a mapped file, for 64 bytes a document of width 256."""
        return np.array(self.codes_GS)

    def candidates(self, query_D: np.ndarray, eligible_N: np.ndarray, k: int) -> np.ndarray:
        """Returns positions of eligible documents that are likely the k of greatest product with the query."""
        wanted, tables = max(RESCORED * k, LEAST), self._tables(query_D)
        ranges, mask_G = self._nearest(query_D), self._eligible(eligible_N)
        parts = min(threads(), max(1, int((ranges[:, 1] - ranges[:, 0]).sum()) // THREADED))
        rooms = [Room(1, wanted, capacity(wanted)) for _ in range(parts)]

        def run(number: int) -> int:
            documents = documents_argument(self._loaded_GS, None, mask_G, ranges[number::parts], first=0)
            queries = queries_argument(None, wanted, rooms[number])
            return scan_library().openembed_sketch_scan(documents.pointer, queries.pointer, tables.ctypes.data)

        if any(in_parallel(run, parts)):
            raise MemoryError("no memory for the candidates of a search")
        places = np.concatenate([room.positions[0, : room.filled[0]] for room in rooms])
        scores = np.concatenate([room.upper[0, : room.filled[0]] for room in rooms])
        if len(places) > wanted:
            places = places[np.argpartition(scores, -wanted)[-wanted:]]
        return self.order_P[places]

    def _eligible(self, eligible_N: np.ndarray) -> np.ndarray:
        """Returns uint16 (G): the mask in the order of the clusters; the last one is kept, being most often the next."""
        last = self._masks
        if last is None or last[0] is not eligible_N:
            last = self._masks = eligible_N, eligible_groups(np.append(eligible_N, False)[self.order_P])
        return last[1]

    def _nearest(self, query_D: np.ndarray) -> np.ndarray:
        """Returns int64 (R, 2): the groups of the nearest clusters that together hold ``SHARE`` of the documents.

        The nearest come first: they hold the best documents, and the sooner these are known, the fewer others are taken in.
        """
        order_L = np.argsort(-(self.centroids_LD @ query_D))
        reached = np.cumsum(np.diff(self.starts_L)[order_L])
        chosen = order_L[: int(np.searchsorted(reached, SHARE * self.starts_L[-1])) + 1]
        return np.stack([self.starts_L[chosen], self.starts_L[chosen + 1]], axis=1)

    def _tables(self, query_D: np.ndarray) -> np.ndarray:
        """Returns uint8 (S, 2, 4, 16): the products of the query with each point, all on one scale."""
        pairs_M2 = np.zeros((len(self.points_MP), 2), dtype=np.float32)
        pairs_M2.reshape(-1)[: len(query_D)] = query_D
        products_MP = np.einsum("mpc,mc->mp", self.points_MP, pairs_M2)
        products_MP -= products_MP.min(axis=1, keepdims=True)
        whole_MP = np.rint(products_MP * (255 / max(float(products_MP.max()), 1e-30))).astype(np.uint8)
        return np.ascontiguousarray(whole_MP.reshape(2, -1, 4, POINTS).transpose(1, 0, 2, 3))


def write_sketch(directory: Path, vectors_ND: np.ndarray, advance: Callable[[int], None] = lambda _n: None) -> None:
    """Writes the sketch of a segment's vectors; the same vectors give the same files."""
    random = np.random.default_rng(0)
    clusters = 2 ** round(np.log2(max(16, len(vectors_ND) ** 0.5)))
    chosen = np.sort(random.choice(len(vectors_ND), min(len(vectors_ND), SAMPLE * clusters), replace=False))
    sample_ND = np.ascontiguousarray(vectors_ND[chosen], dtype=np.float32)
    centroids_LD = _k_means(sample_ND, clusters, random)
    nearest_N = np.empty(len(vectors_ND), dtype=np.int32)
    for start in range(0, len(vectors_ND), BLOCK):
        part = slice(start, start + BLOCK)
        nearest_N[part] = _nearest(np.asarray(vectors_ND[part]), centroids_LD)
        advance(len(nearest_N[part]))
    order_P, starts_L = _grouped(nearest_N, clusters)
    points_MP = _points(sample_ND)
    with named(directory / "sketch.u8"), (directory / "sketch.u8").open("wb") as file:
        for start in range(0, len(order_P), BLOCK):
            rows_ND = np.asarray(vectors_ND[np.maximum(order_P[start : start + BLOCK], 0)])
            file.write(_packed(rows_ND, points_MP).tobytes())
    arrays = {"points": points_MP, "order": order_P, "centroids": centroids_LD, "starts": starts_L}
    for name, array in arrays.items():
        save_array(directory / f"sketch.{name}.npy", array)


def map_sketch(directory: Path, count: int, width: int) -> Sketch:
    """Returns the memory-mapped sketch; raises ``ValueError`` when a file is missing or does not fit the segment."""
    arrays = [load_array(directory / name) for name in FILES[1:]]
    points_MP, order_P, centroids_LD, starts_L = arrays
    shapes = {
        "sketch.points.npy": points_MP.shape == (_pairs(width), POINTS, 2),
        "sketch.order.npy": len(order_P) >= count and len(order_P) % LANES == 0,
        "sketch.centroids.npy": centroids_LD.ndim == 2 and centroids_LD.shape[1] == width,
        "sketch.starts.npy": len(starts_L) == len(centroids_LD) + 1 and starts_L[-1] * LANES == len(order_P),
    }
    for name, fits in shapes.items():
        if not fits:
            raise ValueError(f"{directory / name}: damaged, it does not fit the segment; build the index anew")
    shape = (groups_of(len(order_P)), _pairs(width) // 8, LANES, 4)
    return Sketch(map_file(directory / "sketch.u8", np.uint8, shape), points_MP, order_P, centroids_LD, starts_L)


def _pairs(width: int) -> int:
    """Returns the number of pairs of components, padded to whole steps of eight."""
    return -(-width // 16) * 8


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


def _points(sample_ND: np.ndarray) -> np.ndarray:
    """Returns float32 (M, 16, 2): for each pair of components 16 points of their plane, by k-means."""
    count, width = sample_ND.shape
    padded_NM2 = np.zeros((count, _pairs(width), 2), dtype=np.float32)
    padded_NM2.reshape(count, -1)[:, :width] = sample_ND
    points_MP = np.empty((_pairs(width), POINTS, 2), dtype=np.float32)
    for pair in range(len(points_MP)):
        values_N2 = padded_NM2[:, pair]
        angle = 2 * np.pi * np.arange(POINTS) / POINTS
        radius = values_N2.std(axis=0) * np.where(np.arange(POINTS) % 2, 0.7, 1.6)[:, None]
        points_P2 = (values_N2.mean(axis=0) + radius * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)
        for _ in range(ROUNDS):
            nearest_N = _closest(values_N2, points_P2)
            counts_P = np.bincount(nearest_N, minlength=POINTS)
            for part in range(2):
                sums_P = np.bincount(nearest_N, values_N2[:, part], minlength=POINTS)
                points_P2[counts_P > 0, part] = (sums_P / np.maximum(counts_P, 1))[counts_P > 0]
        points_MP[pair] = points_P2
    return points_MP


def _closest(values_N2: np.ndarray, points_P2: np.ndarray) -> np.ndarray:
    return (values_N2 @ (2 * points_P2.T) - (points_P2**2).sum(axis=1)).argmax(axis=1)


def _packed(rows_PD: np.ndarray, points_MP: np.ndarray) -> np.ndarray:
    """Returns uint8 (G, S, 16, 4): the nearest point of each pair, the second half of the pairs in the high bits."""
    count, width = rows_PD.shape
    padded_PM2 = np.zeros((count, len(points_MP), 2), dtype=np.float32)
    padded_PM2.reshape(count, -1)[:, :width] = rows_PD
    nearest_PM = np.empty((count, len(points_MP)), dtype=np.uint8)
    for pair, points_P2 in enumerate(points_MP):
        nearest_PM[:, pair] = _closest(padded_PM2[:, pair], points_P2)
    half = len(points_MP) // 2
    both_PH = nearest_PM[:, :half] | (nearest_PM[:, half:] << 4)
    return np.ascontiguousarray(both_PH.reshape(count // LANES, LANES, half // 4, 4).transpose(0, 2, 1, 3))
