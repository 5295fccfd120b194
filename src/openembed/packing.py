"""Texts laid end to end: token rows, length-sorted micro-batches and one flat ``(tokens,)`` stream without padding.

Shapes: ``B`` texts, ``T`` tokens of all texts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Token ids of each text, and where its pooled part starts (tokens before that are seen but not pooled).

    ``queries`` (bool): which texts are encoded as queries, where the encoder treats them differently; None: none.
    ``unattended`` (int64): how many tokens at the end of each text no token attends to, themselves included (ColBERT's query
    expansion); None: none.
    """

    ids: list[np.ndarray]
    pool_starts: np.ndarray
    queries: np.ndarray | None = None
    unattended: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, ``(N,)``."""
        return np.fromiter((len(row) for row in self.ids), dtype=np.int64, count=len(self.ids))

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenRows:
        """Returns the rows at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        queries, unattended = (None if x is None else x[chosen] for x in (self.queries, self.unattended))
        return TokenRows([self.ids[i] for i in chosen], self.pool_starts[chosen], queries, unattended)

    @staticmethod
    def concat(parts: Sequence[TokenRows]) -> TokenRows:
        """Returns the rows of all parts, which are of one encoder, one part after the other."""
        queries = None if parts[0].queries is None else np.concatenate([part.queries for part in parts])
        unattended = None
        if any(part.unattended is not None for part in parts):
            unattended = np.concatenate([np.zeros(len(p), np.int64) if p.unattended is None else p.unattended for p in parts])
        starts = np.concatenate([part.pool_starts for part in parts])
        return TokenRows([row for part in parts for row in part.ids], starts, queries, unattended)

    def micro_batches(self, token_budget: int, most_texts: int | None = None) -> list[np.ndarray]:
        """Returns :func:`micro_batches` of these rows; none holds queries and documents at once."""
        if self.queries is None:
            return micro_batches(self.lengths, token_budget, most_texts)
        sides = [np.flatnonzero(self.queries == side) for side in (False, True)]
        return [side[group] for side in sides for group in micro_batches(self.lengths[side], token_budget, most_texts)]


@dataclass(frozen=True)
class Run:
    """A stretch of neighbouring texts of equal length: ``count`` texts of ``length`` tokens from position ``start``."""

    start: int
    length: int
    count: int

    @property
    def stop(self) -> int:
        """The position after the last token of the stretch."""
        return self.start + self.length * self.count


@dataclass(frozen=True)
class Layout:
    """Where each text lies in the flat stream; what attention and pooling need to keep texts apart."""

    offsets_B1: Tensor
    """Cumulative lengths with a leading 0, int32, ``(B + 1,)``: text ``i`` is ``offsets[i]:offsets[i + 1]``."""
    runs: tuple[Run, ...]
    max_length: int
    attended_B: Tensor | None = None
    """How many tokens from a text's start are attended to, int64, where that is not all of them in every text."""


@dataclass(frozen=True)
class Packed:
    """One micro-batch: the token ids of ``B`` texts end to end, with their positions and layout.

    ``rows``: what was packed, as arrays, for what depends on ids alone. ``query``: all texts are encoded as queries, where the
    encoder treats these differently.
    """

    ids_T: Tensor
    positions_T: Tensor
    pool_starts_B: Tensor
    layout: Layout
    rows: TokenRows
    query: bool = False

    @property
    def lengths_B(self) -> Tensor:
        """Number of tokens of each text, int64."""
        return self.layout.offsets_B1.diff().long()

    @property
    def pool_mask_T(self) -> Tensor:
        """True where a token is pooled: at or after its text's pool start."""
        starts_T = torch.repeat_interleave(self.pool_starts_B, self.lengths_B, output_size=len(self.ids_T))
        return self.positions_T >= starts_T

    def __len__(self) -> int:
        return len(self.pool_starts_B)


def pack(rows: TokenRows, indices: Sequence[int] | np.ndarray | None = None, device: torch.device | str = "cpu") -> Packed:
    """Returns the chosen rows as one flat stream on ``device``.

    Raises ``ValueError`` when nothing is chosen, a row is empty, or queries and documents are chosen together.
    """
    chosen = range(len(rows)) if indices is None else [int(i) for i in indices]
    ids = [rows.ids[i] for i in chosen]
    lengths = np.fromiter((len(row) for row in ids), dtype=np.int64, count=len(ids))
    if len(ids) == 0 or lengths.min() == 0:
        raise ValueError("cannot pack: " + ("no rows were chosen" if len(ids) == 0 else "a row has no tokens"))
    sides = {False} if rows.queries is None else {bool(rows.queries[i]) for i in chosen}
    if len(sides) > 1:
        raise ValueError("cannot pack queries and documents together; take groups of TokenRows.micro_batches")
    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    positions = np.arange(offsets[-1], dtype=np.int64) - np.repeat(offsets[:-1].astype(np.int64), lengths)
    attended_B = None
    if rows.unattended is not None and rows.unattended[np.asarray(chosen)].any():
        attended_B = torch.from_numpy(lengths - rows.unattended[np.asarray(chosen)]).to(device)
    layout = Layout(torch.from_numpy(offsets).to(device), _runs(lengths), int(lengths.max()), attended_B)
    return Packed(
        ids_T=torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
        positions_T=torch.from_numpy(positions).to(device),
        pool_starts_B=torch.from_numpy(rows.pool_starts[np.asarray(chosen)].astype(np.int64)).to(device),
        layout=layout,
        rows=rows if indices is None else rows.select(chosen),
        query=sides.pop(),
    )


def _runs(lengths: np.ndarray) -> tuple[Run, ...]:
    runs, start = [], 0
    edges = np.flatnonzero(np.diff(lengths)) + 1
    for group in np.split(lengths, edges):
        runs.append(Run(start, int(group[0]), len(group)))
        start = runs[-1].stop
    return tuple(runs)


def micro_batches(lengths: np.ndarray, token_budget: int, most_texts: int | None = None) -> list[np.ndarray]:
    """Returns groups of indices, longest texts first, each with at most ``token_budget`` tokens (or one longer text).

    ``most_texts``: a group has no more; None: as many as the tokens allow.

    Sorting by length puts equal lengths side by side, which attention then computes in one call; the order is a pure
    function of ``lengths`` (ties keep their input order).
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups: list[np.ndarray] = []
    first, filled = 0, 0
    for position, index in enumerate(order):
        length = int(lengths[index])
        if filled and (filled + length > token_budget or position - first == most_texts):
            groups.append(order[first:position])
            first, filled = position, 0
        filled += length
    if filled:
        groups.append(order[first:])
    return groups
