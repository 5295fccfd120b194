"""Filters over a segment's columns mean what they mean for one document alone."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.index.columns import ColumnsWriter, SegmentColumns
from openembed.index.filters import holds, parse_filter, parse_where
from openembed.records import Document

FIELDS = ["a", "b", "c.d"]
numbers = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, 1.0, -2.5, 2**53]))
strings = st.sampled_from(["", "x", "y", "zażółć", "1", "true"])
scalars = st.one_of(numbers, strings, st.booleans())
values = st.one_of(scalars, st.none(), st.lists(scalars, max_size=3))
metadata = st.fixed_dictionaries(
    {}, optional={"a": values, "b": values, "c": st.fixed_dictionaries({}, optional={"d": values})}
)
bound = st.one_of(numbers, strings)
condition = st.one_of(
    scalars,
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), bound, min_size=1, max_size=3),
    st.fixed_dictionaries({"in": st.lists(scalars, max_size=3)}),
    st.fixed_dictionaries({"exists": st.booleans()}),
)
leaf = st.dictionaries(st.sampled_from([*FIELDS, "none"]), condition, max_size=2)
filters = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"and": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"or": st.lists(inner, max_size=3)}),
    ),
    max_leaves=5,
)


@settings(max_examples=120, deadline=None)
@given(st.lists(metadata, max_size=12), filters)
def test_columns_agree_with_one_document_at_a_time(rows, wanted):
    documents = [Document(str(number), "", metadata=row) for number, row in enumerate(rows)]
    writer = ColumnsWriter()
    for document in documents:
        writer.add(document.metadata)
    parsed = parse_filter(wanted)
    with tempfile.TemporaryDirectory() as folder:
        writer.write(Path(folder))
        found_N = parsed.matching(SegmentColumns(Path(folder)))
    assert found_N.tolist() == [holds(parsed, document) for document in documents]


ROW = Document("d", "", metadata={"lang": "en", "year": 2005, "tags": ["a", 7], "draft": False, "author": {"name": "Ada"}})


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, True),
        ({"lang": "en"}, True),
        ({"lang": "pl"}, False),
        ({"lang": "en", "year": {"gte": 2005, "lt": 2006}}, True),
        ({"year": {"gt": 2005}}, False),
        ({"year": "2005"}, False),
        ({"year": 2005.0}, True),
        ({"draft": False}, True),
        ({"draft": 0}, False),
        ({"tags": "a"}, True),
        ({"tags": {"in": ["b", 7]}}, True),
        ({"tags": {"in": []}}, False),
        ({"author.name": {"gte": "A", "lt": "B"}}, True),
        ({"url": {"exists": False}}, True),
        ({"not": {"url": "x"}}, True),
        ({"or": [{"lang": "pl"}, {"year": 2005}]}, True),
        ({"and": [{"lang": "en"}, {"not": {"year": 2005}}]}, False),
        ({"or": []}, False),
        ({"and": []}, True),
    ],
)
def test_what_filters_mean(wanted, expected):
    assert holds(parse_filter(wanted), ROW) is expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"year": {"above": 3}}, r"filter\.year\.above: unknown operator 'above'; allowed: gt, gte, lt, lte, in, exists"),
        ({"year": {}}, r"filter\.year: no operator"),
        ({"year": {"gte": True}}, r"filter\.year\.gte: must be a number or a string, got True"),
        ({"year": {"in": 3}}, r"filter\.year\.in: must be a list"),
        ({"year": {"in": [[1]]}}, r"filter\.year\.in\[0\]: must be a string"),
        ({"year": None}, r"filter\.year: must be a string, a finite number"),
        ({"year": float("nan")}, r"must be a string, a finite number, true or false, got nan"),
        ({"url": {"exists": 1}}, r"filter\.url\.exists: must be true or false, got 1"),
        ({"and": {"a": 1}}, r"filter\.and: must be a list"),
        ({"or": [{"a": 1}, 3]}, r"filter\.or\[1\]: must be an object"),
        ("lang", r"filter: must be an object"),
        ({"not": {"x": {"y": 1}}}, r"filter\.not\.x\.y: unknown operator 'y'"),
    ],
)
def test_a_wrong_filter_is_named(wanted, message):
    with pytest.raises(ValueError, match=message):
        parse_filter(wanted)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lang=en", {"lang": "en"}),
        ("year>=2000", {"year": {"gte": 2000}}),
        ("year < 2000.5", {"year": {"lt": 2000.5}}),
        ('zip="0100"', {"zip": "0100"}),
        ("draft=false", {"draft": False}),
        ("lang=en|pl", {"lang": {"in": ["en", "pl"]}}),
        ("lang!=en", {"not": {"lang": "en"}}),
        ("text=a=b", {"text": "a=b"}),
    ],
)
def test_where(text, expected):
    assert parse_where(text) == expected


@pytest.mark.parametrize("text", ["", "lang", "=x", ">3"])
def test_a_wrong_where_is_refused(text):
    with pytest.raises(ValueError, match="is no condition; write field=value"):
        parse_where(text)


def test_a_damaged_file_is_named(tmp_path):
    writer = ColumnsWriter()
    writer.add({"a": 1, "b": "x"})
    writer.write(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for damaged in (whole[:-1], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                SegmentColumns(tmp_path)
        path.write_bytes(whole)
    assert np.array_equal(SegmentColumns(tmp_path).equal("a", 1), [0])
