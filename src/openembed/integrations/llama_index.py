"""LlamaIndex: an embedding model by an encoder. Needs the extra ``openembed[llama-index]``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import PrivateAttr
except ImportError as error:
    raise ImportError("llama-index-core is not installed; this needs: pip install 'openembed[llama-index]'") from error

from openembed.encoded import require_kind

if TYPE_CHECKING:
    from openembed.encoder import Encoder

BATCH = 512
"""Texts a call: the encoder makes its own micro-batches, sorted by length."""


class OpenEmbedEmbedding(BaseEmbedding):
    """An encoder as LlamaIndex asks for one: queries under the query prompt, texts under the document prompt.

    ``model``: a name for ``openembed.load`` or an encoder. ``instruction`` or ``task`` chooses the query's prompt.
    ``options`` go to ``Encoder.encode``: ``dimensions``, ``max_length``, ``normalize``, ...
    """

    _encoder: Any = PrivateAttr()
    _options: dict[str, Any] = PrivateAttr()
    _instruction: str | None = PrivateAttr()

    def __init__(
        self,
        model: str | Encoder,
        *,
        instruction: str | None = None,
        task: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        embed_batch_size: int = BATCH,
        **options: Any,
    ) -> None:
        import openembed

        encoder = openembed.load(model, device=device, dtype=dtype) if isinstance(model, str) else model
        require_kind(encoder, ["dense"], "LlamaIndex", "use a dense model")
        name = model if isinstance(model, str) else f"openembed-{encoder.fingerprint[:12]}"
        super().__init__(model_name=name, embed_batch_size=embed_batch_size)
        self._encoder, self._instruction, self._options = encoder, instruction, {"task": task, **options}

    @classmethod
    def class_name(cls) -> str:
        """Returns the name LlamaIndex knows the class by."""
        return "OpenEmbedEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._encoder.encode_queries([query], instruction=self._instruction, **self._options)[0].tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._encoder.encode_documents(texts, **self._options).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
