import numpy as np
import pytest

from openembed.encoder import PromptConfig, TaskInstruction
from openembed.evaluation.cache import VectorCache
from openembed.evaluation.classification import evaluate_classification, undersample
from openembed.evaluation.clustering import evaluate_clustering, evaluate_clustering_sets
from openembed.evaluation.pair_classification import average_precision, best_accuracy, best_f1, pair_similarities
from openembed.evaluation.prompts import choose_prompts, find_entry
from openembed.evaluation.retrieval import RerankingItem, evaluate_reranking, evaluate_retrieval
from openembed.evaluation.sts import evaluate_sts, spearman
from openembed.evaluation.vectors import Vectors
from openembed.records import Document, Query
from tests.evaluation_fakes import WordEncoder

PROMPTED = PromptConfig(
    template="Instruct: {task}\nQuery: ",
    tasks={"SciFact": TaskInstruction(query="Find support"), "STS13": TaskInstruction(query="Alike", document="Alike")},
)


def vectors(encoder=None, kind="retrieval", names=("x",), instruction=None, **options):
    encoder = encoder or WordEncoder()
    return Vectors(encoder, choose_prompts(encoder, kind, names, instruction, None), **options)


def test_entries_are_found_by_name():
    entries = ["SciFact", "STS", "Banking77Classification", "RedditClustering", "RedditClusteringP2P", "FEVER"]
    assert find_entry(entries, ["scifact"]) == "SciFact"
    assert find_entry(entries, ["STS13"]) == "STS"
    assert find_entry(entries, ["banking77"]) == "Banking77Classification"
    assert find_entry(entries, ["RedditClusteringP2P.v2"]) == "RedditClusteringP2P"
    assert find_entry(entries, ["reddit"]) is None
    assert find_entry(entries, ["ClimateFEVER", "STS"]) == "STS"
    assert find_entry(["STSBenchmark"], ["stsb/en"]) == "STSBenchmark"


def test_prompts_in_order_of_precedence():
    encoder = WordEncoder(PROMPTED)
    table = choose_prompts(encoder, "retrieval", ["scifact"], None, None)
    assert (table.query, table.document) == ("Instruct: Find support\nQuery: ", "")
    given = choose_prompts(encoder, "retrieval", ["scifact"], "Mine", None)
    assert (given.query, given.document) == ("Instruct: Mine\nQuery: ", "")
    general = choose_prompts(encoder, "classification", ["unknown"], None, None)
    assert general.symmetric == "Instruct: Classify user passages.\nQuery: "
    both = choose_prompts(encoder, "sts", ["sts13"], None, None)
    assert both.symmetric == "Instruct: Alike\nQuery: "
    plain = WordEncoder(PromptConfig(query="query: ", document="passage: "))
    assert choose_prompts(plain, "retrieval", ["scifact"], None, None).document == "passage: "
    assert choose_prompts(plain, "sts", ["sts13"], None, None).symmetric == ""


def test_retrieval_encodes_queries_and_documents_under_their_prompts_and_only_judged_queries():
    encoder = WordEncoder(PromptConfig(query="query: ", document="passage: "))
    corpus = [Document("a", "mars", "Planet"), Document("b", "rice")]
    outcome = evaluate_retrieval(vectors(encoder), corpus, [Query("q", "planet mars"), Query("p", "other")], {"q": {"a": 1}})
    again = "query: planet mars"  # once more alone, to be timed
    assert sorted(encoder.encoded) == ["passage: Planet mars", "passage: rice", "query: planet mars", again]
    assert outcome.value == 1.0
    assert outcome.counts == {"queries": 1, "judgements": 1, "documents": 2}


def test_documents_with_the_query_id_are_dropped_only_where_asked():
    corpus = [Document("q", "planet mars"), Document("b", "planet mars rover")]
    queries, qrels = [Query("q", "planet mars")], {"q": {"b": 1}}
    assert evaluate_retrieval(vectors(), corpus, queries, qrels, metric="mrr_at_10").value == 0.5
    dropped = evaluate_retrieval(vectors(), corpus, queries, qrels, metric="mrr_at_10", ignore_identical_ids=True)
    assert dropped.value == 1.0


def test_reranking_leaves_out_queries_that_cannot_be_misranked():
    items = [
        RerankingItem("1", "red planet", ("the red planet",), ("rice", "planet earth")),
        RerankingItem("2", "rice", (), ("rice",)),
        RerankingItem("3", "rice", ("rice",), ()),
    ]
    outcome = evaluate_reranking(vectors(), items)
    assert outcome.value == 1.0
    assert (outcome.counts["queries"], outcome.counts["left_out"]) == (1, 2)


def test_sts_is_the_rank_correlation_of_cosines():
    first = ["a b c d", "a b c d", "a b c d", "a b c d"]
    second = ["a b c d", "a b c x", "a b y x", "z w y x"]
    assert evaluate_sts(vectors(kind="sts"), first, second, [5, 3, 2, 0]).value == pytest.approx(1.0)
    assert evaluate_sts(vectors(kind="sts"), first, second, [0, 2, 3, 5]).value == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="undefined"):
        evaluate_sts(vectors(kind="sts"), first, second, [1, 1, 1, 1])


def test_spearman_and_pair_metrics_equal_scipy_and_scikit_learn():
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score
    from sklearn.metrics.pairwise import paired_cosine_distances, paired_euclidean_distances, paired_manhattan_distances

    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 12, size=60) / 7, rng.integers(0, 2, size=60)
    assert spearman(scores, labels) == pytest.approx(spearmanr(scores, labels).statistic)
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))
    a, b = rng.normal(size=(2, 20, 5)).astype("f4")
    ours = pair_similarities(a, b)
    np.testing.assert_allclose(ours["cosine"], 1 - paired_cosine_distances(a, b), atol=1e-6)
    np.testing.assert_allclose(ours["manhattan"], -paired_manhattan_distances(a, b), atol=1e-5)
    np.testing.assert_allclose(ours["euclidean"], -paired_euclidean_distances(a, b), atol=1e-5)
    np.testing.assert_allclose(ours["dot"], (a * b).sum(axis=1), atol=1e-5)


def test_thresholds_cannot_split_equal_scores():
    scores, labels = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1, 0, 0, 0])
    assert best_accuracy(scores, labels) == 0.5
    assert best_f1(scores, labels) == pytest.approx((0.5, 1 / 3, 1.0))


def test_undersampling_takes_the_same_rows_as_mteb():
    task = pytest.importorskip("mteb").get_task("Banking77Classification")
    from datasets import Dataset

    labels = np.random.default_rng(0).integers(0, 5, size=200).tolist()
    data, order, expected = Dataset.from_dict({"text": ["x"] * 200, "label": labels}), None, []
    for experiment in range(4):
        _, order, chosen = task._undersample_data(data, experiment, order)
        expected.append(chosen)
    assert undersample(labels, 8, 4, 42) == expected


def labelled(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size=count).tolist()
    words = [["mars", "venus", "orbit"], ["rice", "soup", "oven"], ["goal", "match", "team"]]
    texts = [" ".join(rng.choice([*words[label], "the", "of"], size=5)) for label in labels]
    return texts, labels


def test_classification_learns_from_a_few_texts_and_encodes_each_once():
    encoder = WordEncoder()
    train, test = labelled(300, 0), labelled(80, 1)
    outcome = evaluate_classification(vectors(encoder, kind="classification"), train, test)
    assert outcome.value > 0.9
    assert outcome.value == pytest.approx(np.mean(list(outcome.per_item["accuracy"].values())))
    assert outcome.interval.low <= outcome.value <= outcome.interval.high
    assert len(encoder.encoded) <= outcome.counts["train"] + 80
    with pytest.raises(ValueError, match="unknown metric 'auc'"):
        evaluate_classification(vectors(kind="classification"), train, test, metric="auc")


def test_clustering_protocols():
    texts, labels = labelled(400, 0)
    encoder = WordEncoder()
    outcome = evaluate_clustering(vectors(encoder, kind="clustering"), texts, labels, fraction=0.25, sample=500)
    assert outcome.counts["texts"] == 100
    assert len(encoder.encoded) <= 100
    assert outcome.value > 0.5
    again = evaluate_clustering(vectors(kind="clustering"), texts, labels, fraction=0.25, sample=500)
    assert again.value == outcome.value
    sets = evaluate_clustering_sets(vectors(kind="clustering"), [(texts[:100], labels[:100]), (["x"] * 3, [1, 1, 1])])
    assert sets.details["per_experiment"][1] == 1.0
    with pytest.raises(ValueError, match="max_documents"):
        evaluate_clustering(vectors(kind="clustering"), texts[:3], labels[:3])


def test_each_distinct_text_is_encoded_once():
    encoder = WordEncoder()
    values = vectors(encoder).documents(["a", "b", "a", "a"])
    assert sorted(encoder.encoded) == ["a", "b"]
    np.testing.assert_array_equal(values[0], values[2])


def test_cache_serves_a_second_run_and_tells_prompts_and_models_apart(tmp_path):
    first = WordEncoder(PromptConfig(query="query: "))
    cache = VectorCache(tmp_path, first.fingerprint, first.width)
    expected = vectors(first, cache=cache).documents(["a", "b"])
    again = WordEncoder(PromptConfig(query="query: "))
    reopened = vectors(again, cache=VectorCache(tmp_path, again.fingerprint, again.width))
    np.testing.assert_array_equal(reopened.documents(["b", "a"]), expected[::-1])
    assert again.encoded == []
    reopened.queries(["a"])
    assert again.encoded == ["query: a"]
    other = WordEncoder(fingerprint="other")
    vectors(other, cache=VectorCache(tmp_path, other.fingerprint, other.width)).documents(["a"])
    assert other.encoded == ["a"]


def test_cache_survives_a_torn_write(tmp_path):
    encoder = WordEncoder()
    expected = vectors(encoder, cache=VectorCache(tmp_path, "words", 48)).documents(["a", "b"])
    rows, keys = next(tmp_path.glob("*/vectors.f32")), next(tmp_path.glob("*/keys.bin"))
    keys.write_bytes(keys.read_bytes()[:20])  # the second key did not reach the disk whole
    rows.write_bytes(rows.read_bytes() + b"torn")
    torn = WordEncoder()
    values = vectors(torn, cache=VectorCache(tmp_path, "words", 48)).documents(["a", "b", "c"])
    np.testing.assert_array_equal(values[:2], expected)
    assert sorted(torn.encoded) == ["b", "c"]
    assert len(VectorCache(tmp_path, "words", 48)) == 3
