"""openembed as LlamaIndex's ``BaseEmbedding``, run by llama-index-core itself."""

import asyncio

import numpy as np
import pytest

llama_index_core = pytest.importorskip("llama_index.core")

from openembed.integrations.llama_index import OpenEmbedEmbedding  # noqa: E402

TEXTS = ["Aspirin relieves pain and fever.", "The river floods every spring.", "Judo is a martial art of throws."]


def test_vectors_are_the_encoders_under_its_prompts(make_encoder):
    encoder = make_encoder()
    model = OpenEmbedEmbedding(encoder, instruction="Find the passage", dimensions=16, embed_batch_size=2)
    found = np.array(model.get_text_embedding_batch(TEXTS), dtype=np.float32)
    np.testing.assert_allclose(found, encoder.encode_documents(TEXTS, dimensions=16), atol=1e-6)
    np.testing.assert_allclose(model.get_text_embedding(TEXTS[0]), found[0], atol=1e-6)
    query = encoder.encode_queries(["what?"], instruction="Find the passage", dimensions=16)[0]
    np.testing.assert_array_equal(model.get_query_embedding("what?"), query)
    assert model.model_name.startswith("openembed-")
    assert model.class_name() == "OpenEmbedEmbedding"


def test_asynchronous_calls_give_the_same():
    model = OpenEmbedEmbedding("openembed-nano")

    async def all_three():
        return await asyncio.gather(
            model.aget_text_embedding_batch(TEXTS), model.aget_text_embedding(TEXTS[0]), model.aget_query_embedding("pain")
        )

    texts, text, query = asyncio.run(all_three())
    assert texts == model.get_text_embedding_batch(TEXTS)
    assert text == model.get_text_embedding(TEXTS[0])
    assert query == model.get_query_embedding("pain")
    assert model.model_name == "openembed-nano"


def test_in_llama_indexes_own_vector_store():
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode

    nodes = [TextNode(id_=f"d{n}", text=text) for n, text in enumerate(TEXTS)]
    index = VectorStoreIndex(nodes, embed_model=OpenEmbedEmbedding("openembed-nano"))
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("which medicine helps against headache?")
    assert found.node.node_id == "d0"
    assert 0 < found.score < 1
