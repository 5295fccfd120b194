"""Queries without a model: the weight of each of a query's own tokens, looked up in a table.

    q_v = relu(weight_v) where the query has token v, else 0

(inference-free sparse retrieval, arXiv 2411.04403). A token counts once however often it is there. The table starts as the
tokens' inverse document frequencies and may be trained. Deviation from the released code: trained weights cannot fall below 0.

Shapes: ``B`` texts, ``V`` vocabulary, ``P`` (text, token) pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from openembed.config import Config
from openembed.heads.vocabulary import excluded_tokens, folded_tokens, own_tokens
from openembed.packing import Packed
from openembed.versions import version

if TYPE_CHECKING:
    from openembed.backbones.text import TextBackbone
    from openembed.tokenization import TextTokenizer

ABSENT = 1.0
"""Weight of a token that no document has, as in the published tables."""

COUNTED = 1024
"""Documents counted at a time."""


class IdfLookupConfig(Config):
    """Queries by lookup. ``trainable``: the table is trained; else it stays as it was made.

    ``exclude_special``: special and unused tokens weigh 0; those that the model puts before and after a text always do.
    ``fold``: as the head of documents has it, which must be the same.
    """

    kind: Literal["idf_lookup"] = "idf_lookup"
    trainable: bool = False
    exclude_special: bool = True
    fold: bool = Field(False, exclude_if=lambda given: not given)  # models were trained before it was there

    def build(self) -> IdfLookup:
        """Returns the head with a table of ones, once :meth:`IdfLookup.attach` has said how long it is."""
        return IdfLookup(self)


class IdfLookup(nn.Module):
    """Weights of a query's own tokens, ``(B, V)`` float32, at least 0."""

    kind = "sparse"

    def __init__(self, config: IdfLookupConfig) -> None:
        super().__init__()
        self.config, self.width = config, 0
        self._counts_as: np.ndarray | None = None  # fold_V as an array: a module's tensors are slow to look up
        self._known: tuple[object, tuple[np.ndarray, bytes]] | None = None
        self.register_buffer("excluded_V", None, persistent=False)
        self.register_buffer("fold_V", None, persistent=False)

    def attach(self, backbone: TextBackbone, tokenizer: TextTokenizer) -> None:
        """Makes the table, for this backbone's vocabulary, and looks up which entries count."""
        self.width = backbone.model.get_input_embeddings().weight.shape[0]
        ones_V = torch.ones(self.width)
        if self.config.trainable:
            self.weight_V = nn.Parameter(ones_V)
        else:
            self.register_buffer("weight_V", ones_V)
        excluded_V = excluded_tokens(tokenizer, self.width) if self.config.exclude_special else torch.zeros(self.width).bool()
        excluded_V[[*tokenizer.prefix, *tokenizer.suffix]] = True
        self.excluded_V = excluded_V
        if self.config.fold:
            self.fold_V = folded_tokens(tokenizer, excluded_V)
            self._counts_as = self.fold_V.numpy()

    @torch.no_grad()
    def set_table(self, weights: np.ndarray) -> None:
        """Takes the weights of the first entries of the vocabulary; any others keep theirs."""
        if len(weights) > self.width:
            raise ValueError(f"{len(weights)} weights for a vocabulary of {self.width}; build them with this model's tokenizer")
        self.weight_V[: len(weights)] = torch.as_tensor(weights, dtype=self.weight_V.dtype)

    def table(self) -> Tensor:
        """Returns what each token weighs in a query, ``(V,)`` float32; 0 for entries that do not count."""
        return torch.relu(self.weight_V.float()).masked_fill(self.excluded_V, 0)

    def forward(self, packed: Packed) -> Tensor:
        """Returns ``(B, V)`` float32, differentiable where the table is trained."""
        if torch.is_grad_enabled():
            self._known = None  # training changes it at every step
        rows_BV = own_tokens(packed, self.excluded_V, self.fold_V) * self.table()
        # A training step carries gradients back to every representation, of queries that do not learn too.
        return rows_BV if rows_BV.requires_grad or not torch.is_grad_enabled() else rows_BV.requires_grad_()

    def look_up(self, tokens: list[int], ends: list[int]) -> csr_matrix:
        """Returns the rows of texts given by their own tokens, end to end, and where each text's end, ``(N, V)``.

        They are what :meth:`forward` gives, without its zeros, columns in order.
        """
        weights_V, counts = self._weights()
        if self._counts_as is not None:
            tokens = self._counts_as[np.array(tokens, dtype=np.int64)].tolist()
        if len(ends) == 1:  # a dozen tokens: sets and lists take half the time of arrays
            found = np.array(sorted([token for token in set(tokens) if counts[token]]), dtype=np.int32)
            return _csr(weights_V[found], found, np.array((0, len(found)), dtype=np.int32), self.width)
        bits, tokens_P, ends_N = self.width.bit_length(), np.array(tokens, dtype=np.int64), np.array(ends, dtype=np.int64)
        counts_N = np.diff(ends_N, prepend=0)
        tokens_P |= np.repeat(np.arange(len(ends_N), dtype=np.int64) << bits, counts_N)  # now (text, token) in one number
        tokens_P.sort()
        other_P = tokens_P[1:] != tokens_P[:-1]
        tokens_P &= (1 << bits) - 1
        weights_P = weights_V[tokens_P]
        kept_P = weights_P > 0
        kept_P[1:] &= other_P
        offsets_N1 = np.zeros(len(ends_N) + 1, dtype=np.int32)
        offsets_N1[1:] = np.concatenate([[0], np.cumsum(kept_P)])[ends_N]
        return _csr(weights_P[kept_P], tokens_P[kept_P].astype(np.int32), offsets_N1, self.width)

    def _weights(self) -> tuple[np.ndarray, bytes]:
        """:meth:`table` as an array, and a byte an entry that says whether it counts; made anew when the weights change."""
        current = version(self.weight_V)
        if self._known is None or self._known[0] != current:
            table_V = self.table().detach().cpu().numpy()
            self._known = current, (table_V, (table_V > 0).tobytes())
        return self._known[1]


def _csr(data: np.ndarray, indices: np.ndarray, offsets: np.ndarray, width: int) -> csr_matrix:
    """A matrix of parts that fit: scipy's checks take longer than a query's tokens."""
    found = csr_matrix.__new__(csr_matrix)
    found.__dict__.update(_empty(len(offsets) - 1, width).__dict__)
    found.data, found.indices, found.indptr = data, indices, offsets
    return found


@lru_cache(8)
def _empty(rows: int, width: int) -> csr_matrix:
    return csr_matrix((rows, width), dtype=np.float32)


def build_idf(tokenizer: TextTokenizer, documents: Iterable[str], fold_V: Tensor | None = None) -> np.ndarray:
    """Returns the inverse document frequency of every token id, float32 ``(tokenizer.vocabulary,)``.

        idf_v = ln( 1 + (N - n_v + 0.5) / (n_v + 0.5) )

    of N documents, n_v of which have token v; :data:`ABSENT` for tokens that none has. Raises ``ValueError`` for no documents.
    ``fold_V``: what each token counts as, where spellings are one (:attr:`IdfLookup.fold_V`).
    """
    counted_V = None if fold_V is None else fold_V.cpu().numpy()
    found_V, count, left = np.zeros(tokenizer.vocabulary, dtype=np.int64), 0, iter(documents)
    while texts := list(islice(left, COUNTED)):
        count += len(texts)
        ids, ends = tokenizer.bodies(texts)
        texts_T = np.repeat(np.arange(len(texts)), np.diff(ends, prepend=0))
        ids_T = np.array(ids, dtype=np.int64)
        ids_T = ids_T if counted_V is None else counted_V[ids_T]
        distinct = np.unique(texts_T * len(found_V) + ids_T) % len(found_V)
        found_V += np.bincount(distinct, minlength=len(found_V))
    if not count:
        raise ValueError("inverse document frequencies need documents, and there are none")
    return np.where(found_V > 0, np.log1p((count - found_V + 0.5) / (found_V + 0.5)), ABSENT).astype(np.float32)
