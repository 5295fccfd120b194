"""LangChain: ``Embeddings`` by an encoder and a retriever over an index. Needs the extra ``openembed[langchain]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openembed.encoded import require_kind
from openembed.records import Query
from openembed.steps import Bm25Config, DenseConfig, FuseConfig, Search, SparseConfig
from openembed.steps.fuse import fused_depth

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document as LangChainDocument
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever
except ImportError as error:
    raise ImportError("langchain-core is not installed; this needs: pip install 'openembed[langchain]'") from error

if TYPE_CHECKING:
    from openembed.encoder import Encoder
    from openembed.steps.search import Step


class OpenEmbedEmbeddings(Embeddings):
    """An encoder as LangChain asks for one: queries under the query prompt, documents under the document prompt.

    ``model``: a name for ``openembed.load`` or an encoder. ``instruction`` or ``task`` chooses the query's prompt;
    ``document_instruction`` that of documents, which retrieval leaves out. ``options`` go to ``Encoder.encode``:
    ``dimensions``, ``max_length``, ``normalize``, ...
    """

    def __init__(
        self,
        model: str | Encoder,
        *,
        instruction: str | None = None,
        task: str | None = None,
        document_instruction: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        import openembed

        self.encoder = openembed.load(model, device=device, dtype=dtype) if isinstance(model, str) else model
        require_kind(self.encoder, ["dense"], "LangChain's Embeddings", "index with it, and use openembed's retriever")
        self._query_options = {"instruction": instruction, "task": task, **options}
        self._document_options = {"instruction": document_instruction, "task": task, **options}
        if document_instruction is not None:
            self._document_options["task"] = None

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Returns a vector a text."""
        return self.encoder.encode_documents(texts, **self._document_options).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Returns the vector of one query."""
        return self.encoder.encode_queries([text], **self._query_options)[0].tolist()


class OpenEmbedRetriever(BaseRetriever):
    """Documents of an index, best first; make it by :func:`retriever`.

    ``source`` gives a document by its id, ``step`` ranks them. A LangChain document carries the id, the text and the
    metadata, among them ``title`` and ``score``.
    """

    source: Any
    step: Any

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[LangChainDocument]:
        hits = self.step(Search((Query("query", query),))).run["query"]
        return [self._found(identifier, score) for identifier, score in hits.items()]

    def _found(self, identifier: str, score: float) -> LangChainDocument:
        document = self.source.document(identifier)
        metadata = {**document.metadata, "title": document.title, "score": score}
        return LangChainDocument(id=identifier, page_content=document.text, metadata=metadata)


def retriever(
    source: Any, encoder: Encoder | None = None, *, mode: str = "dense", k: int = 10, instruction: str | None = None
) -> OpenEmbedRetriever:
    """Returns a retriever over a ``Store``, or over a ``QdrantIndex`` or ``PgVectorIndex`` (``dense`` alone).

    ``mode``: ``dense``, ``sparse``, ``bm25``, or ``hybrid``: BM25 and the vectors of the encoder's kind, fused by reciprocal
    rank. Raises ``ValueError`` for another mode, and for an encoder that is missing or is not the one that made the vectors.
    """
    return OpenEmbedRetriever(source=source, step=_step(source, encoder, mode, k, instruction))


def _step(source: Any, encoder: Encoder | None, mode: str, k: int, instruction: str | None) -> Step:
    deep = fused_depth(k)
    vectors = SparseConfig if getattr(encoder, "kind", "dense") == "sparse" else DenseConfig
    configs = {
        "dense": DenseConfig(k=k, instruction=instruction),
        "sparse": SparseConfig(k=k, instruction=instruction),
        "bm25": Bm25Config(k=k),
        "hybrid": FuseConfig(k=k, parts=(vectors(k=deep, instruction=instruction), Bm25Config(k=deep))),
    }
    if mode not in configs:
        raise ValueError(f"mode {mode!r} is not known; allowed: {', '.join(configs)}")
    return configs[mode].build(source, encoder)
