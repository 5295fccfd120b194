import numpy as np
import pytest
from tiny_training import tiny_encoder

from openembed.data.margin import MarginConfig
from openembed.data.mine import MineConfig, mine
from openembed.index.dense import first_places
from openembed.records import Document, Example, Query


class Teacher:
    """Hands out given two-dimensional vectors by text."""

    fingerprint, width, device, computed_in = "toy", 2, "cpu", "float32"

    def __init__(self, angles):
        self.angles = angles
        self.prompts = set()

    def encode(self, texts, *, instruction="", **_options):
        self.prompts.add(instruction)
        return np.array([[np.cos(self.angles[t]), np.sin(self.angles[t])] for t in texts], dtype=np.float32)

    def query_prompt(self, task=None, instruction=None):
        return f"Ask {instruction}: " if instruction else ""

    document_prompt = query_prompt


def angle(cosine):
    return float(np.arccos(cosine))


SCORES = {"q": 1.0, "p1": 0.9, "p2": 0.8, "near": 0.85, "at": 0.765, "hard": 0.7, "far": 0.1, "P1": 0.88, "opposite": -0.9}
TEACHER = Teacher({text: angle(cosine) for text, cosine in SCORES.items()})
CORPUS = [Document(text.upper() if text != "P1" else "copy", text) for text in SCORES]
BOTH = Example(Query("1", "q"), (Document("P1", "p1"), Document("P2", "p2")), (), "s")


def texts(result):
    return [document.text for document in result.examples[0].negatives]


def counts(result):
    return {name: result.report[name] for name in ("queries", "negatives", "without_negatives", "refused")}


def test_percent_of_the_lowest_positive():
    result = mine([BOTH], CORPUS, MineConfig(), TEACHER)  # ceiling 0.8 · 0.95 = 0.76
    assert texts(result) == ["hard", "far", "opposite"]
    assert result.notes == [{"mined": {"teacher": "toy", "policy": "percent 0.95", "ranks": [3, 4, 5]}}]
    assert counts(result) == {"queries": 1, "negatives": 3, "without_negatives": 0, "refused": 2}
    assert result.report["passed"] == {"known_positive": 2, "equal_text": 2}  # p1, p2; the query and the copy of p1
    example = result.examples[0]
    np.testing.assert_allclose(example.positive_scores, [0.9, 0.8], atol=1e-6)
    np.testing.assert_allclose(example.negative_scores, [0.7, 0.1, -0.9], atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"kind": "none"}, ["near", "at", "hard", "far", "opposite"]),
        ({"kind": "margin", "value": 0.02}, ["at", "hard", "far", "opposite"]),
        ({"kind": "absolute", "value": 0.5}, ["far", "opposite"]),
        ({"kind": "percent", "value": 0.01}, ["opposite"]),
    ],
)
def test_filters(rule, expected):
    assert texts(mine([BOTH], CORPUS, MineConfig(filter=rule), TEACHER)) == expected


def test_keep_pool_and_skip():
    none = {"kind": "none"}
    assert texts(mine([BOTH], CORPUS, MineConfig(filter=none, keep=2), TEACHER)) == ["near", "at"]
    assert texts(mine([BOTH], CORPUS, MineConfig(filter=none, pool=2, skip=1), TEACHER)) == ["at", "hard"]


def test_positive_score_that_is_not_positive_uses_the_margin():
    example = Example(Query("1", "q"), (Document("OPPOSITE", "opposite"),), (), "s")
    result = mine([example], CORPUS, MineConfig(), TEACHER)  # ceiling -0.9 - 0.05: nothing is below
    assert texts(result) == []
    assert result.report["without_negatives"] == 1
    assert MarginConfig().ceiling(np.array([-0.9, np.nan, 0.5])).tolist() == pytest.approx([-0.95, np.inf, 0.475])


def test_positive_outside_the_corpus_and_small_blocks():
    examples = [BOTH, Example(Query("2", "far"), (Document("x", "hard"),), (), "s")]
    corpus = [document for document in CORPUS if document.text not in ("p1", "hard")]
    whole = mine(examples, corpus, MineConfig(), TEACHER)
    assert texts(whole) == ["hard", "far", "opposite"]
    small = mine(examples, corpus, MineConfig(block=1), TEACHER)
    assert (small.notes, small.report) == (whole.notes, whole.report)
    for one, other in zip(small.examples, whole.examples, strict=True):
        assert (one.negatives, one.positives) == (other.negatives, other.positives)
        np.testing.assert_allclose(one.negative_scores, other.negative_scores, atol=1e-6)


def test_bm25_teacher():
    corpus = [Document(str(n), text) for n, text in enumerate(["red apple pie", "red apple", "green apple", "blue sky"])]
    example = Example(Query("1", "red apple pie"), (corpus[1],), (), "s")
    result = mine([example, Example(Query("2", "zzz"), (corpus[3],), (), "s")], corpus, MineConfig(teacher="bm25"))
    assert texts(result) == ["green apple"], "a document that shares no word is no negative of BM25"
    assert result.examples[1].negatives == ()


def test_encoder_teacher_and_its_absence(tmp_path):
    with pytest.raises(ValueError, match="needs an encoder"):
        mine([BOTH], CORPUS, MineConfig())
    corpus = [Document(str(n), f"w{n} w{n + 1}") for n in range(20)]
    examples = [Example(Query(str(n), f"w{n}"), (corpus[n],), (), "s") for n in range(5)]
    result = mine(examples, corpus, MineConfig(keep=3, filter={"kind": "none"}), tiny_encoder(tmp_path))
    for example in result.examples:
        assert len(example.negatives) == 3
        assert example.positives[0] not in example.negatives
        assert list(example.negative_scores) == sorted(example.negative_scores, reverse=True)


def test_mined_examples_with_a_lone_surrogate_are_written_and_read_back(tmp_path):
    from openembed.data.examples import write_examples
    from openembed.data.sources import SourceConfig, load_source

    documents = [Document("1", "apples x\ud800"), Document("2", "cars red")]
    asked = [Query("q", "cars \ud800"), Query("ü", "ü")]
    rows = [Example(query, (document,), source="s") for query, document in zip(asked, documents, strict=True)]
    mined = mine(rows, documents, MineConfig(teacher="bm25", filter={"kind": "none"}))
    write_examples(tmp_path / "s.jsonl", mined.examples, mined.notes)
    assert load_source(SourceConfig(name="s", path=str(tmp_path / "s.jsonl"))) == mined.examples
    write_examples(tmp_path / "t.jsonl", [Example(Query("ü", "ü"), (documents[1],))])
    assert "ü" in (tmp_path / "t.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [1, 5, 29, 30, 90])
def test_first_places_are_the_stable_order(count):
    scores_N = np.random.default_rng(count).integers(0, 6, 30).astype(np.float32)
    assert first_places(scores_N, count).tolist() == np.argsort(-scores_N, kind="stable")[:count].tolist()


def test_bm25_mines_nothing_among_documents_without_words():
    documents = [Document("1", ""), Document("2", "a")]
    mined = mine([Example(Query("q", "cars"), (documents[0],), source="s")], documents, MineConfig(teacher="bm25"))
    assert counts(mined) == {"queries": 1, "negatives": 0, "without_negatives": 1, "refused": 0}


def test_positives_of_other_rows_of_the_query_are_never_mined():
    rows = [Example(Query("", "q"), (Document("", text),), (), "s") for text in ("p1", "p2")]
    corpus = [Document(str(n), text) for n, text in enumerate(("p1", "p2", "hard", "far"))]
    for example in mine(rows, corpus, MineConfig(filter={"kind": "none"}), TEACHER).examples:
        assert [document.text for document in example.negatives] == ["hard", "far"]


def test_a_positive_without_its_title_is_known_in_the_corpus():
    corpus = [Document("1", "relieves pain", "Aspirin"), Document("2", "relieves swelling", "Ibuprofen")]
    example = Example(Query("", "what relieves"), (Document("", "relieves pain"),), (), "s")
    assert texts(mine([example], corpus, MineConfig(teacher="bm25", filter={"kind": "none"}))) == ["relieves swelling"]


@pytest.mark.parametrize("value", [95, 0, -0.5, float("nan"), float("inf")])
def test_a_percentage_is_a_share(value):
    with pytest.raises(ValueError, match=r"share of the positive|finite"):
        MarginConfig(value=value)


def test_no_fewer_survivors_to_draw_from_than_are_kept():
    with pytest.raises(ValueError, match="cannot draw 20"):
        MineConfig(keep=20, sample="softmax", sample_from=10)
