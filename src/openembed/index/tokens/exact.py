"""Exact MaxSim: every document is looked at, none is lost, and of those that may be best the scores are summed in float64.

The score of a document is the sum, over the query's tokens, of the greatest dot product with one of its tokens (ColBERT,
arXiv 2004.12832). A first pass over one byte a component bounds every document's score; whoever may be among the k best is
scored exactly, where again codes and bounds leave only a few pairs of tokens to multiply in float64. So a score does not depend
on how it was found, and equal documents tie. A document without tokens has the score -inf and is never found.

Q queries, N documents, C chosen documents, T tokens of documents, D width.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from openembed.index.codes import in_parallel
from openembed.index.native import threads
from openembed.index.tokens.coding import CodedRows, Panel, code_rows, document_bounds
from openembed.index.tokens.native import address, check, structure, token_library
from openembed.token_vectors import TokenVectors

FIRST = 16
"""At least so many documents are scored exactly to learn what the others must reach."""
TOGETHER = 16
"""Queries scanned at once: their codes stay in the nearest cache."""
ROOM = 4_000_000
"""Scores held at once, over all queries."""
THREADED, RESCORED = 32_768, 8_192
"""Tokens to scan, and of documents to score exactly, that are worth a thread."""
BLOCK = 16_384
"""Tokens multiplied at once where there is no compiled kernel."""

TokensStructure = structure("Tokens", "codes scale bounds values offsets", "stride width half")


@dataclass
class TokenMatrix:
    """The tokens of a segment: ``values_TD`` float16 or float32, their codes, and float32 bounds (N, 2) of each document.

    Arrays may be memory-mapped files.
    """

    values_TD: np.ndarray
    offsets_N1: np.ndarray
    codes_TS: np.ndarray
    scale_T: np.ndarray
    bounds_N2: np.ndarray

    @classmethod
    def of(cls, vectors: TokenVectors) -> TokenMatrix:
        """Returns vectors with their codes, in memory; float16 and float32 stay what they are."""
        values_TD = vectors.values_TD
        values_TD = np.ascontiguousarray(values_TD, np.float16 if values_TD.dtype == np.float16 else np.float32)
        rows: CodedRows = code_rows(values_TD.astype(np.float32))
        offsets_N1 = np.ascontiguousarray(vectors.offsets_N1, dtype=np.int64)
        return cls(values_TD, offsets_N1, rows.codes_TS, rows.scale_T, document_bounds(rows, offsets_N1))

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    def bounded(self, panel: Panel, documents_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns scores (Q, C) and how far each may be off; ``documents_C`` ascending."""
        error_C, norm_C = self.bounds_N2[documents_C].astype(np.float64).T
        norm_Q = panel.sums(panel.norm_L)
        rounding_Q = (1e-6 + 1.2e-7 * np.diff(panel.offsets)) * norm_Q  # of the sum, and of exact scores to float32
        library = token_library()
        if library is not None:
            parts = self._divided(documents_C, THREADED)
            found = [np.empty((panel.count, len(part)), dtype=np.float32) for part in parts]

            def run(number: int) -> int:
                documents = address(parts[number]), len(parts[number])
                return library.openembed_tokens_scan(self.pointer, panel.pointer, *documents, address(found[number]))

            check(max(in_parallel(run, len(parts))))
            scores_QC = found[0] if len(found) == 1 else np.concatenate(found, axis=1)
            inner_Q, outer_Q = panel.sums(panel.inner_L), panel.sums(panel.outer_L)
        else:
            scores_QC = self._multiply(panel, documents_C)
            inner_Q, outer_Q = 0.0 * norm_Q, self.values_TD.shape[1] * 1.2e-7 * norm_Q
        slack_QC = inner_Q[:, None] * error_C + (outer_Q + rounding_Q)[:, None] * norm_C + 1e-29 * panel.lanes
        return scores_QC, slack_QC

    def exact(self, panel: Panel, documents_C: np.ndarray) -> np.ndarray:
        """Returns float32 (C,): the exact scores of documents for the one query of the panel, in any order."""
        library = token_library()
        if library is not None:
            parts = self._divided(documents_C, RESCORED)
            found = [np.empty(len(part), dtype=np.float32) for part in parts]

            def run(number: int) -> int:
                documents = address(parts[number]), len(parts[number])
                return library.openembed_tokens_exact(self.pointer, panel.pointer, *documents, address(found[number]))

            check(max(in_parallel(run, len(parts))))
            return np.concatenate(found)
        scores_C = np.empty(len(documents_C), dtype=np.float32)
        query_LD = panel.values_LD.astype(np.float64)
        for place, document in enumerate(documents_C):
            low, high = self.offsets_N1[document : document + 2]
            products = query_LD @ self.values_TD[low:high].astype(np.float64).T
            scores_C[place] = products.max(axis=1).sum() if high > low else -np.inf
        return scores_C

    def products(self, panel: Panel, lanes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Returns float32: the products of pairs (token of a query, token of a document), summed in float64."""
        scores, library = np.empty(len(tokens), dtype=np.float32), token_library()
        lanes, tokens = np.ascontiguousarray(lanes, np.int64), np.ascontiguousarray(tokens, np.int64)
        if library is not None:
            pairs = address(lanes), address(tokens), len(tokens), address(scores)
            check(library.openembed_tokens_products(self.pointer, panel.pointer, *pairs))
            return scores
        for start in range(0, len(tokens), 4096):
            part = slice(start, start + 4096)
            values_TD = self.values_TD[tokens[part]].astype(np.float64)
            scores[part] = (values_TD * panel.values_LD[lanes[part]]).sum(axis=1)
        return scores

    @cached_property
    def _structure(self) -> TokensStructure:
        self.values_TD, self.codes_TS = map(np.ascontiguousarray, (self.values_TD, self.codes_TS))
        arrays = self.codes_TS, self.scale_T, self.bounds_N2, self.values_TD, self.offsets_N1
        sizes = self.codes_TS.shape[1], self.values_TD.shape[1], self.values_TD.dtype == np.float16
        return TokensStructure(*map(address, arrays), *sizes)

    @property
    def pointer(self) -> object:
        """What a call is given."""
        return byref(self._structure)

    def _divided(self, documents_C: np.ndarray, tokens: int) -> list[np.ndarray]:
        """Returns the documents in parts, one a thread, each of so many tokens at least."""
        documents_C = np.ascontiguousarray(documents_C, dtype=np.int64)
        total = int(np.diff(self.offsets_N1)[documents_C].sum()) if threads() > 1 else 0
        return np.array_split(documents_C, min(threads(), max(1, total // tokens)))

    def _multiply(self, panel: Panel, documents_C: np.ndarray) -> np.ndarray:
        """Returns float32 scores (Q, C), whole documents of about ``BLOCK`` tokens at a time."""
        scores_QC = np.empty((panel.count, len(documents_C)), dtype=np.float32)
        lengths_C = np.diff(self.offsets_N1)[documents_C]
        scores_QC[:, lengths_C == 0] = -np.inf
        full = np.flatnonzero(lengths_C)
        for part in np.split(full, np.flatnonzero(np.diff(np.cumsum(lengths_C[full]) // BLOCK)) + 1):
            if not len(part):
                continue
            rows = [np.arange(self.offsets_N1[d], self.offsets_N1[d + 1]) for d in documents_C[part]]
            products_LT = panel.values_LD @ self.values_TD[np.concatenate(rows)].astype(np.float32).T
            starts = np.concatenate([[0], np.cumsum(lengths_C[part])[:-1]])
            best_LC = np.maximum.reduceat(products_LT, starts, axis=1)
            totals = np.concatenate([np.zeros((1, len(part))), np.cumsum(best_LC, axis=0, dtype=np.float64)])
            scores_QC[:, part] = totals[panel.offsets[1:]] - totals[panel.offsets[:-1]]
        return scores_QC


def best_documents(
    matrices: list[TokenMatrix], eligible: list[np.ndarray], queries: TokenVectors, k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for each query (positions, exact scores) of a superset of the k eligible documents of greatest score.

    Positions count through the matrices. ``eligible``: a mask of documents for each. Several queries at once take less time
    than one after the other: no lane of the kernel stays empty, and codes are read once.
    """
    starts = np.cumsum([0, *map(len, matrices)])
    chosen = [np.flatnonzero(mask_N & (np.diff(m.offsets_N1) > 0)) for m, mask_N in zip(matrices, eligible, strict=True)]
    positions = np.concatenate([documents + start for documents, start in zip(chosen, starts, strict=False)] or [starts[:0]])
    found, step = [], max(1, min(TOGETHER, ROOM // max(1, len(positions))))
    for first in range(0, len(queries), step):
        part = queries.select(range(first, min(first + step, len(queries))))
        if len(positions) <= max(2 * k, FIRST):
            found += [(positions, exact_scores(matrices, Panel(part.select([n])), positions)) for n in range(len(part))]
            continue
        panel = Panel(part)
        bounded = [matrix.bounded(panel, documents) for matrix, documents in zip(matrices, chosen, strict=True)]
        scores_QC, slack_QC = (np.concatenate([pair[n] for pair in bounded], axis=1) for n in range(2))
        for number, (scores_C, slack_C) in enumerate(zip(scores_QC, slack_QC, strict=True)):
            alone = panel if len(part) == 1 else Panel(part.select([number]))
            found.append(_settled(matrices, alone, positions, (scores_C, slack_C), k))
    return found


def _settled(
    matrices: list[TokenMatrix], panel: Panel, positions: np.ndarray, bounded: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (positions, exact scores) of all that may be among the k best, by scores and how far each may be off."""
    scores_C, slack_C = bounded
    count = max(2 * k, FIRST)
    first = np.argpartition(-scores_C, count - 1)[:count]
    found = exact_scores(matrices, panel, positions[first])
    floor = np.partition(found, count - k)[count - k]
    others = scores_C + slack_C >= floor
    others[first] = False
    rest = positions[others]
    return np.concatenate([positions[first], rest]), np.concatenate([found, exact_scores(matrices, panel, rest)])


def exact_scores(matrices: list[TokenMatrix], panel: Panel, positions: np.ndarray) -> np.ndarray:
    """Returns float32: the exact scores of documents, whose positions count through the matrices, in any order."""
    scores, start = np.empty(len(positions), dtype=np.float32), 0
    for matrix in matrices:
        inside = np.flatnonzero((positions >= start) & (positions < start + len(matrix)))
        if len(inside):
            scores[inside] = matrix.exact(panel, positions[inside] - start)
        start += len(matrix)
    return scores
