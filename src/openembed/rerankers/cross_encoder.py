"""A cross-encoder: query and document read together by one network with one logit.

Reads the transformers layout of sequence classification, which sentence-transformers' ``CrossEncoder`` writes too. Scores are
those of its ``predict``: a sigmoid of the logit unless the checkpoint names the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openembed.files import read_json
from openembed.forks import one_thread_in_forks
from openembed.rerankers import Scale

TOKEN_BUDGET = 16_384
"""Tokens a batch, padding included: the longest pair times the pairs."""

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


class CrossEncoder:
    """Scores (query, document) pairs; ``sigmoid`` makes probabilities of the log-odds."""

    def __init__(self, name: str, model: Any, tokenizer: Any, *, sigmoid: bool, max_length: int) -> None:
        self.name, self.sigmoid, self.max_length = name, sigmoid, max_length
        self.scale: Scale = "probability" if sigmoid else "log_odds"
        self._model, self._tokenizer = model.eval(), tokenizer

    @torch.inference_mode()
    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Returns float32 (N,), one score a document; a pair too long is cut at its longer side."""
        scores_N = np.empty(len(documents), dtype=np.float32)
        if not len(documents):
            return scores_N
        pairs = self._tokenizer([query] * len(documents), list(documents), truncation=True, max_length=self.max_length)
        lengths = [len(row) for row in pairs["input_ids"]]
        order = sorted(range(len(documents)), key=lambda row: -lengths[row])
        while order:
            size = max(1, TOKEN_BUDGET // lengths[order[0]])
            rows, order = order[:size], order[size:]
            batch = self._tokenizer.pad(
                {key: [values[row] for row in rows] for key, values in pairs.items()}, return_tensors="pt"
            )
            logits_B = self._model(**batch.to(self._model.device)).logits[:, 0].float()
            scores_N[rows] = (torch.sigmoid(logits_B) if self.sigmoid else logits_B).cpu().numpy()
        return scores_N


def load_cross_encoder(
    reference: str | Path,
    *,
    sigmoid: bool | None = None,
    max_length: int | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
) -> CrossEncoder:
    """Returns the cross-encoder of a folder or hub id.

    ``sigmoid`` of None: as the checkpoint says, with a sigmoid where it says nothing, as sentence-transformers does. Raises
    ``ValueError`` for a checkpoint with more than one logit or another activation.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    one_thread_in_forks()
    config = AutoConfig.from_pretrained(reference)
    if config.num_labels != 1:
        raise ValueError(f"{reference}: has {config.num_labels} logits; a reranker has one (num_labels = 1)")
    if sigmoid is None:
        sigmoid = _activation(config, reference) == SIGMOID
    model = AutoModelForSequenceClassification.from_pretrained(reference, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    return CrossEncoder(str(reference), model, tokenizer, sigmoid=sigmoid, max_length=max_length or limit)


def _activation(config: Any, reference: str | Path) -> str:
    """The activation a checkpoint names, in any of the places where sentence-transformers has kept it."""
    from transformers.utils import cached_file

    places = [getattr(config, "sentence_transformers", None) or {}]
    path = cached_file(reference, "config_sentence_transformers.json", _raise_exceptions_for_missing_entries=False)
    places.append(read_json(path) if path else {})
    places.append({"activation_fn": getattr(config, "sbert_ce_default_activation_function", None)})
    named = next((place["activation_fn"] for place in places if place.get("activation_fn")), SIGMOID)
    if named not in (SIGMOID, IDENTITY):
        raise ValueError(f"{reference}: activation {named} is not known; pass sigmoid = True or False")
    return named
