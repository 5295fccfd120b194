"""Which examples make up the batch of a step: a pure function of (seed, step), so a resumed run needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from openembed.config import Config
from openembed.data.sources import SourceConfig
from openembed.seeds import generator

Kind = Literal["blended", "homogeneous"]
"""``blended`` mixes all sources in every batch (NV-Embed), ``homogeneous`` fills each batch from one source."""


class Phase(Config):
    """A way of mixing that holds up to the share ``until`` of all steps: ``{ until = 0.5, kind = "homogeneous" }``."""

    kind: Kind
    until: float = Field(default=1.0, gt=0, le=1)


class MixtureConfig(Config):
    """The sources and how they share batches: one kind of mixing, or a schedule of phases over the steps."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    mixing: Kind | tuple[Phase, ...] = "blended"

    @model_validator(mode="after")
    def _distinct_names(self) -> MixtureConfig:
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"source names must differ; repeated: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _whole_schedule(self) -> MixtureConfig:
        if not isinstance(self.mixing, str):
            ends = [phase.until for phase in self.mixing]
            if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
                raise ValueError(f"the phases of mixing must rise and end at 1 (leave out the last until); until: {ends}")
        return self

    def rows_per_epoch(self, sizes: Sequence[int]) -> int:
        """Returns how many rows one epoch has: of each source its size times its weight, at most its cap."""
        return int(_shares(self.sources, sizes).sum())

    def build(self, sizes: Sequence[int], *, steps: int, batch: int, accumulation: int = 1, seed: int = 0) -> Mixture:
        """Returns the order of the examples of sources with ``sizes``, over ``steps`` of ``accumulation`` batches."""
        phases = (Phase(kind=self.mixing),) if isinstance(self.mixing, str) else self.mixing
        schedule = [(round(phase.until * steps) * accumulation, phase.kind) for phase in phases]
        return Mixture(sizes, _shares(self.sources, sizes).tolist(), schedule=schedule, batch=batch, seed=seed)


def _shares(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> np.ndarray:
    """int64 (S,): the rows each source has in a round."""
    exact = [size * source.weight for size, source in zip(sizes, sources, strict=True)]
    return np.array([max(1, min(round(e), s.cap or round(e))) for e, s in zip(exact, sources, strict=True)], dtype=np.int64)


class Mixture:
    """An endless, seeded order over several sources.

    A *round* draws ``shares[s]`` rows of every source s in random order, or whole batches of about as many. Row number n
    of a source is entry ``n mod size`` of the source's permutation for its epoch ``n div size``: each example is drawn
    exactly once an epoch, whatever the shares, and across the phases of a schedule. ``schedule`` has, for each phase,
    the number of the first batch after it and its kind; the last phase has no end.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[int],
        *,
        schedule: Sequence[tuple[int, Kind]] = ((0, "blended"),),
        batch: int,
        seed: int,
    ) -> None:
        if not sizes or min(sizes) < 1 or min(shares) < 1:
            raise ValueError(f"every source needs examples and a share of a round; sizes {sizes}, shares {shares}")
        self.sizes, self.batch, self.seed = tuple(sizes), batch, seed
        self.ends = [end for end, _ in schedule[:-1]]
        self._orders = [_Order(shares, batch if kind == "homogeneous" else 1, seed, n) for n, (_, kind) in enumerate(schedule)]
        self._starts = [0, *self.ends]
        self._before = [np.zeros(len(sizes), dtype=np.int64)]
        for start, end, order in zip(self._starts[:-1], self.ends, self._orders[:-1], strict=True):
            self._before.append(self._before[-1] + order.drawn((end - start) * batch))
        self._permutation = lru_cache(maxsize=2 * len(sizes))(self._compute_permutation)

    @property
    def rows_per_round(self) -> int:
        """How many rows one round of the last phase has: about one epoch of the whole mixture."""
        return self._orders[-1].rows

    def rows(self, step: int) -> list[tuple[int, int]]:
        """Returns ``batch`` pairs (source, example) for batch ``step`` = 0, 1, ...; the same on every call and machine."""
        phase = sum(step >= end for end in self.ends)
        first = (step - self._starts[phase]) * self.batch
        return [self._row(phase, first + place) for place in range(self.batch)]

    def _row(self, phase: int, position: int) -> tuple[int, int]:
        source, nth = self._orders[phase].draw(position)
        epoch, entry = divmod(int(self._before[phase][source]) + nth, self.sizes[source])
        return source, int(self._permutation(source, epoch)[entry])

    def _compute_permutation(self, source: int, epoch: int) -> np.ndarray:
        return generator(self.seed, "epoch", source, epoch).permutation(self.sizes[source])


class _Order:
    """Which source each row of a phase comes from, in draws of ``unit`` rows: single rows, or whole batches."""

    def __init__(self, shares: Sequence[int], unit: int, seed: int, phase: int) -> None:
        self.unit, self.seed, self.phase = unit, seed, phase
        self.draws = np.array([max(1, round(share / unit)) for share in shares], dtype=np.int64)
        self.rows = int(self.draws.sum()) * unit
        self._round = lru_cache(maxsize=2)(self._compute_round)

    def draw(self, position: int) -> tuple[int, int]:
        """Returns the source of a row, and how many rows of that source the phase had before it."""
        draw, within = divmod(position, self.unit)
        number, place = divmod(draw, int(self.draws.sum()))
        sources, occurrences = self._round(number)
        source = int(sources[place])
        return source, (number * int(self.draws[source]) + int(occurrences[place])) * self.unit + within

    def drawn(self, positions: int) -> np.ndarray:
        """int64 (S,): how many of the phase's first ``positions`` rows, a whole number of units, each source has."""
        number, place = divmod(positions // self.unit, int(self.draws.sum()))
        sources, _ = self._round(number)
        return (number * self.draws + np.bincount(sources[:place], minlength=len(self.draws))) * self.unit

    def _compute_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each draw of a round, and which draw of that source it is."""
        sources = np.repeat(np.arange(len(self.draws), dtype=np.int32), self.draws)
        purpose = (number,) if self.phase == 0 else (number, self.phase)
        generator(self.seed, "round", *purpose).shuffle(sources)
        occurrences = np.empty(len(sources), dtype=np.int64)
        for source in range(len(self.draws)):
            places = np.flatnonzero(sources == source)
            occurrences[places] = np.arange(len(places))
        return sources, occurrences
