"""Evaluation texts and duplicates in training data: planted ones are found, near misses are kept."""

import json
import random

import pytest

from openembed.data.clean import clean
from openembed.data.evaluation_texts import EvaluationSet, read_evaluation_texts
from openembed.data.filter import Decontaminator, FilterConfig
from openembed.records import Document, Example, Query

DISEASES = ["gout", "asthma", "measles", "rabies", "cholera", "tetanus", "malaria", "scurvy", "rickets", "lupus", "mumps"]
SENTENCE = "The quick measurements of river depth were repeated at dawn on nine consecutive days by two trained observers"
PARAGRAPH = f"Hydrology needs patience. {SENTENCE} before anyone compared them with the old tables."


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def beir(folder, queries, documents, judged, split="test"):
    write(folder / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(queries)])
    write(
        folder / "corpus.jsonl", [{"_id": f"d{n}", "title": title, "text": text} for n, (title, text) in enumerate(documents)]
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"q{query}\td{document}\t1" for query, document in judged)]
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def known(*texts, tmp_path=None, **settings):
    path = write(tmp_path / "known.jsonl", [{"text": text} for text in texts])
    return Decontaminator(read_evaluation_texts([EvaluationSet(name="known", path=str(path))]), FilterConfig(**settings))


def reasons(finder, *texts):
    return [match and match.reason for match in finder.find(texts)]


def test_each_kind_of_contamination_is_found_and_its_near_miss_kept(tmp_path):
    rephrased = "Why does my premium card get declined by the ferry ticket machine?"
    fillers = [f"Filler text number {n} about {word} and nothing else" for n, word in enumerate(DISEASES)]
    short = "Two brown dogs and a small cat sleep beside the warm kitchen stove"
    finder = known("Is Gout inherited?", SENTENCE, short, rephrased, *fillers, tmp_path=tmp_path)
    planted = {
        "is gout – INHERITED": "exact",
        PARAGRAPH: "contains",
        f"{short.lower().replace('stove', 'oven')}.": "near_duplicate",
        "By the ferry ticket machine my premium card gets declined, why does it?": "bm25",
    }
    assert reasons(finder, *planted) == list(planted.values())
    kept = [
        "Is gout inherited from the mother?",
        " ".join(SENTENCE.split()[:12]),
        "Two brown dogs and a small cat run across the wide kitchen floor",
        "Why does my premium card arrive late?",
        "My train ticket was declined at the station office by a rude clerk",
        "",
        "...",
    ]
    assert reasons(finder, *kept) == [None] * len(kept)


def test_a_match_says_where_and_how_much(tmp_path):
    finder = known(SENTENCE, "Is Gout inherited?", tmp_path=tmp_path)
    exact, contains = finder.find(["is gout inherited", PARAGRAPH])
    assert (exact.score, exact.set, exact.text) == (1.0, "known", "Is Gout inherited?")
    assert (contains.score, contains.text) == (len(SENTENCE.split()), SENTENCE.lower())


def test_the_longest_run_is_reported_and_runs_do_not_cross_texts(tmp_path):
    words = [f"w{n}" for n in range(40)]
    finder = known(" ".join(words[:10]), " ".join(words[10:40]), tmp_path=tmp_path, run=8, tests=("contains",))
    text = " ".join([*words[:9], "x", *words[12:30], "y"])
    (match,) = finder.find([text])
    assert match.score == 18
    assert match.text == " ".join(words[12:30])
    assert reasons(finder, " ".join(words[4:16])) == [None]


def test_questions_of_one_template_are_kept(tmp_path):
    templates = ["What are the symptoms of {} ?", "Is {} inherited ?", "What research is being done for {} ?"]
    finder = known(*(t.format(name) for t in templates for name in DISEASES), tmp_path=tmp_path)
    others = [t.format(name) for t in templates for name in ("anthrax", "epilepsy", "Crohn disease", "sleeping sickness")]
    assert reasons(finder, *others) == [None] * len(others)
    assert set(reasons(finder, *(t.format(name) for t in templates for name in DISEASES))) == {"exact"}


def test_types_that_one_letter_tells_apart_are_no_rephrasing(tmp_path):
    question = "Who treats storage disease type {} ?"
    finder = known(question.format("I"), *DISEASES, tmp_path=tmp_path, tests=("bm25",))
    assert reasons(finder, question.format("I"), question.format("V")) == ["bm25", None]


def test_runs_of_a_template_do_not_count(tmp_path):
    template = "The ontology provides the following list of signs and symptoms for {} if the information is available"
    few = known(*(template.format(name) for name in DISEASES[:2]), tmp_path=tmp_path, tests=("contains",), run=9)
    many = known(*(template.format(name) for name in DISEASES), tmp_path=tmp_path, tests=("contains",), run=9)
    assert reasons(few, template.format("anthrax")) == ["contains"]
    assert reasons(many, template.format("anthrax")) == [None]


def test_a_long_text_that_happens_to_hold_a_questions_words_is_kept(tmp_path):
    finder = known("How do whales sleep under cold polar water?", *DISEASES, tmp_path=tmp_path, terms=3)
    story = "Polar bears walk. How long? Under the moon we do sleep; cold water, whales far away. " + " ".join(
        f"Then sentence {n} tells of something else entirely." for n in range(20)
    )
    assert reasons(finder, story) == [None]


def test_no_evaluation_text_survives_word_for_word(tmp_path):
    chance = random.Random(1)
    vocabulary = [f"word{n}" for n in range(30)] + ["Ärger", "naïve", "日本語", "x"]
    texts = [" ".join(chance.choices(vocabulary, k=chance.randint(1, 30))) for _ in range(200)]
    finder = known(*texts, tmp_path=tmp_path)
    disguised = [text.upper().replace(" ", chance.choice([" ", ", ", " - ", "\n"])) + "!" for text in texts]
    assert set(reasons(finder, *disguised)) == {"exact"}


@pytest.mark.parametrize(("duplicates", "kept"), [("none", 5), ("exact", 4), ("near", 3)])
def test_duplicates_of_texts_keep_the_first_over_all_files(tmp_path, duplicates, kept):
    long = "a b c d e f g h i j k l m n o p q r s t u v w x"
    one = write(tmp_path / "one.jsonl", [{"_id": "1", "text": long}, {"_id": "2", "text": "Short text"}])
    rows = [{"_id": "3", "text": "short TEXT"}, {"_id": "4", "text": f"{long} y"}, {"_id": "5", "text": "other"}]
    two = write(tmp_path / "two.jsonl", rows)
    clean({}, {"one": one, "two": two}, read_evaluation_texts([]), FilterConfig(duplicates=duplicates), tmp_path / "out")
    found = [json.loads(line)["_id"] for name in ("one", "two") for line in (tmp_path / f"out/{name}.jsonl").open()]
    assert len(found) == kept
    assert found[:2] == ["1", "2"]
    assert found[-1] == "5"


def example(query, positives, negatives=(), **scores):
    documents = [tuple(Document("", text) for text in texts) for texts in (positives, negatives)]
    return Example(Query("", query), *documents, **scores)


def test_an_example_falls_with_its_query_or_a_positive_and_loses_only_negatives(tmp_path):
    folder = beir(tmp_path / "set", ["bad question"], [("A title", "bad document"), ("", "never judged")], [(0, 0)])
    examples = [
        example("bad question", ["fine"]),
        example("first", ["fine", "a title: bad document"]),
        example("second", ["Bad document."]),
        example("third", ["fine"], ["never judged", "good"], positive_scores=(0.9,), negative_scores=(0.5, 0.4)),
    ]
    against = read_evaluation_texts([EvaluationSet(name="set", path=str(folder))])
    report = clean({"s": examples}, {}, against, FilterConfig(), tmp_path / "out")
    (row,) = [json.loads(line) for line in (tmp_path / "out/s.jsonl").open()]
    assert row["query"]["text"] == "third"
    assert row["negatives"] == [{"id": "", "text": "good", "score": 0.4}]
    assert report["sources"]["s"] == {"rows": 4, "kept": 1, "removed": {"exact": 3}, "negatives_removed": 1}
    removed = [json.loads(line) for line in (tmp_path / "out/removed.jsonl").open()]
    assert [(row["id"], row["part"]) for row in removed] == [
        ("0", "query"),
        ("1", "positive"),
        ("2", "positive"),
        ("3", "negative"),
    ]
    report = clean({"s": examples}, {}, against, FilterConfig(positives="all"), tmp_path / "out")
    assert report["sources"]["s"]["kept"] == 2
    assert json.loads((tmp_path / "out/s.jsonl").open().readline())["positives"] == [{"id": "", "text": "fine"}]


def test_duplicate_examples_need_query_and_positive_alike(tmp_path):
    question = "which of the many rivers that cross the northern plain is the longest and the deepest"
    answer = "the river that is the longest and the deepest of the northern plain is called the grey one by all"
    rows = [
        example(question, [answer]),
        example(question.upper(), [f"{answer}!"]),  # an exact duplicate
        example(f"{question} now", [f"{answer} there"]),  # a near one
        example(question, ["something else"]),
        example("another question", [answer]),
    ]
    report = clean({"a": rows[:1], "b": rows[1:]}, {}, read_evaluation_texts([]), FilterConfig(), tmp_path / "out")
    assert report["sources"]["a"]["kept"] == 1
    assert report["sources"]["b"]["removed"] == {"duplicate": 1, "near_duplicate_row": 1}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    folder = beir(tmp_path / "set", DISEASES, [("", PARAGRAPH)], [(0, 0)])
    rows = [example(f"about {name}", [f"{SENTENCE} {name}"]) for name in DISEASES] + [example("x", [name]) for name in DISEASES]
    for out in ("one", "two"):
        clean({"s": rows}, {}, read_evaluation_texts([EvaluationSet(path=str(folder))]), FilterConfig(), tmp_path / out)
    names = ("s.jsonl", "removed.jsonl", "report.json")
    assert [(tmp_path / "one" / n).read_bytes() for n in names] == [(tmp_path / "two" / n).read_bytes() for n in names]


def test_a_crash_leaves_no_report(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "fine"}, {"no": "text"}])
    with pytest.raises(ValueError, match=r"t.jsonl:2: 'text' must be a text, got None"):
        clean({}, {"t": path}, read_evaluation_texts([]), FilterConfig(), tmp_path / "out")
    assert not (tmp_path / "out/report.json").exists()


def evaluation_texts(path, **settings):
    return read_evaluation_texts([EvaluationSet(path=str(path), **settings)]).texts


def test_retrieval_folders_give_judged_queries_and_the_documents_asked_for(tmp_path):
    documents = [("", "one"), ("Title", "two"), ("", "three")]
    folder = beir(tmp_path / "set", ["asked", "in training alone"], documents, [(0, 1)])
    beir(tmp_path / "set", ["asked", "in training alone"], documents, [(1, 0)], split="train")
    assert evaluation_texts(folder) == ["asked", "one", "Title two", "three"]
    assert evaluation_texts(folder, documents="judged") == ["asked", "Title two"]
    assert evaluation_texts(folder, documents="none") == ["asked"]
    assert evaluation_texts(folder, splits=("train",), documents="judged") == ["in training alone", "one"]
    assert read_evaluation_texts([EvaluationSet(path=str(folder))]).known["two"] == 2


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"sentence1": "a", "sentence2": "b", "score": 1.0}, ["a", "b"]),
        ({"query": "a", "positive": ["b"], "negative": ["c", "d"]}, ["a", "b", "c", "d"]),
        ({"sentences": ["a", "b"], "labels": [1, 2]}, ["a", "b"]),
        ({"text": "a", "label": 3}, ["a"]),
        ({"query": {"text": "a"}, "candidates": ["b", {"text": "c"}]}, ["a", "b", "c"]),
    ],
)
def test_every_other_layout_gives_the_texts_of_the_evaluated_split(tmp_path, row, texts):
    write(tmp_path / "set/test.jsonl", [row])
    write(tmp_path / "set/train.jsonl", [{"text": "train"}])
    assert evaluation_texts(tmp_path / "set") == texts
    assert evaluation_texts(tmp_path / "set/test.jsonl") == texts
    assert evaluation_texts(tmp_path) == texts, "a folder of sets"
    assert "train" in evaluation_texts(tmp_path / "set", splits=("train", "test"))


def test_rows_are_chosen_by_value_and_column(tmp_path):
    rows = [{"split": "dev", "term": "a", "definition": "b"}, {"split": "train", "term": "c", "definition": "d"}]
    path = write(tmp_path / "glossary.jsonl", rows)
    assert evaluation_texts(path, where={"split": "dev"}, columns=("term", "definition")) == ["a", "b"]


def test_what_is_wrong_with_an_evaluation_set_is_said(tmp_path):
    write(tmp_path / "set/test.jsonl", [{"label": 1}])
    with pytest.raises(ValueError, match="no texts; its rows need one of the columns text, query"):
        evaluation_texts(tmp_path / "set")
    with pytest.raises(ValueError, match="no such file or folder"):
        evaluation_texts(tmp_path / "absent")
    with pytest.raises(ValueError, match="no split 'dev'; it has test"):
        evaluation_texts(tmp_path / "set", splits=("dev",))
    write(tmp_path / "set/test.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="two evaluation sets are named"):
        read_evaluation_texts([EvaluationSet(path=str(tmp_path / "set"))] * 2)


def one_row(name, query="where is the old river bridge"):
    return {name: [Example(Query("1", query), (Document("", "in the town"),), (), name)]}


def test_a_source_of_which_nothing_is_left_does_not_keep_its_old_file(tmp_path):
    known = write(tmp_path / "known.jsonl", [{"text": "Where is the old river bridge?"}])
    nothing, some = read_evaluation_texts([]), read_evaluation_texts([EvaluationSet(path=str(known))])
    clean(one_row("a"), {}, nothing, FilterConfig(), tmp_path / "out")
    clean(one_row("a"), {}, some, FilterConfig(), tmp_path / "out")
    assert (tmp_path / "out" / "a.jsonl").read_text() == ""


def test_a_source_is_not_named_as_the_list_of_removals(tmp_path):
    with pytest.raises(ValueError, match="rename"):
        clean(one_row("removed"), {}, read_evaluation_texts([]), FilterConfig(), tmp_path)


def test_texts_without_words_are_duplicates_only_when_equal(tmp_path):
    path = write(tmp_path / "texts.jsonl", [{"text": text} for text in ("😀", "😡", "😀 ", "+")])
    report = clean({}, {"texts": path}, read_evaluation_texts([]), FilterConfig(), tmp_path / "out")
    assert report["sources"]["texts"]["kept"] == 3


def test_parts_of_an_evaluation_folder_without_texts_are_named(tmp_path):
    write(tmp_path / "sets" / "a" / "test.jsonl", [{"text": "one text"}])
    other = write(tmp_path / "sets" / "b" / "test.jsonl", [{"premise": "another text"}])
    (tmp_path / "sets" / "c").mkdir()
    found = read_evaluation_texts([EvaluationSet(path=str(tmp_path / "sets"))])
    assert found.counts[0]["empty"] == [str(other), str(tmp_path / "sets" / "c")]
