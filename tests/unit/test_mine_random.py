"""Negatives drawn at random: no teacher, a pure function of the seed, known positives excluded all the same."""

from collections import Counter

from openembed.data.margin import MarginConfig
from openembed.data.mine import MineConfig, mine
from openembed.records import Document, Example, Query


def examples(count):
    return [Example(Query(str(n), f"question {n}"), (Document(str(n), f"answer {n}"),)) for n in range(count)]


def mined(seed, block=1024):
    config = MineConfig(teacher="random", keep=3, pool=3, filter=MarginConfig(kind="none"), seed=seed, block=block)
    return mine(examples(200), [], config)


def negatives(result):
    return [[document.id for document in example.negatives] for example in result.examples]


def test_random_negatives_are_spread_evenly_and_never_the_positive():
    result = mined(1)
    drawn = negatives(result)
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert all(example.query.id not in ids for example, ids in zip(result.examples, drawn, strict=True))
    counts = Counter(name for ids in drawn for name in ids)
    assert len(counts) > 150, "600 draws from 200 documents reach most of them"
    assert max(counts.values()) < 15
    assert {note["mined"]["teacher"] for note in result.notes} == {"random"}


def test_random_negatives_depend_on_the_seed_alone():
    assert negatives(mined(1)) == negatives(mined(1, block=7))
    assert negatives(mined(1)) != negatives(mined(2))
