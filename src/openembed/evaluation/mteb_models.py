"""Encoders as mteb runs them: dense ones embed for it, the others rank for it.

mteb's tasks compare embeddings by a similarity of two arrays, which sparse weights and token vectors are not; but its retrieval
and reranking tasks take a model that searches for itself, which is how :class:`MtebSearch` gives them ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openembed.encoded import require_kind, take
from openembed.evaluation.prompts import KIND_INSTRUCTIONS, KIND_NAMES, find_entry
from openembed.evaluation.vectors import TextEncoder
from openembed.index import exact
from openembed.records import Document

KINDS = {name: kind for kind, name in KIND_NAMES.items()}


def require_mteb() -> Any:
    """Returns the mteb module; raises ``ValueError`` naming the extra when it is not installed."""
    for package in ("mteb", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed; mteb's task classes need: pip install 'openembed[eval]'")
    import mteb

    return mteb


class MtebModel:
    """An encoder under mteb's prompts, with mteb's ``ModelMeta``.

    Prompts: ``instruction`` where one is given; else the model's own entry for the task or its type, as mteb finds a
    prompt name; else, for a model with an instruction table, the task's prompt in mteb; else its query and document
    prompts. Retrieval documents carry an instruction only where mteb's task states one for documents.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        name: str,
        *,
        revision: str | None = None,
        instruction: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        require_mteb()
        from mteb.models import ModelMeta

        self.encoder, self._instruction, self._options = encoder, instruction, dict(options or {})
        self._meta = ModelMeta.create_empty(
            overwrites={
                "name": name if name.count("/") == 1 else f"openembed/{plain_name(name)}",
                "revision": revision or encoder.fingerprint[:40],
                "embed_dim": encoder.width,
                "use_instructions": bool(encoder.config.prompts.tasks) or instruction is not None,
            }
        )

    @property
    def mteb_model_meta(self) -> Any:
        """Returns mteb's ``ModelMeta``: name, revision (the encoder's fingerprint) and width."""
        return self._meta

    def prefix(self, task_metadata: Any, side: str | None) -> str:
        """Returns what goes before the texts of a task's ``side`` (``query``, ``document`` or None: symmetric)."""
        table = self.encoder.config.prompts
        if self._instruction is not None:
            return "" if side == "document" else self.encoder.query_prompt(instruction=self._instruction)
        entry = self._entry(task_metadata, side)
        if entry in table.named:
            return table.named[entry]
        if entry is not None:
            return (self.encoder.document_prompt if side == "document" else self.encoder.query_prompt)(task=entry)
        if table.tasks:
            instruction = _mteb_instruction(task_metadata, side)
            return self.encoder.query_prompt(instruction=instruction) if instruction else ""
        if side is None:
            return ""
        return self.encoder.document_prompt() if side == "document" else self.encoder.query_prompt()

    def _entry(self, task_metadata: Any, side: str | None) -> str | None:
        from mteb.models.abs_encoder import get_prompt_name
        from mteb.types import PromptType

        table = self.encoder.config.prompts
        entries = dict.fromkeys((*table.tasks, *table.named), "")
        exact = get_prompt_name(entries, task_metadata, None if side is None else PromptType(side))
        specific = [entry for entry in entries if entry not in ("query", "document", "passage")]
        found = exact if exact not in (None, "query", "document", "passage") else None
        return found or find_entry(specific, (task_metadata.name, task_metadata.type)) or exact


class MtebEncoder(MtebModel):
    """A dense encoder as mteb's ``EncoderProtocol`` wants it; raises ``ValueError`` for one of another kind."""

    def __init__(self, encoder: TextEncoder, name: str, **options: Any) -> None:
        require_kind(encoder, ["dense"], "mteb's EncoderProtocol", "rank with it by openembed.evaluation.mteb.MtebSearch")
        super().__init__(encoder, name, **options)

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Returns vectors ``(N, D)`` float32 of all texts that ``inputs`` yields in batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        if not texts:
            return np.zeros((0, self.encoder.width), dtype=np.float32)
        prefix = self.prefix(task_metadata, None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type)))
        return self.encoder.encode(texts, instruction=prefix, **self._options)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of every pair, ``(N1, N2)``."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of corresponding rows, ``(N,)``."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


class MtebSearch(MtebModel):
    """An encoder of any kind as mteb's ``SearchProtocol`` wants it: exact search, for retrieval and reranking tasks."""

    def index(self, corpus: Any, *, task_metadata: Any, **_rest: Any) -> None:
        """Encodes the corpus, rows with ``id``, ``text`` and perhaps ``title``; the one before is forgotten."""
        documents = [Document(row["id"], row["text"], row.get("title") or "") for row in corpus]
        self._ids = [document.id for document in documents]
        texts = [document.full_text for document in documents]
        encoded = self.encoder.encode(texts, instruction=self.prefix(task_metadata, "document"), **self._options)
        self._documents = exact.prepared(encoded)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_rest: Any,
    ) -> dict[str, dict[str, float]]:
        """Returns query id → document id → score: of the ``top_k`` best, or of those in ``top_ranked``."""
        names, texts = [row["id"] for row in queries], [row["text"] for row in queries]
        side = {"as_queries": True} if getattr(self.encoder, "sided", False) else {}
        prefix = self.prefix(task_metadata, "query")
        encoded = self.encoder.encode(texts, instruction=prefix, **side, **self._options)
        if top_ranked is None:
            found = self._documents.search(encoded, top_k, self._ids.__getitem__)
            return {name: {self._ids[n]: score for n, score in hits} for name, hits in zip(names, found, strict=True)}
        places, run = {identity: n for n, identity in enumerate(self._ids)}, {}
        for number, name in enumerate(names):
            positions = np.array([places[identity] for identity in top_ranked[name]], dtype=np.int64)
            scores = self._documents.scores(take(encoded, [number]), positions)
            run[name] = dict(zip(top_ranked[name], map(float, scores), strict=True))
        return run


def mteb_model(encoder: TextEncoder, name: str, **options: Any) -> MtebModel:
    """Returns the encoder as mteb takes it: by embeddings where they are dense, else as one that searches."""
    return (MtebEncoder if getattr(encoder, "kind", "dense") == "dense" else MtebSearch)(encoder, name, **options)


def plain_name(name: str) -> str:
    """Returns the last part of a path or hub id, fit for a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name) or "model"


def _mteb_instruction(task_metadata: Any, side: str | None) -> str:
    prompt, kind = task_metadata.prompt, KINDS.get(task_metadata.type)
    if isinstance(prompt, dict):
        return prompt.get(side or "query", "")
    if side == "document" and (prompt is None or kind == "retrieval"):
        return ""
    return prompt or KIND_INSTRUCTIONS.get(kind or "", "")
