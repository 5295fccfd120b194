"""LangChain and LlamaIndex with real models of other kinds: dense vectors or one clear line."""

import pytest
from tiny_training import sentence, tiny_sparse_encoder
from token_models import token_encoder

from openembed.index.store import Store, describe_model
from openembed.integrations import langchain, llama_index
from openembed.records import Document


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    sparse = tiny_sparse_encoder(folder / "words", query_head={"kind": "idf_lookup"})
    return {"sparse": sparse, "tokens": token_encoder(folder / "tokens")}


@pytest.mark.parametrize("kind", ["sparse", "tokens"])
def test_dense_frameworks_refuse(kind, encoders):
    with pytest.raises(ValueError, match="LangChain's Embeddings takes dense vectors, this model gives"):
        langchain.OpenEmbedEmbeddings(encoders[kind])
    with pytest.raises(ValueError, match="LlamaIndex takes dense vectors, this model gives"):
        llama_index.OpenEmbedEmbedding(encoders[kind])


@pytest.mark.parametrize("mode", ["sparse", "hybrid"])
def test_langchains_retriever_takes_sparse_vectors(mode, encoders, tmp_path):
    encoder = encoders["sparse"]
    documents = [Document("a", sentence(1, 2)), Document("b", sentence(30, 31))]
    store = Store.create(tmp_path / "store", model=describe_model("sparse", encoder))
    store.add(documents, encoder)
    found = langchain.retriever(store, encoder, mode=mode, k=1).invoke(sentence(1, 2))
    assert [document.id for document in found] == ["a"]
