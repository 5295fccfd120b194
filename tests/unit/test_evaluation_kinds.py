import json
from dataclasses import replace

import numpy as np
import pytest
from kind_fakes import WordTokens, WordWeights
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

import openembed
from openembed.cli import app
from openembed.encoded import kind_of
from openembed.evaluation.cache import SparseCache, TokenCache, open_cache
from openembed.evaluation.costs import alone_ms, entries, flops
from openembed.evaluation.pair_classification import pair_similarities
from openembed.evaluation.prompts import choose_prompts
from openembed.evaluation.runner import read_results, run_tasks
from openembed.evaluation.systems import Bm25System, EncoderSystem
from openembed.evaluation.tasks import find_tasks
from openembed.evaluation.vectors import Vectors
from openembed.index.tokens.methods import Muvera, Plaid, Warp, Xtr
from openembed.vectors import VectorFormat
from tests.evaluation_fakes import WordEncoder, small_retrieval, write_rows

PAIRS = [("red planet", "planet red", 5), ("red rose", "a red car", 2), ("cooking rice", "blue earth", 0), ("ä", "ö", 0)]


def rows(kind):
    field = "score" if kind == "sts" else "label"
    return [{"sentence1": a, "sentence2": b, field: s if kind == "sts" else int(s > 1)} for a, b, s in PAIRS]


@pytest.mark.parametrize("encoder", [WordWeights, WordTokens])
def test_retrieval_and_what_it_costs(tmp_path, encoder):
    (result,) = run_tasks(EncoderSystem(encoder(), "words"), find_tasks(small_retrieval(tmp_path / "set")), tmp_path / "out")
    assert result.value > 0.9
    costs = result.costs
    assert costs["kind"] == encoder.kind
    assert costs["query_entries"] == (2 + 5) / 2 if encoder is WordTokens else (2 + 4) / 2
    assert costs["document_entries"] == (3 + 3 + 2 + 3) / 4
    assert costs["document_bytes"] == costs["document_entries"] * (8 if encoder is WordWeights else 4 * 16)
    assert costs["empty_queries"] == costs["empty_documents"] == 0
    assert ("flops" in costs) == (encoder is WordWeights)
    assert costs["encode_query_ms"] > 0
    assert costs["query_ms"] > 0
    assert read_results(tmp_path / "out")["set"][0] == result


def test_a_shared_word_finds_the_document_and_no_other_is_a_hit(tmp_path):
    task = find_tasks(small_retrieval(tmp_path / "set"))[0]
    run = EncoderSystem(WordWeights(), "words").evaluate(task).run
    assert set(run["q1"]) == {"d1", "d2"}
    assert run["q1"]["d1"] > run["q1"]["d2"]


def test_dense_and_bm25_say_what_they_cost(tmp_path):
    task = find_tasks(small_retrieval(tmp_path / "set"))[0]
    dense = EncoderSystem(WordEncoder(), "words").evaluate(task).costs
    assert (dense["document_bytes"], dense["document_entries"], dense["kind"]) == (4 * 48, 48, "dense")
    small = EncoderSystem(WordEncoder(), "words", stored=VectorFormat(dimensions=16, precision="int8")).evaluate(task).costs
    assert (small["document_bytes"], small["query_entries"]) == (16 + 4, 16)
    words = Bm25System().evaluate(task).costs
    assert words["document_bytes"] == 8 * words["document_entries"] > 0
    assert words["query_ms"] > 0


def test_flops_is_the_mean_number_of_shared_terms():
    draw = np.random.default_rng(0)
    queries, documents = (csr_matrix(draw.random((n, 30)) < 0.2, dtype=np.float32) for n in (7, 11))
    assert flops(queries, documents) == pytest.approx(float((queries @ documents.T).sum()) / (7 * 11))
    queries[0] *= 0  # stored zeros count as nothing
    assert flops(queries, documents) == pytest.approx(float((queries @ documents.T).sum()) / (7 * 11))
    assert entries(queries)[0] == 0


@pytest.mark.parametrize("encoder", [WordWeights, WordTokens])
def test_reranking(tmp_path, encoder):
    item = {"query": "red planet", "positive": ["the red planet mars"], "negative": ["cooking rice", "red rose"]}
    write_rows(tmp_path / "set" / "test.jsonl", [item])
    (result,) = run_tasks(EncoderSystem(encoder(), "words"), find_tasks(tmp_path / "set"))
    assert (result.value, result.costs["kind"]) == (1.0, encoder.kind)


@pytest.mark.parametrize("kind", ["sts", "pair_classification"])
def test_pairs_of_sparse_vectors(tmp_path, kind):
    write_rows(tmp_path / "set" / "test.jsonl", rows(kind))
    (result,) = run_tasks(EncoderSystem(WordWeights(), "words"), find_tasks(tmp_path / "set"))
    assert result.value > 0.7
    assert any(name.startswith("dot_") for name in result.metrics)
    assert not any(name.startswith("manhattan_") for name in result.metrics)


def test_sparse_similarities_are_those_of_the_full_vectors():
    encoder = WordWeights()
    first, second = (encoder.encode([pair[side] for pair in PAIRS] + [""]) for side in (0, 1))
    found = pair_similarities(first, second)
    full = pair_similarities(first.toarray()[:3], second.toarray()[:3])
    for name in ("cosine", "dot"):
        np.testing.assert_allclose(found[name][:3], full[name], rtol=1e-5, atol=1e-6)
    assert found["cosine"][-1] == 0


@pytest.mark.parametrize(
    ("encoder", "kind", "does"),
    [
        (WordTokens, "sts", "retrieval, reranking"),
        (WordWeights, "clustering", "retrieval, reranking, sts, pair_classification"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(tmp_path, encoder, kind, does):
    lines = rows("sts") if kind == "sts" else [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    write_rows(tmp_path / "set" / "test.jsonl", lines)
    (task,) = find_tasks(tmp_path / "set")
    with pytest.raises(ValueError, match=f"^set: words gives .*, which {kind} has no use for; evaluate it on {does}$"):
        EncoderSystem(encoder(), "words").evaluate(task)


def test_settings_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="a stored format takes dense vectors, this model gives sparse weights"):
        EncoderSystem(WordWeights(), "words", stored=VectorFormat(precision="int8"))
    with pytest.raises(ValueError, match="method xtr takes a vector a token, this model gives dense vectors; leave it out"):
        EncoderSystem(WordEncoder(), "words", method=Xtr())


def test_xtr_is_another_system(tmp_path):
    task = find_tasks(small_retrieval(tmp_path / "set"))[0]
    whole = EncoderSystem(WordTokens(), "words")
    few = replace(whole, method=Xtr(tokens=1))
    assert whole.fingerprint != few.fingerprint
    assert len(few.evaluate(task).run["q1"]) <= 2 < len(whole.evaluate(task).run["q1"])


@pytest.mark.parametrize("method", [Plaid(), Warp(probes=99, rescored=99), Muvera(), Xtr(tokens=999)], ids=lambda m: m.kind)
def test_methods_that_pass_nothing_over_score_as_exact_search_does(tmp_path, method):
    task = find_tasks(small_retrieval(tmp_path / "set"))[0]
    exact = EncoderSystem(WordTokens(), "words").evaluate(task)
    found = EncoderSystem(WordTokens(), "words", method=method).evaluate(task)
    assert {query: list(hits) for query, hits in found.run.items()} == {q: list(hits) for q, hits in exact.run.items()}
    assert found.value == exact.value
    assert found.details["scoring"] == method.model_dump()


@pytest.mark.parametrize(("encoder", "cache"), [(WordWeights, SparseCache), (WordTokens, TokenCache)])
def test_the_cache_serves_a_second_run_and_survives_a_torn_write(tmp_path, encoder, cache):
    def vectors(model):
        store = open_cache(tmp_path, model)
        assert isinstance(store, cache)
        return Vectors(model, choose_prompts(model, "retrieval", (), None, None), store)

    texts = ["red planet", "", "rice", "the red planet mars"]
    expected = encoder().encode(texts)
    same(vectors(encoder()).documents(texts), expected)
    again = encoder()
    same(vectors(again).documents(texts[::-1]), encoder().encode(texts[::-1]))
    assert again.encoded == []
    vectors(again).queries(["rice"])
    assert again.encoded == ["rice"], "the other side is another context"
    rows_file, keys = next(tmp_path.glob("*/*.rows")), next(tmp_path.glob("*/keys.bin"))
    keys.write_bytes(keys.read_bytes()[: 2 * 24 + 20])  # the third key did not reach the disk whole
    rows_file.write_bytes(rows_file.read_bytes() + b"torn")
    torn = encoder()
    same(vectors(torn).documents([*texts, "new"]), encoder().encode([*texts, "new"]))
    assert len(torn.encoded) == 3
    last = encoder()
    same(vectors(last).documents([*texts, "new"]), encoder().encode([*texts, "new"]))
    assert last.encoded == []


def same(first, second):
    assert kind_of(first) == kind_of(second)
    if kind_of(first) == "sparse":
        assert first.shape == second.shape
        assert abs(first - second).nnz == 0
    else:
        np.testing.assert_array_equal(first.offsets_N1, second.offsets_N1)
        np.testing.assert_array_equal(first.values_TD, second.values_TD)


def test_no_texts():
    for encoder in (WordWeights(), WordTokens(), WordEncoder()):
        vectors = Vectors(encoder, choose_prompts(encoder, "retrieval", (), None, None))
        assert kind_of(vectors.queries([])) == getattr(encoder, "kind", "dense")


@pytest.fixture
def command(monkeypatch, tmp_path):
    small_retrieval(tmp_path / "data" / "set")
    write_rows(tmp_path / "data" / "pairs" / "test.jsonl", rows("sts"))

    def run(model, *more):
        monkeypatch.setattr(openembed, "load", lambda *_a, **_k: model)
        return CliRunner().invoke(app, ["evaluate", "words", "--data", str(tmp_path / "data"), *more], env={"COLUMNS": "120"})

    return run


def test_the_command_shows_costs_and_leaves_out_what_a_kind_cannot_do(command, caplog):
    done = command(WordTokens())
    assert done.exit_code == 0, done.output
    assert "Costs" in done.output
    assert "bytes/doc" in done.output
    assert "left out: pairs (sts)" in caplog.text
    found = json.loads(command(WordTokens(), "--json", "--method", "xtr:tokens=5,imputation=zero").stdout)
    assert found["results"][0]["costs"]["bytes_formula"] == "4 x 16 x token vectors (float32)"
    assert found["results"][0]["details"]["scoring"] == {"kind": "xtr", "tokens": 5, "imputation": "zero", "rescored": 0}
    assert "xtr:tokens=5,imputation=zero" in command(WordTokens(), "--method", "xtr:tokens=5,imputation=zero").stdout
    assert "searched by" not in done.stdout
    shown = command(WordWeights()).output
    assert "FLOPS" in shown
    assert "pairs" in shown


def test_the_command_refuses_options_of_another_kind(command):
    for options in (["--precision", "int8"], ["--method", "xtr"]):
        failed = command(WordWeights(), *options)
        assert failed.exit_code != 0
        assert isinstance(failed.exception, ValueError) or "this model gives sparse weights" in failed.output


def test_queries_are_timed_one_by_one_and_the_median_is_told(monkeypatch):
    clock = iter(range(1_000))
    monkeypatch.setattr("openembed.evaluation.costs.time.perf_counter", lambda: next(clock) / 1_000)
    asked: list[str] = []
    assert alone_ms(asked.append, [f"query {n}" for n in range(40)]) == pytest.approx(1.0)
    assert asked == [f"query {n}" for n in range(32)], "no more than 32"
    assert alone_ms(asked.append, []) is None


def test_timing_ends_with_the_first_query_past_two_seconds(monkeypatch):
    clock = iter(range(1_000))
    monkeypatch.setattr("openembed.evaluation.costs.time.perf_counter", lambda: float(next(clock)))
    asked: list[str] = []
    assert alone_ms(asked.append, ["a", "b", "c"]) == pytest.approx(1_000.0)
    assert asked == ["a"]
