import pytest

from openembed.integrations.conditions import holds, parse_conditions

BOOK = {"lang": "en", "year": 2001, "tags": ["a", "b"], "price": 9.5, "new": True, "empty": [], "none": None}


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
        ({"lang": {"in": ["de", "en"]}}, True),
        ({"lang": {"in": []}}, False),
        ({"year": {"gte": 2001, "lt": 2002}}, True),
        ({"year": {"gt": 2001}}, False),
        ({"year": {"lt": "3000"}}, False),
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
    assert holds(parse_conditions(given), BOOK) is expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lang", "a filter is an object"),
        ({"and": {"a": 1}}, "'and' takes a list of filters"),
        ({"not": ["a"]}, "a filter is an object"),
        ({"a": {"in": "abc"}}, "'in' takes a list"),
        ({"a": {"exists": 1}}, "'exists' takes true or false"),
        ({"a": {"near": 3}}, r"'a': .* is not known; use a value"),
        ({"a": {}}, "is not known"),
        ({"a": {"gte": 1, "in": [1]}}, "is not known"),
        ({"a": {"gte": 1, "lt": "x"}}, "bounds are numbers, or all strings"),
        ({"a": {"gte": True}}, "bounds are numbers, or all strings"),
        ({"a": None}, "values are strings, numbers and booleans, got None"),
        ({"a": ["x"]}, "values are strings, numbers and booleans"),
        ({"a": {"in": [{"x": 1}]}}, "values are strings, numbers and booleans"),
    ],
)
def test_what_is_no_filter_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        parse_conditions(given)
