"""Approximate search of a large segment: clusters that are worth looking into, scanned as four bits for a few components.

Vectors are grouped by nearest centroid (k-means), and both they and the centroids are coded (see ``quantizer``). A first
look-up finds the clusters near the query, a second scans them, and the best documents by that count are then scored exactly.
What is missed is missed because its cluster is not among the near ones, or its code is poor; the scores of what is found are
exact.

N documents, P places in the order of the clusters (padded to whole groups of 16), G groups, L clusters, D width, R ranges of
groups, S steps of eight parts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from openembed.index.codes import LANES, groups_of, in_parallel, sketch_argument
from openembed.index.native import scan_library, threads
from openembed.index.quantizer import POINTS, Coder, aligned, parts_of, sketch_scores, trained
from openembed.index.strings import load_array, map_file, named, save_array

REACH = 0.13
"""A cluster is scanned when its product with the query is this far from the mean of all clusters to the best of them.

So an easy question looks at less than a hard one: a quarter of a million real passages on average. See docs/index.md.
"""
LEAST_SHARE = 0.05
LEAST_TIMES = 4
"""This share of the documents is scanned at least, and this many for each of the candidates to be scored exactly."""
RESCORED = 16
"""Candidates scored exactly for each of the k wanted, and at least ``LEAST``."""
LEAST = 320
VERSION = 2
"""Which sketches this module reads: a segment with those of another version is searched exactly until it is compacted."""
THREADED = 4_096
"""Groups that are worth a thread."""
SAMPLE = 40
ROUNDS = 6
BLOCK = 16_384
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
class Sketch:
    """What is on disk of a segment: ``codes_GS`` (G, S, 16, 4), ``order_P`` (-1: padding), how they were coded.

    ``centroids_GS``: the codes of the clusters, and the group at which each of them starts, ``starts_L`` (L + 1).
    """

    codes_GS: np.ndarray
    coder: Coder
    order_P: np.ndarray
    centroids_GS: np.ndarray
    starts_L: np.ndarray
    _counted: tuple[np.ndarray, int] | None = None

    @cached_property
    def _loaded_GS(self) -> np.ndarray:
        """The codes in memory of their own: scanned twice as fast as a mapped file, for 48 bytes a document of width 256."""
        return aligned(self.codes_GS)

    @cached_property
    def _clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """The codes of the clusters in memory of their own, and int64 (L, 2): which groups are theirs."""
        return aligned(self.centroids_GS), np.stack([self.starts_L[:-1], self.starts_L[1:]], axis=1)

    def candidates(self, query_D: np.ndarray, eligible_N: np.ndarray, k: int) -> np.ndarray:
        """Returns positions of eligible documents that are likely the k of greatest product with the query."""
        wanted, tables = max(RESCORED * k, LEAST), self.coder.tables(query_D)
        ranges, some = self._near(tables, wanted), self.eligible(eligible_N) < len(eligible_N)
        parts = min(threads(), max(1, int((ranges[:, 1] - ranges[:, 0]).sum()) // THREADED))
        shape = (parts, 2 * wanted + LANES)
        found, sums = np.empty(shape, dtype=np.int32), np.empty(shape, dtype=np.float32)

        def run(number: int) -> int:
            given = sketch_argument(self._loaded_GS, ranges[number::parts], self.order_P, eligible_N, some)
            taken = (found[number].ctypes.data, sums[number].ctypes.data)
            return scan_library().openembed_sketch_scan(given.pointer, tables.ctypes.data, wanted, *taken)

        filled = np.array(in_parallel(run, parts))
        if (filled < 0).any():
            raise MemoryError("no memory for the candidates of a search")
        held = np.arange(shape[1]) < filled[:, None]
        best = found[held]
        return best if len(best) <= wanted else best[np.argpartition(sums[held], -wanted)[-wanted:]]

    def eligible(self, eligible_N: np.ndarray) -> int:
        """Returns how many documents the mask leaves; of the last one it is known, being most often the next."""
        last = self._counted
        if last is None or last[0] is not eligible_N:
            last = self._counted = eligible_N, int(np.count_nonzero(eligible_N))
        return last[1]

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
    coder = trained(sample_ND)
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
    steps, clusters = parts_of(width) // 8, len(starts_L) - 1
    shapes = {
        "sketch.points.npy": points_MPC.shape == (parts_of(width), POINTS, parts_MC.shape[-1]),
        "sketch.parts.npy": len(parts_MC) == parts_of(width) and int(parts_MC.max()) < width,
        "sketch.order.npy": order_P.dtype == np.int32 and len(order_P) >= count and len(order_P) % LANES == 0,
        "sketch.centroids.npy": centroids_GS.shape == (groups_of(clusters), steps, LANES, 4),
        "sketch.starts.npy": clusters > 0 and starts_L[-1] * LANES == len(order_P),
    }
    for name, fits in shapes.items():
        if not fits:
            raise ValueError(f"{directory / name}: damaged, it does not fit the segment; build the index anew")
    codes_GS = map_file(directory / "sketch.u8", np.uint8, (groups_of(len(order_P)), steps, LANES, 4))
    return Sketch(codes_GS, Coder(parts_MC, points_MPC), order_P, centroids_GS, starts_L)


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
