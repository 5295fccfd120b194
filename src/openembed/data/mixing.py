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


class MixtureConfig(Config):
    """The sources and how they share batches: ``blended`` mixes all in every batch, ``homogeneous`` fills each batch
    from one source."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    mixing: Literal["blended", "homogeneous"] = "blended"

    @model_validator(mode="after")
    def _distinct_names(self) -> MixtureConfig:
        names = [source.name for source in self.sources]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"source names must differ; repeated: {', '.join(repeated)}")
        return self


class Mixture:
    """An endless, seeded order over several sources.

    A *round* draws ``size · weight`` examples (at least one) of every source in random order, so sources take part in
    proportion to size and weight. Draw number n of a source is entry ``n mod size`` of the source's permutation for its
    epoch ``n div size``: each example is drawn exactly once an epoch, whatever the weights.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        mixing: Literal["blended", "homogeneous"] = "blended",
        batch: int,
        seed: int,
    ) -> None:
        if not sizes or min(sizes) < 1 or min(weights) <= 0:
            raise ValueError(f"every source needs examples and a positive weight; sizes {sizes}, weights {weights}")
        self.sizes, self.batch, self.seed = tuple(sizes), batch, seed
        self._unit = batch if mixing == "homogeneous" else 1
        shares = [size * weight / self._unit for size, weight in zip(sizes, weights, strict=True)]
        self._draws = np.array([max(1, round(share)) for share in shares])
        self._round = lru_cache(maxsize=2)(self._compute_round)
        self._permutation = lru_cache(maxsize=2 * len(sizes))(self._compute_permutation)

    @property
    def rows_per_round(self) -> int:
        """How many rows one round has: about one epoch of the whole mixture."""
        return int(self._draws.sum()) * self._unit

    def rows(self, step: int) -> list[tuple[int, int]]:
        """Returns ``batch`` pairs (source, example) for ``step`` = 0, 1, ...; the same on every call and machine."""
        return [self._row(step * self.batch + place) for place in range(self.batch)]

    def _row(self, position: int) -> tuple[int, int]:
        draw, within = divmod(position, self._unit)
        number, place = divmod(draw, int(self._draws.sum()))
        sources, occurrences = self._round(number)
        source = int(sources[place])
        nth = (number * int(self._draws[source]) + int(occurrences[place])) * self._unit + within
        epoch, entry = divmod(nth, self.sizes[source])
        return source, int(self._permutation(source, epoch)[entry])

    def _compute_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each draw of a round, and which draw of that source it is."""
        sources = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self._draws)
        generator(self.seed, "round", number).shuffle(sources)
        occurrences = np.empty(len(sources), dtype=np.int64)
        for source in range(len(self.sizes)):
            places = np.flatnonzero(sources == source)
            occurrences[places] = np.arange(len(places))
        return sources, occurrences

    def _compute_permutation(self, source: int, epoch: int) -> np.ndarray:
        return generator(self.seed, "epoch", source, epoch).permutation(self.sizes[source])
