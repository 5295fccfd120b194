"""Our protocols give what mteb's own code gives, on the same encoder and small local data; and the adapter conforms."""

import json

import numpy as np
import pytest

from openembed.encoder import PromptConfig, TaskInstruction
from openembed.evaluation.mteb import MtebEncoder, load_task, run_mteb
from openembed.evaluation.runner import run_tasks
from openembed.evaluation.systems import EncoderSystem
from openembed.evaluation.tasks import find_tasks
from tests.evaluation_fakes import WordEncoder, write_rows

mteb = pytest.importorskip("mteb")

TOPICS = ("mars venus orbit moon", "rice soup oven salt", "goal match team ball", "code loop file disk")
WORDS = [word for topic in TOPICS for word in topic.split()]


def sentence(rng, topic=None):
    pool = WORDS if topic is None else WORDS[topic * 4 : topic * 4 + 4] * 3 + WORDS
    return " ".join(rng.choice(pool, size=7))


def retrieval(folder, rng):
    documents = [sentence(rng) for _ in range(120)]
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(documents)])
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": sentence(rng)} for i in range(30)])
    lines = {f"q{q}\td{d}\t{rng.integers(0, 3)}" for q in range(29) for d in rng.choice(120, size=4, replace=False)}
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(sorted(lines)) + "\n")


def reranking(folder, rng):
    def candidates(low):
        return [sentence(rng) for _ in range(rng.integers(low, 6))]

    rows = [{"id": f"r{i}", "query": sentence(rng), "positive": candidates(0), "negative": candidates(0)} for i in range(25)]
    write_rows(folder / "test.jsonl", rows)


def sts(folder, rng):
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(rng.integers(0, 6))} for _ in range(90)]
    write_rows(folder / "test.jsonl", rows)


def pair_classification(folder, rng):
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "label": int(rng.integers(2))} for _ in range(90)]
    write_rows(folder / "test.jsonl", rows)


def labelled(rng, count):
    topics = rng.integers(0, 4, size=count).tolist()
    return [{"text": sentence(rng, topic), "label": topic} for topic in topics]


def classification(folder, rng):
    write_rows(folder / "train.jsonl", labelled(rng, 200))
    write_rows(folder / "test.jsonl", labelled(rng, 100))


def clustering(folder, rng):
    write_rows(folder / "test.jsonl", labelled(rng, 1500))


CASES = {
    "SciFact": (retrieval, ("ndcg_at_10", "recall_at_100", "map_at_1000", "mrr_at_10", "precision_at_5")),
    "AskUbuntuDupQuestions": (reranking, ("map_at_1000", "mrr_at_10", "ndcg_at_10")),
    "STSBenchmark": (sts, ("cosine_spearman", "cosine_pearson", "euclidean_spearman", "manhattan_pearson")),
    "SprintDuplicateQuestions": (
        pair_classification,
        ("max_ap", "cosine_ap", "max_accuracy", "max_f1", "manhattan_f1", "dot_ap"),
    ),
    "Banking77Classification": (classification, ("accuracy", "f1", "f1_weighted")),
    "StackExchangeClustering.v2": (clustering, ("v_measure",)),
}


@pytest.mark.parametrize("name", CASES)
def test_our_runners_equal_mteb(tmp_path, name):
    write, metrics = CASES[name]
    folder = tmp_path / name
    folder.mkdir()
    write(folder, np.random.default_rng(len(name)))
    encoder = WordEncoder()
    settings = {}
    if name == "StackExchangeClustering.v2":
        task = load_task(name, folder)
        settings = {"fraction": task.max_fraction_of_documents_to_embed, "max_documents": task.max_document_to_embed}
        settings = {key: value for key, value in settings.items() if value is not None}
    (ours,) = run_tasks(EncoderSystem(encoder, "words"), find_tasks(folder, settings))
    (theirs,) = run_mteb(encoder, "words", [name], folder)
    # mteb rounds its ranking metrics, except MRR, to five digits
    rounded = ours.kind in ("retrieval", "reranking")
    for metric in metrics:
        expected = theirs.metrics[metric]
        value = ours.metrics[metric]
        assert (round(value, 5) if rounded and "mrr" not in metric else value) == pytest.approx(expected, abs=1e-6), metric
    assert ours.metric == theirs.metric


def test_whole_clustering_equals_mteb_legacy(tmp_path):
    folder = tmp_path / "StackExchangeClustering"
    clustering(folder, np.random.default_rng(0))
    encoder = WordEncoder()
    (ours,) = run_tasks(EncoderSystem(encoder, "words"), find_tasks(folder, {"protocol": "whole"}))
    (theirs,) = run_mteb(encoder, "words", ["StackExchangeClustering"], folder)
    assert ours.value == pytest.approx(theirs.value, abs=1e-6)


def test_the_adapter_passes_mtebs_mock_run():
    from mteb.mocks.mock_run import mock_run
    from mteb.models import EncoderProtocol, SearchProtocol

    encoder = WordEncoder(PromptConfig(tasks={"STS13": TaskInstruction(query="Alike")}))
    model = MtebEncoder(encoder, "org/words")
    assert isinstance(model, EncoderProtocol)
    assert not isinstance(model, SearchProtocol)
    results = mock_run(model)
    assert results.all_passed, results.to_markdown()
    assert sum(status is not None for _, status in results.items()) > 20


def prefixes(prompts, name, instruction=None):
    model = MtebEncoder(WordEncoder(prompts), "org/words", instruction=instruction)
    metadata = mteb.get_task(name).metadata
    return [model.prefix(metadata, side) for side in ("query", "document", None)]


def test_prompts_follow_mteb():
    table = PromptConfig(template="I: {task} Q: ", tasks={"SciFact": TaskInstruction(query="find", document="held")})
    assert prefixes(table, "SciFact")[:2] == ["I: find Q: ", "I: held Q: "]
    nfcorpus = "I: Given a question, retrieve relevant documents that best answer the question Q: "
    assert prefixes(table, "NFCorpus")[:2] == [nfcorpus, ""]
    assert prefixes(table, "STS13")[2] == "I: Retrieve semantically similar text. Q: "
    ubuntu = "I: Retrieve duplicate questions from AskUbuntu forum Q: "
    assert prefixes(table, "AskUbuntuDupQuestions")[:2] == [ubuntu, ubuntu]
    assert prefixes(table, "XQuADRetrieval")[:2] == ["I: Retrieve text based on user query. Q: ", ""]
    plain = PromptConfig(query="query: ", document="passage: ")
    assert prefixes(plain, "SciFact") == ["query: ", "passage: ", ""]
    named = PromptConfig(named={"STS": "sts: ", "SciFact-query": "sq: ", "Retrieval": "r: "}, query="query: ")
    assert prefixes(named, "STS13")[2] == "sts: "
    assert prefixes(named, "SciFact")[:2] == ["sq: ", "r: "]
    assert prefixes(plain, "SciFact", instruction="Mine")[:2] == ["Instruct: Mine\nQuery:\n", ""]


def test_results_are_mtebs_json_and_a_finished_task_is_not_run_again(tmp_path):
    retrieval(tmp_path / "scifact", np.random.default_rng(0))
    encoder = WordEncoder()
    (first,) = run_mteb(encoder, "org/words", ["SciFact"], tmp_path, tmp_path / "out")
    path = tmp_path / "out" / "results" / "org__words" / "words" / "SciFact.json"
    stored = json.loads(path.read_text())
    assert stored["scores"]["test"][0]["main_score"] == pytest.approx(first.value)
    assert stored["dataset_revision"].startswith("local-")
    asked = len(encoder.encoded)
    assert run_mteb(encoder, "org/words", ["SciFact"], tmp_path, tmp_path / "out")[0].value == first.value
    assert len(encoder.encoded) == asked
    qrels = tmp_path / "scifact" / "qrels" / "test.tsv"
    qrels.write_text("\n".join(qrels.read_text().splitlines()[:40]) + "\n")
    changed = run_mteb(encoder, "org/words", ["SciFact"], tmp_path, tmp_path / "out")[0]
    assert len(encoder.encoded) > asked
    assert changed.value != first.value


def test_subsets_of_multilingual_tasks_are_folders_by_language(tmp_path):
    for language in ("en", "de"):
        retrieval(tmp_path / "xquad" / language, np.random.default_rng(0))
    (result,) = run_mteb(WordEncoder(), "org/words", ["XQuADRetrieval"], tmp_path)
    assert set(result.details["subsets"]) == {"en", "de"}


def test_what_mteb_cannot_run_is_said(tmp_path, monkeypatch):
    sts(tmp_path / "stsb", np.random.default_rng(0))
    sts(tmp_path / "other", np.random.default_rng(0))
    with pytest.raises(ValueError, match="mteb has no task 'Nope'"):
        load_task("Nope", tmp_path)
    with pytest.raises(ValueError, match=r"no folder with the data of SciFact .* Found: other \(sts\), stsb \(sts\)"):
        load_task("SciFact", tmp_path)
    with pytest.raises(ValueError, match="is of type BitextMining"):
        load_task("Tatoeba", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'openembed\[eval\]'"):
        load_task("SciFact", tmp_path)
