"""openembed as LangChain's ``Embeddings`` and ``BaseRetriever``, run by langchain-core itself."""

import asyncio

import numpy as np
import pytest
from store_fakes import BagOfWords

import openembed
from openembed.index.store import Store, describe_model
from openembed.records import Document

langchain_core = pytest.importorskip("langchain_core")

from openembed.integrations.langchain import OpenEmbedEmbeddings, retriever  # noqa: E402

TEXTS = ["Aspirin relieves pain and fever.", "The river floods every spring.", "Judo is a martial art of throws."]


@pytest.fixture(scope="module")
def nano():
    return openembed.load("openembed-nano")


def test_vectors_are_the_encoders_under_its_prompts(make_encoder):
    encoder = make_encoder()
    embeddings = OpenEmbedEmbeddings(encoder, instruction="Find the passage", dimensions=16)
    found = np.array(embeddings.embed_documents(TEXTS), dtype=np.float32)
    np.testing.assert_array_equal(found, encoder.encode_documents(TEXTS, dimensions=16))
    query = np.array(embeddings.embed_query("what?"), dtype=np.float32)
    np.testing.assert_array_equal(query, encoder.encode_queries(["what?"], instruction="Find the passage", dimensions=16)[0])
    assert isinstance(embeddings.embed_query("what?")[0], float)
    assert embeddings.embed_documents([]) == []
    symmetric = OpenEmbedEmbeddings(encoder, instruction="Same", document_instruction="Same")
    np.testing.assert_array_equal(symmetric.embed_documents(["x"])[0], symmetric.embed_query("x"))


def test_asynchronous_calls_give_the_same(nano):
    embeddings = OpenEmbedEmbeddings(nano)

    async def both():
        return await asyncio.gather(embeddings.aembed_documents(TEXTS), embeddings.aembed_query("pain"))

    documents, query = asyncio.run(both())
    assert documents == embeddings.embed_documents(TEXTS)
    assert query == embeddings.embed_query("pain")


def test_in_langchains_own_vector_store():
    from langchain_core.vectorstores import InMemoryVectorStore

    store = InMemoryVectorStore.from_texts(TEXTS, OpenEmbedEmbeddings("openembed-nano"))
    ((found, score),) = store.similarity_search_with_score("which medicine helps against headache?", k=1)
    assert found.page_content == TEXTS[0]
    assert 0 < score < 1


@pytest.fixture(scope="module")
def store(nano, tmp_path_factory):
    documents = [Document(f"d{n}", text, f"Title {n}", {"page": n}) for n, text in enumerate(TEXTS)]
    vectors = nano.encode_documents([document.full_text for document in documents])
    return Store.create(tmp_path_factory.mktemp("s") / "s", documents, vectors, model=describe_model("openembed-nano", nano))


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_a_retriever_over_an_index_in_a_chain(store, nano, mode):
    from langchain_core.runnables import RunnableLambda

    found = retriever(store, nano, mode=mode, k=2)
    chain = found | RunnableLambda(lambda documents: [document.id for document in documents])
    assert chain.invoke("when does the river flood?")[0] == "d1"
    first = asyncio.run(found.ainvoke("when does the river flood?"))[0]
    assert first.page_content == TEXTS[1]
    assert (first.metadata["page"], first.metadata["title"]) == (1, "Title 1")
    assert first.metadata["score"] > 0


def test_mistakes_of_a_retriever_are_said(store, nano):
    with pytest.raises(ValueError, match="mode 'colbert' is not known; allowed: dense, sparse, bm25, hybrid"):
        retriever(store, nano, mode="colbert")
    with pytest.raises(ValueError, match="needs the encoder"):
        retriever(store)
    with pytest.raises(ValueError, match="vectors are 256 wide"):
        retriever(store, BagOfWords())
