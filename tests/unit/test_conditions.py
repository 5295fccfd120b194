import pytest

from openembed.integrations.conditions import holds, parse_filter
from openembed.records import Document

BOOK = {
    "lang": "en",
    "year": 2001,
    "tags": ["a", "b"],
    "new": True,
    "empty": [],
    "none": None,
    "by": {"name": "x", "at": [1, 2]},
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"lang": "en"}, True),
        ({"lang": "de"}, False),
        ({"year": 2001.0}, True),
        ({"year": "2001"}, False),
        ({"tags": "b"}, True),
        ({"tags": "c"}, False),
        ({"missing": "x"}, False),
        ({"new": True}, True),
        ({"new": 1}, False),
        ({"by.name": "x"}, True),
        ({"by.at": {"gt": 1}}, True),
        ({"by": {"exists": True}}, False),
        ({"lang": {"in": ["de", "en"]}}, True),
        ({"lang": {"in": []}}, False),
        ({"year": {"gte": 2001, "lt": 2002}}, True),
        ({"year": {"gt": 2001}}, False),
        ({"year": {"lt": "3000"}}, False),
        ({"year": {"gte": 2000, "lt": "3000"}}, False),
        ({"year": {"gte": 2000, "in": [2001]}}, True),
        ({"year": {"gte": 2000, "in": [2002]}}, False),
        ({"by.at": {"gt": 1, "lt": 2}}, False),
        ({"lang": {"gte": "e", "lt": "f"}}, True),
        ({"new": {"gte": 0}}, False),
        ({"year": {"exists": True}}, True),
        ({"empty": {"exists": True}}, False),
        ({"none": {"exists": False}}, True),
        ({"not": {"lang": "en"}}, False),
        ({"not": {"missing": "en"}}, True),
        ({"and": [{"lang": "en"}, {"year": {"lt": 2000}}]}, False),
        ({"or": [{"lang": "de"}, {"year": 2001}]}, True),
        ({"or": []}, False),
        ({"and": []}, True),
        ({"lang": "en", "year": {"lt": 2000}}, False),
    ],
)
def test_what_a_filter_is_true_of(given, expected):
    assert holds(parse_filter(given), Document("b", "text", metadata=BOOK)) is expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lang", "filter: must be an object"),
        ({"and": {"a": 1}}, r"filter\.and: must be a list"),
        ({"not": ["a"]}, r"filter\.not: must be an object"),
        ({"a": {"in": "abc"}}, r"filter\.a\.in: must be a list"),
        ({"a": {"exists": 1}}, r"filter\.a\.exists: must be true or false"),
        ({"or": [{}, {"a": {"near": 3}}]}, r"filter\.or\[1\]\.a\.near: unknown operator 'near'"),
        ({"a": {}}, "no operator"),
        ({"a": {"gte": True}}, "must be a number or a string"),
        ({"a": None}, r"filter\.a: must be a string, a finite number, true or false, got None"),
        ({"a": ["x"]}, "must be a string, a finite number"),
        ({"a": {"in": [{"x": 1}]}}, r"filter\.a\.in\[0\]: must be a string"),
        ({"a": float("nan")}, "a finite number"),
        ({"": 1}, "a field is named by a string"),
    ],
)
def test_what_is_no_filter_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        parse_filter(given)
