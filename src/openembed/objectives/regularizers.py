"""Penalties on weights over the vocabulary: what keeps learned sparse representations sparse, and short posting lists short.

All are taken in fp32 over the distinct queries, or the distinct documents, of a batch: positives and negatives of all rows in
one mean. A published λ belongs to its own mean. The HF trainer of naver/splade and sentence-transformers take ours, so theirs
carry over as they are. naver's first trainer adds a mean of positives and a mean of negatives: about twice our value, so take
twice its λ. OpenSearch adds one mean a document slot: with N documents a query take N times its λ.

Shapes: M texts of a side, Q queries, N documents, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from openembed.config import Config
from openembed.data.batch import Batch
from openembed.objectives import Views, every_text
from openembed.representations import Representation, Sparse

ZERO_FLOOR = 1e-6
"""Keeps the anti-zero term and its gradient finite where every weight is 0."""


class _Scheduled(Config):
    """What every penalty has: λ is ``weight``, reached by ``weight`` · (t / ``steps``)², t the optimizer steps done.

    ``side``: whose weights are penalised; ``both`` adds the penalty of each.
    """

    weight: float = Field(gt=0)
    side: Literal["query", "document", "both"] = "document"
    steps: int = Field(0, ge=0)

    def factor(self, step: int) -> float:
        """Returns λ after ``step`` steps: 0 for the first one where there is a warm-up."""
        return self.weight if step >= self.steps else self.weight * (step / self.steps) ** 2


class FlopsConfig(_Scheduled):
    """``Σ_j ((1/M) Σ_m w_mj)²``: the smooth form of the expected number of products (Paria et al., 2020; SPLADE).

    ``threshold``: texts with at most so many weights above 0 are left alone (OpenSearch's ℓ0 mask, arXiv 2504.14839); the mean
    is still over M. ``idf``: a file of one value a term, as an ``idf`` stage writes it; the square of each term's mean is then
    divided by the square of its value, so that common terms are the dear ones. With queries that are bags of words this is the
    IDF-aware penalty of arXiv 2411.04403 written as a loss; the same model is trained by queries weighted by idf and this
    penalty without it, which is how it was published.
    """

    kind: Literal["flops"] = "flops"
    threshold: int | None = Field(None, ge=0)
    idf: str | None = None

    def build(self) -> Flops:
        """Returns the penalty; ``ValueError`` when ``idf`` is no table."""
        return Flops(self)


class L1Config(_Scheduled):
    """``(1/M) Σ_m Σ_j w_mj``: shortens every text alike; used on queries (efficient SPLADE)."""

    kind: Literal["l1"] = "l1"

    def build(self) -> L1:
        """Returns the penalty."""
        return L1()


class AntiZeroConfig(_Scheduled):
    """``1 / (Σ_m Σ_j w_mj)²``: against the collapse to vectors of zeros (naver/splade's HF trainer)."""

    kind: Literal["anti_zero"] = "anti_zero"
    side: Literal["query", "document", "both"] = "both"

    def build(self) -> AntiZero:
        """Returns the penalty."""
        return AntiZero()


class DfFlopsConfig(_Scheduled):
    """FLOPS with each term weighted by how many texts have it (arXiv 2505.15070): long posting lists are the dear ones.

    The weight of a share x of texts is ``1 / (1 + (x^(log 2 / log alpha) - 1)^beta)``: 1/2 at ``alpha``, the steeper the larger
    ``beta``. Shares are counted over the batches of ``refresh`` steps and used in the next ones; until the first are known all
    weights are 1. The paper counts over a validation set every 100 steps, and writes ``(Σ)²/M`` for our ``(Σ/M)²``: divide its
    λ by M.
    """

    kind: Literal["df_flops"] = "df_flops"
    alpha: float = Field(0.1, gt=0, lt=1)
    beta: float = Field(10.0, gt=0)
    refresh: int = Field(100, ge=1)

    def build(self) -> DfFlops:
        """Returns the penalty."""
        return DfFlops(self)


RegularizerConfig = Annotated[FlopsConfig | L1Config | AntiZeroConfig | DfFlopsConfig, Field(discriminator="kind")]


class Regularized(Config):
    """The part of an objective's settings that penalises weights over the vocabulary; sparse heads alone have any."""

    regularizers: tuple[RegularizerConfig, ...] = ()


class Penalty(Protocol):
    """A penalty of one side."""

    def __call__(self, weights_MV: Tensor, step: int) -> Tensor:
        """Returns the penalty of these texts (fp32, at least 0), a scalar."""

    def state(self) -> dict[str, Tensor]:
        """Returns what it remembers of earlier steps."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what :meth:`state` gave."""


class _Forgetful:
    """A penalty that remembers nothing."""

    def state(self) -> dict[str, Tensor]:
        """Returns nothing."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Has nothing to take back."""


class Flops(_Forgetful):
    """See :class:`FlopsConfig`."""

    def __init__(self, config: FlopsConfig) -> None:
        self.threshold = config.threshold
        self._price_V = None if config.idf is None else torch.from_numpy(read_idf(config.idf)).double().square().reciprocal()

    def __call__(self, weights_MV: Tensor, step: int) -> Tensor:
        """Returns the sum over terms of the squared mean weight."""
        if self.threshold is not None:
            weights_MV = weights_MV * ((weights_MV > 0).sum(1, keepdim=True) > self.threshold)
        squares_V = weights_MV.mean(0).square()
        if self._price_V is None:
            return squares_V.sum()
        if len(self._price_V) > len(squares_V):
            raise ValueError(
                f"idf of {len(self._price_V)} terms for a vocabulary of {len(squares_V)}; build it with this tokenizer"
            )
        return (squares_V[: len(self._price_V)] * self._price_V.to(squares_V)).sum() + squares_V[len(self._price_V) :].sum()


class L1(_Forgetful):
    """See :class:`L1Config`."""

    def __call__(self, weights_MV: Tensor, step: int) -> Tensor:
        """Returns the mean over texts of the sum of weights."""
        return weights_MV.sum(1).mean()


class AntiZero(_Forgetful):
    """See :class:`AntiZeroConfig`."""

    def __call__(self, weights_MV: Tensor, step: int) -> Tensor:
        """Returns one over the squared sum of all weights."""
        return 1 / (weights_MV.sum().square() + ZERO_FLOOR)


class DfFlops:
    """See :class:`DfFlopsConfig`. ``counts`` and ``seen``: texts since the last refresh; ``shares``: those in use."""

    def __init__(self, config: DfFlopsConfig) -> None:
        self.config = config
        self._counts_V: Tensor | None = None
        self._shares_V: Tensor | None = None
        self._seen, self._period = 0, 0

    def __call__(self, weights_MV: Tensor, step: int) -> Tensor:
        """Returns the weighted sum over terms of the squared mean weight, and counts the terms of these texts."""
        self._count(weights_MV.detach(), step)
        squares_V = weights_MV.mean(0).square()
        return squares_V.sum() if self._shares_V is None else (squares_V * self.price(self._shares_V.to(squares_V))).sum()

    def price(self, shares_V: Tensor) -> Tensor:
        """Returns the weight of terms that these shares of texts have, 0 to 1."""
        exponent = math.log(2) / math.log(self.config.alpha)
        # a term that no text has: its share to a negative power is infinite, and its weight 0
        over_V = (shares_V.double().pow(exponent) - 1).clamp(min=0).pow(self.config.beta)
        return (1 / (1 + over_V)).to(shares_V)

    def _count(self, weights_MV: Tensor, step: int) -> None:
        """A step belongs to one period whole: what it accumulates is priced alike in all its batches."""
        if self._counts_V is None:
            self._counts_V = torch.zeros(weights_MV.shape[1], dtype=torch.float64)
        period = step // self.config.refresh
        if period != self._period:
            if self._seen:
                self._shares_V = (self._counts_V / self._seen).float()
            self._counts_V, self._seen, self._period = torch.zeros_like(self._counts_V), 0, period
        self._counts_V += (weights_MV > 0).sum(0).cpu()
        self._seen += len(weights_MV)

    def state(self) -> dict[str, Tensor]:
        """Returns counts, shares and where in which period it is."""
        found = {"progress": torch.tensor([self._seen, self._period], dtype=torch.int64)}
        parts = {"counts": self._counts_V, "shares": self._shares_V}
        return found | {name: value.clone() for name, value in parts.items() if value is not None}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what :meth:`state` gave."""
        self._seen, self._period = state["progress"].tolist()
        self._counts_V, self._shares_V = state.get("counts"), state.get("shares")


class RegularizedObjective:
    """What objectives with penalties share: every text of the batch is encoded, and penalties may remember earlier steps."""

    def __init__(self, regularizers: Sequence[RegularizerConfig]) -> None:
        self._penalties: list[tuple[str, RegularizerConfig, str, Penalty]] = []
        for config in regularizers:
            for side in ("query", "document") if config.side == "both" else (config.side,):
                self._penalties.append((f"{config.kind}_{side}", config, side, config.build()))
        names = [name for name, *_ in self._penalties]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"regularizers: {', '.join(twice)} given more than once; add their weights, or give each a side")

    def views(self, batch: Batch) -> Views:
        """Returns every distinct text of the batch once."""
        return every_text(batch)

    def penalties(self, queries: Representation, documents: Representation, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum of all penalties under their λ at ``step``, and each so weighted by name.

        Raises ``ValueError`` where there are penalties and the representations have no weights over the vocabulary.
        """
        total, parts = torch.zeros((), device=documents.device), {}
        for name, config, side, penalty in self._penalties:
            found = queries if side == "query" else documents
            if not isinstance(found, Sparse):
                raise ValueError(
                    f"{config.kind} penalises weights over the vocabulary; this head gives none: drop regularizers"
                )
            with torch.autocast(found.device.type, enabled=False):
                parts[name] = config.factor(step) * penalty(found.values_NV.float(), step)
            total = total + parts[name]
        return total, parts

    def state(self) -> dict[str, Tensor]:
        """Returns what penalties remember, by ``<penalty>/<what>``: it belongs into a checkpoint."""
        return {f"{name}/{key}": value for name, *_, penalty in self._penalties for key, value in penalty.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what :meth:`state` gave; ``ValueError`` where something else was remembered."""
        expected = {name for name, *_, penalty in self._penalties if penalty.state()}
        found = {key.partition("/")[0] for key in state}
        if expected != found:
            raise ValueError(f"the checkpoint remembers {sorted(found) or 'nothing'}, these regularizers {sorted(expected)}")
        for name, *_, penalty in self._penalties:
            penalty.restore({key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{name}/")})


@torch.no_grad()
def sparsity(queries: Representation, documents: Representation) -> dict[str, Any]:
    """Returns the diagnostic ``sparsity`` of sparse representations, nothing of others.

    ``query_terms`` and ``document_terms``: weights above 0 a text; ``empty_queries`` and ``empty_documents``: shares of texts
    without any; ``flops``: ``Σ_j p_j(query) p_j(document)``, p the share of the batch's texts that have the term: the products
    a query and a document cost.
    """
    if not (isinstance(queries, Sparse) and isinstance(documents, Sparse)):
        return {}
    query_QV, document_NV = queries.values_NV > 0, documents.values_NV > 0
    terms_Q, terms_N = query_QV.sum(1).float(), document_NV.sum(1).float()
    found = {
        "query_terms": terms_Q.mean(),
        "document_terms": terms_N.mean(),
        "empty_queries": (terms_Q == 0).float().mean(),
        "empty_documents": (terms_N == 0).float().mean(),
        "flops": query_QV.float().mean(0) @ document_NV.float().mean(0),
    }
    return {"sparsity": {name: value.item() for name, value in found.items()}}


def read_idf(path: str | Path) -> np.ndarray:
    """Returns the positive values (V,) of a ``.npy`` file, one a term id; ``ValueError`` names a file that is none."""
    path = Path(path)
    try:
        values_V = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a table of idf ({error}); an idf stage writes one") from None
    if values_V.ndim != 1 or not np.issubdtype(values_V.dtype, np.floating) or not (values_V > 0).all():
        raise ValueError(f"{path}: a table of idf holds one value above 0 a term; got {values_V.dtype} {values_V.shape}")
    return values_V
