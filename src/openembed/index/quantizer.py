"""Vectors as four bits for a few components at a time, and their products with a query by look-up: a product quantizer.

The components are dealt out to parts, so that each part varies about as much as the others: one that varies much has a part of
its own or shares it with few, those that hardly vary are many to a part. Each part of a vector is coded as one of 16 points.
A query's product with a vector is then a sum of M table entries, which the library looks up.

N vectors, P vectors padded to whole groups of 16, G groups, D width, M parts, C components of the largest part, S steps of
eight parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openembed.index.codes import LANES
from openembed.index.native import scan_library

ROUNDS = 6
POINTS = 16
SAMPLE = 50_000
LINE = 64


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
        return aligned(whole_MP.reshape(2, -1, 4, POINTS).transpose(1, 0, 2, 3))

    def coded(self, rows_PD: np.ndarray) -> np.ndarray:
        """Returns uint8 (G, S, 16, 4): the nearest point of each part, the second half of the parts in the high bits."""
        nearest_PM = np.empty((len(rows_PD), len(self.parts_MC)), dtype=np.uint8)
        for part, (components_C, points_PC) in enumerate(zip(self.parts_MC, self.points_MPC, strict=True)):
            nearest_PM[:, part] = _closest(rows_PD[:, components_C], points_PC)
        half = len(self.parts_MC) // 2
        both_PH = nearest_PM[:, :half] | (nearest_PM[:, half:] << 4)
        return np.ascontiguousarray(both_PH.reshape(-1, LANES, half // 4, 4).transpose(0, 2, 1, 3))


def sketch_scores(codes_GS: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Returns int32 (P): for each code the sum of its entries in the tables, which grows as the product does."""
    scores_P = np.empty(len(codes_GS) * LANES, dtype=np.int32)
    sizes = (len(codes_GS), codes_GS.shape[1])
    scan_library().openembed_sketch_scores(codes_GS.ctypes.data, tables.ctypes.data, *sizes, scores_P.ctypes.data)
    return scores_P


def aligned(array: np.ndarray) -> np.ndarray:
    """Returns a copy at a whole line of the cache; one that begins within a line takes a fifth longer to scan."""
    room = np.empty(array.nbytes + LINE, dtype=np.uint8)
    start = -room.ctypes.data % LINE
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def parts_of(width: int) -> int:
    """Returns the number of parts: six bits for four components, in whole steps of eight."""
    return -(-3 * width // 64) * 8


def trained(sample_ND: np.ndarray) -> Coder:
    """Returns parts of about equal variation, and for each 16 points by k-means; the same sample gives the same ones."""
    sample_ND = sample_ND[:: -(-len(sample_ND) // SAMPLE)]
    dealt = _dealt(sample_ND.var(axis=0), parts_of(sample_ND.shape[1]))
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
