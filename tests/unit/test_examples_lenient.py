"""Rows of training data with nulls and scores that are no numbers."""

import pytest

from openembed.data.examples import parse_example


def test_null_fields_are_as_if_missing():
    row = {"query_id": None, "query": {"id": "7", "text": "q"}, "positives": None, "positive": "p", "negatives": None}
    example = parse_example(row, "s", "rows.jsonl:1")
    assert (example.query.id, [document.text for document in example.positives], example.negatives) == ("7", ["p"], ())


@pytest.mark.parametrize("score", ["high", float("nan"), True])
def test_a_score_that_is_no_number_is_named_with_its_line(score):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: positive: 'score'"):
        parse_example({"query": "q", "positive": {"text": "p", "score": score}}, "s", "rows.jsonl:1")
