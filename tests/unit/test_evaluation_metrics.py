import pytest

from openembed.evaluation.metrics import canonical, parse_metric, per_query


def test_ties_are_broken_by_document_id_descending():
    qrels = {"q": {"a": 1}}
    for order in (("a", "b", "c"), ("c", "b", "a")):
        scores = per_query({"q": dict.fromkeys(order, 1.0)}, qrels, ["ndcg_at_10", "mrr_at_10", "mrr_at_2"])
        assert {name: values["q"] for name, values in scores.items()} == pytest.approx(
            {"ndcg_at_10": 0.5, "mrr_at_10": 1 / 3, "mrr_at_2": 0.0}
        )


def test_judged_queries_without_a_ranking_score_zero_and_others_are_left_out():
    scores = per_query(
        {"q": {"a": 1.0}, "unjudged": {"a": 1.0}, "empty": {}}, {"q": {"a": 1}, "p": {"a": 1}, "empty": {"b": 1}}
    )
    assert scores["ndcg_at_10"] == {"q": 1.0, "p": 0.0, "empty": 0.0}


def test_gain_is_linear():
    scores = per_query({"q": {"a": 2.0, "b": 1.0}}, {"q": {"a": 1, "b": 3}}, ["ndcg_at_10"])
    log3 = 1.584962500721156
    assert scores["ndcg_at_10"]["q"] == pytest.approx((1 + 3 / log3) / (3 + 1 / log3))


def test_names():
    assert canonical("nDCG@10") == "ndcg_at_10"
    assert parse_metric("hit_rate_at_5") == ("hit_rate", 5)
    for wrong in ("ndcg", "ndcg_at_0", "bleu_at_3", "ndcg_at_x"):
        with pytest.raises(ValueError, match="ndcg, map, recall"):
            parse_metric(wrong)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="query 'q', document 'a'"):
        per_query({"q": {"a": float("nan")}}, {"q": {"a": 1}})


def test_no_judgements_is_an_error():
    with pytest.raises(ValueError, match="no judgements"):
        per_query({"q": {"a": 1.0}}, {})
