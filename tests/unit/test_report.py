"""The report: self-contained, complete, honest, and safe with hostile text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openembed.recipe.config import load_recipe
from openembed.recipe.report import comparisons, finals
from openembed.report import Cost, Hit, Report, Score, Search, TaskScores, TrainingRun, render, verdicts, write_report
from openembed.report.charts import thin, ticks
from openembed.report.page import highlight
from openembed.report.sections import evaluation_figures, padding_avoided, tokens_per_second, training_figures
from openembed.report.tradeoff import Point, frontier, log_ticks, scatter, tradeoff_figures

SYSTEMS = ("untrained", "stage 1", "stage 2", "BM25")
SECTIONS = ("scores", "evaluation", "searches", "loss", "sources", "similarity", "batches", "recipe", "environment")
VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects attributes and ids."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.tags = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.ids.add(attributes.get("id"))
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def histogram(center):
    return {
        "count": 10,
        "mean": center,
        "histogram": [10 if index == int((center + 1) * 20) else 0 for index in range(40)],
    }


def row(step, **changes):
    similarity = {"positive": histogram(0.6), "hard": histogram(0.3), "in_batch": histogram(0.0)}
    return {
        "step": step, "loss": 4.0 / step, "loss_by_source": {"medquad": 3.0 / step, "squad": 2.0}, "lr": 1e-3 / step,
        "tokens": 900, "padded_tokens": 1200, "seconds": 0.5, "false_negatives_masked": step % 3,
        "similarity": similarity,
    } | changes  # fmt: skip


def tasks(**final):
    scores = {"untrained": Score(0.1, 0.05, 0.15), "stage 1": Score(0.4), "stage 2": Score(0.5, 0.45, 0.55)}
    return [
        TaskScores("medquad", "nDCG@10", scores | {"BM25": Score(0.7, 0.65, 0.75)}),
        TaskScores("squad", "nDCG@10", scores | {"BM25": Score(0.3, 0.25, 0.35)}),
        TaskScores("captions", "Spearman", scores),
    ]


@pytest.fixture
def report():
    return Report(
        title="A run",
        systems=SYSTEMS,
        tasks=tasks(),
        comparisons=[("stage 2", "untrained")],
        finals=["stage 2"],
        training=[TrainingRun("stage 1", [row(n) for n in range(1, 30)]), TrainingRun("stage 2", [row(1), row(2)])],
        searches=[Search("what is asthma", "stage 2", [Hit(0.9, "Asthma is <b>bad</b> & common", "Asthma")])],
        recipe="title = 'x'",
        environment={"seed": "1", "command": "openembed demo"},
    )


def parsed(page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


def test_page_is_well_formed_self_contained_and_has_every_section(report):
    page = render(report)
    outline = parsed(page)
    assert set(SECTIONS) <= outline.ids
    assert all(reference.startswith("#") and reference[1:] in outline.ids for reference in outline.references)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img", page)


def test_every_chart_is_described_and_has_its_numbers(report):
    outline = parsed(render(report))
    charts = [attributes for tag, attributes in outline.tags if tag == "svg"]
    # loss, rate, 2 sources, 3 tasks, 3 + 2 similarity moments, masked, padding, speed
    assert len(charts) == 1 + 1 + 2 + 3 + 5 + 3
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 10 for chart in charts)
    assert sum(tag == "details" for tag, _ in outline.tags) == len(charts) + 1
    assert sum(tag == "figure" for tag, _ in outline.tags) == len(charts)


def test_headline_marks_the_best_of_each_row_and_says_where_the_baseline_is_ahead(report):
    page = render(report)
    assert page.count("★</span>") == 3
    lines = verdicts(report)
    assert lines[0] == "After stage 2 the model is better than untrained on 3 of 3 tasks."
    assert lines[1:] == ["BM25 is ahead of stage 2 on medquad: 0.700 against 0.500."]
    assert all(line in page for line in lines)


def test_a_loss_of_the_model_is_said():
    worse = TaskScores("sts", "Spearman", {"untrained": Score(0.5), "stage 2": Score(0.4)})
    lines = verdicts(Report("x", systems=("untrained", "stage 2"), tasks=[worse], comparisons=[("stage 2", "untrained")]))
    assert lines == ["After stage 2 the model is better than untrained on 0 of 1 tasks. It is not better on: sts."]


def test_a_gain_within_the_intervals_is_said():
    scores = {"untrained": Score(0.50, 0.45, 0.55), "stage 2": Score(0.53, 0.48, 0.58)}
    tasks, pairs = [TaskScores("sts", "Spearman", scores)], [("stage 2", "untrained")]
    lines = verdicts(Report("x", systems=("untrained", "stage 2"), tasks=tasks, comparisons=pairs))
    assert lines == [
        "After stage 2 the model is better than untrained on 1 of 1 tasks. It is better, but not beyond chance, on: sts."
    ]


def test_models_that_were_not_trained_are_held_against_the_baseline_alone():
    scores = {"one": Score(0.3), "other": Score(0.6), "BM25": Score(0.5)}
    lines = verdicts(Report("x", systems=("one", "other", "BM25"), tasks=[TaskScores("t", "nDCG@10", scores)]))
    assert lines == ["BM25 is ahead of one on t: 0.500 against 0.300."]


def test_a_smoke_run_says_what_its_scores_are():
    assert verdicts(Report("x", smoke=True)) == ["smoke: scores mean nothing"]


def compared(name, *settings):
    recipe = load_recipe(name, settings)
    return comparisons(recipe), finals(recipe)


def test_each_training_is_held_against_what_it_started_from():
    crisp = [("crisp", "post_hoc"), ("tail", "last"), ("more", "multi_vector")]
    assert compared("crisp_small") == (crisp, ["crisp", "tail", "more"])
    assert compared("inference_free_sparse_small") == ([("distil", "idf")], ["distil"])
    assert compared("xtr_small") == ([("maxsim", "untrained"), ("xtr", "untrained")], ["maxsim", "xtr"])
    assert compared("vdr_small") == ([("train", "untrained")], ["train"])


def test_a_second_stage_is_held_against_the_base_too():
    both = [("stage1", "openembed-nano"), ("stage2", "stage1"), ("stage2", "openembed-nano")]
    assert compared("demo") == (both, ["stage2"])
    last = compared("demo", 'stage.evaluate.models=["openembed-nano", "stage2"]')
    assert last == ([("stage2", "openembed-nano")], ["stage2"])


def test_what_the_untrained_encoder_was_made_from_counts_where_nothing_nearer_is_scored():
    pairs, _ = compared("xtr_small", 'stage.evaluate.models=["maxsim", "openembed-nano", "bm25"]')
    assert pairs == [("maxsim", "openembed-nano")]
    assert compared("xtr_small", 'stage.evaluate.models=["openembed-nano", "bm25"]') == ([], [])


def test_overlapping_intervals_are_said():
    close = {"stage 2": Score(0.50, 0.45, 0.55), "BM25": Score(0.53, 0.48, 0.58)}
    lines = verdicts(Report("x", systems=("stage 2", "BM25"), tasks=[TaskScores("t", "nDCG@10", close)]))
    assert lines == ["BM25 is ahead of stage 2 on t: 0.530 against 0.500 (within chance)."]


def test_an_empty_report_still_renders():
    outline = parsed(render(Report("nothing")))
    assert set(SECTIONS) <= outline.ids


@given(st.text(), st.text())
def test_highlight_escapes_everything_and_loses_nothing(text, query):
    marked = highlight(text, query)
    plain = re.sub("</?mark>", "", marked)
    assert "<" not in plain
    import html

    assert html.unescape(plain) == html.unescape(html.escape(text))


def test_highlight_marks_words_of_the_query():
    assert highlight("The asthma of asthmatics", "what is ASTHMA") == "The <mark>asthma</mark> of asthmatics"


def test_hostile_text_stays_text():
    evil = "</title><script>alert(1)</script>"
    hit = Hit(0.1, evil, evil)
    page = render(Report(evil, summary=evil, recipe=evil, searches=[Search(evil, evil, [hit])], environment={evil: evil}))
    assert "<script" not in page


def test_padding_and_speed_are_computed_from_the_row():
    assert padding_avoided({"tokens": 75, "padded_tokens": 100}) == 25.0
    assert tokens_per_second({"tokens": 100, "seconds": 0.5}) == 200.0
    assert padding_avoided({"tokens": 75}) is None
    assert tokens_per_second({}) is None


def test_a_second_stage_goes_on_where_the_first_ended():
    figures = training_figures([("a", [row(1), row(10)]), ("b", [row(1), row(5)])])
    axis = re.findall(r'text-anchor="middle">(\d+)<', figures["loss"][0].svg)
    assert max(map(int, axis)) > 10
    assert figures["loss"][0].svg.count("<polyline") == 2


def test_evaluation_over_time_uses_the_scores_taken_while_training():
    watched = [row(1, evaluation={"medquad": 0.2}), row(10, evaluation={"medquad": 0.3})]
    run = [TrainingRun("stage 1", watched), TrainingRun("stage 2", [row(5, evaluation={"medquad": 0.35})])]
    page = render(Report("x", systems=SYSTEMS, tasks=tasks()[:1], training=run))
    cells = re.findall(r"<tr><td>(step [^<]*|BM25)</td><td>([\d.]+)</td></tr>", page)
    expected = [("step 0", "0.1000"), ("step 1", "0.2000"), ("step 10", "0.3000"), ("step 15", "0.3500"), ("BM25", "0.7000")]
    assert cells == expected


def test_evaluation_joins_a_model_with_the_one_it_was_made_from_alone():
    """Of two stages that both start from the untrained model, the later one does not go on from the earlier."""
    states, scores = ("untrained", "tail", "crisp"), {"untrained": 0.3, "tail": 0.1, "crisp": 0.5}
    made_from = {"tail": "untrained", "crisp": "untrained"}
    branching, chain = (evaluation_figures([], states, "BM25", {"t": scores}, made)[0].svg for made in (made_from, None))
    starts = [points.split()[0] for points in re.findall(r'<polyline[^>]*points="([^"]+)"', branching)]
    assert len(starts) == 2
    assert len(set(starts)) == 1
    assert chain.count("<polyline") == 1


@given(st.lists(st.floats(-1e6, 1e6), max_size=1000))
def test_thinning_keeps_the_mean_and_drops_what_is_not_finite(values):
    points = list(enumerate(values))
    kept = thin([*points, (0, float("nan"))])
    assert len(kept) <= 160
    if len(points) <= 160:
        assert [y for _, y in kept] == values


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_even_and_within(low, span):
    values = ticks(low, low + span)
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) + 1e-9 for value in values)
    assert len(values) <= 12


def test_write_report_makes_one_file(report, tmp_path):
    path = write_report(report, tmp_path / "out" / "report.html")
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == render(report)


def test_paired_tests_decide_where_there_are_any():
    scores = {"untrained": Score(0.45, 0.40, 0.50), "stage 2": Score(0.54, 0.49, 0.59), "BM25": Score(0.56, 0.5, 0.6)}
    task = TaskScores("scifact", "nDCG@10", scores, p_values={("stage 2", "untrained"): 0.0004, ("stage 2", "BM25"): 0.3})
    pairs, systems = [("stage 2", "untrained")], ("untrained", "stage 2", "BM25")
    lines = verdicts(Report("x", systems=systems, tasks=[task], comparisons=pairs, finals=["stage 2"]))
    assert lines == [
        "After stage 2 the model is better than untrained on 1 of 1 tasks (paired tests, p ≤ 0.0004).",
        "BM25 is ahead of stage 2 on scifact: 0.560 against 0.540 (within chance).",
    ]


COSTS = {
    "stage 2": Cost(1024.0, 3.1, 256, "dimensions"),
    "BM25": Cost(480.0, 0.4, 60, "terms"),
    "stage 1": Cost(1024.0, 3.0, 256, "dimensions"),
    "untrained": Cost(1024.0),
}


def test_quality_is_shown_over_bytes_and_milliseconds(report):
    assert 'id="costs"' not in render(report)
    assert 'href="#costs"' not in render(report)
    costly = [replace(task, costs=COSTS) for task in report.tasks[:1]]
    page = render(replace(report, tasks=[*costly, *report.tasks[1:]]))
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert "costs" in outline.ids
    assert "medquad: nDCG@10 and bytes a document" in page
    assert "medquad: nDCG@10 and milliseconds a query" in page
    assert "squad: nDCG@10 and bytes" not in page
    assert "60 terms" in page


def test_a_cost_that_all_share_or_one_alone_has_is_no_chart():
    scores = {"a": (0.5, None, None), "b": (0.6, 0.5, 0.7)}
    systems = ["a", "b"]
    assert tradeoff_figures("t", "m", scores, {"a": Cost(100.0, 1.0), "b": Cost(100.0)}, systems) == []
    assert tradeoff_figures("t", "m", scores, {"a": Cost(100.0, 1.0)}, systems) == []
    (bytes_only,) = tradeoff_figures("t", "m", scores, {"a": Cost(100.0, 1.0), "b": Cost(200.0)}, systems)
    assert bytes_only.rows == (("a", "0.500", "100", ""), ("b", "0.600", "200", ""))


def test_the_frontier_is_what_no_cheaper_one_equals():
    points = [
        Point(name, x, y) for name, x, y in [("a", 10, 0.5), ("b", 5, 0.4), ("c", 20, 0.5), ("d", 40, 0.6), ("e", 5, 0.3)]
    ]
    assert [point.name for point in frontier(points)] == ["b", "a", "d"]


def test_names_of_near_points_do_not_cover_one_another():
    points = [Point(f"system {n}", 100 + n, 0.5 + 0.002 * n) for n in range(4)]
    places = re.findall(r'class="name" x="([\d.-]+)" y="([\d.-]+)"', scatter("t", points, "bytes"))
    boxes = [(float(x), float(y) - 10, float(x) + 6 * 8, float(y)) for x, y in places]
    for one, other in combinations(boxes, 2):
        assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])
    assert all(left >= 0 and right <= 360 for left, _, right, _ in boxes)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.2), (90.0, 1100.0), (0.003, 800.0)])
def test_logarithmic_ticks_are_round_and_within(low, high):
    found = log_ticks(low, high)
    assert len(found) >= 1
    assert all(low <= value <= high for value in found)
