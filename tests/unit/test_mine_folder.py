"""Mining to a folder: policies, provenance, resuming, and other policies on a kept pool."""

import json
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
from crash import dies_at
from store_fakes import BagOfWords

from openembed.data.journal import Journal
from openembed.data.mine import MineConfig, mine, mine_folder, reapply
from openembed.data.select import PolicyConfig, Ranking, pick
from openembed.records import Document, Example, Query

NONE = {"kind": "none"}
WORDS = ["red", "green", "blue", "apple", "pear", "plum", "pie", "cake", "juice", "sky", "sea", "sun"]


def sentence(number):
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, 5)) + f" {number}"


CORPUS = [Document(f"d{n}", sentence(n)) for n in range(80)]
EXAMPLES = [Example(Query(f"q{n}", sentence(n).rsplit(" ", 1)[0]), (CORPUS[n],), (), "s") for n in range(25)]
CONFIG = MineConfig(keep=4, pool=15, block=4, keep_pool=True, filter={"kind": "percent", "value": 0.9})


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


def run(out, config=CONFIG, **options):
    return mine_folder(EXAMPLES, iter(CORPUS), out, config, BagOfWords(), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("mined")
    run(out)
    return out


def test_the_folder_holds_rows_with_provenance_and_an_audit(whole):
    names = {"mined.jsonl", "audit.json", "meta.json", "pool.jsonl"}
    assert set(contents(whole)) == names | {f"pool/{n}" for n in ("documents.jsonl", "documents.npz", "examples.jsonl")}
    rows = [json.loads(line) for line in (whole / "mined.jsonl").read_text().splitlines()]
    assert [row["query"]["id"] for row in rows] == [example.query.id for example in EXAMPLES]
    for row in rows:
        assert row["mined"]["teacher"] == BagOfWords().fingerprint
        assert row["mined"]["policy"] == "percent 0.9"
        assert len(row["mined"]["ranks"]) == len(row["negatives"])
        assert row["mined"]["ranks"] == sorted(row["mined"]["ranks"])
        ceiling = 0.9 * row["positives"][0]["score"]
        assert all(negative["score"] < ceiling for negative in row["negatives"])
    audit = json.loads((whole / "audit.json").read_text())
    assert audit["queries"] == 25
    assert audit["pool"] == 25 * 15
    assert sum(audit["survivors"]) == 25
    assert sum(audit["histograms"]["kept"]) == audit["negatives"] == sum(len(row["negatives"]) for row in rows)
    assert sum(audit["histograms"]["refused"]) == audit["refused"] > 0
    assert len(audit["samples"]) == 20


def test_killed_at_every_step_to_the_disk_it_ends_with_the_same_bytes(tmp_path):
    def few(out):
        return mine_folder(EXAMPLES[:6], CORPUS[:20], out, CONFIG, BagOfWords())

    few(tmp_path / "whole")
    whole, steps = contents(tmp_path / "whole"), 0
    while dies_at(steps, partial(few, tmp_path / f"{steps}")):
        few(tmp_path / f"{steps}")
        assert contents(tmp_path / f"{steps}") == whole, f"killed at step {steps}"
        steps += 1 if steps > 30 else 4  # the first are those of bulk encoding, which has its own test
    assert steps > 40


def test_sigkill_at_any_moment_and_again_while_resuming(tmp_path, whole):
    out, kills = tmp_path / "out", 0
    for attempt in range(200):
        child = os.fork()
        if child == 0:
            try:
                run(out)
            finally:
                os._exit(0)
        time.sleep(0.004 * (attempt + 1))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if (out / "meta.json").exists():
            break
    run(out)
    assert kills > 2
    assert contents(out) == contents(whole)


def test_the_same_again_returns_at_once_and_other_settings_are_refused(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    encoder = BagOfWords()
    mine_folder(EXAMPLES, CORPUS, tmp_path, CONFIG, encoder)
    assert (encoder.encoded, contents(tmp_path)) == (0, before)
    other = CONFIG.model_copy(update={"keep": 3})
    with pytest.raises(ValueError, match="begun with something else"):
        run(tmp_path, other)
    run(tmp_path, other, restart=True)
    assert contents(tmp_path) != before


@pytest.mark.parametrize(
    "policy",
    [
        {"filter": NONE},
        {"filter": {"kind": "margin", "value": 0.3}},
        {"filter": {"kind": "absolute", "value": 0.5}, "skip": 3, "pool": 12},
        {"sample": "softmax", "sample_from": 10},
        {"short": "relax", "filter": {"kind": "percent", "value": 0.5}},
        {"short": "drop", "filter": {"kind": "percent", "value": 0.3}},
    ],
)
def test_another_policy_on_the_kept_pool_equals_mining_anew(tmp_path, whole, policy):
    policy = PolicyConfig(keep=3, **{"pool": 15, **policy})
    again = [(e, note) for e, note in reapply(whole, tmp_path / "again", policy).rows()]
    anew = MineConfig(**policy.model_dump(), block=4)
    expected = mine(EXAMPLES, CORPUS, anew, BagOfWords())
    if policy.short == "relax":  # the pool is not left
        for (one, _), other in zip(again, expected.examples, strict=True):
            assert one.negatives == other.negatives[: len(one.negatives)]
    else:
        assert again == list(zip(expected.examples, expected.notes, strict=True))


def test_reapply_says_what_it_cannot_do(tmp_path, whole):
    with pytest.raises(ValueError, match="deeper than what was kept"):
        reapply(whole, tmp_path, PolicyConfig(pool=16))
    with pytest.raises(ValueError, match="mine anew"):
        reapply(whole, tmp_path, PolicyConfig(pool=10, short="random"))
    run(tmp_path / "bare", CONFIG.model_copy(update={"keep_pool": False}))
    assert set(contents(tmp_path / "bare")) == {"mined.jsonl", "audit.json", "meta.json"}
    with pytest.raises(ValueError, match="keep_pool"):
        reapply(tmp_path / "bare", tmp_path / "x", PolicyConfig())


@pytest.mark.parametrize("teacher", ["encoder", "bm25"])
def test_what_becomes_of_queries_with_too_few_survivors(teacher):
    base = MineConfig(teacher=teacher, keep=6, pool=8, filter={"kind": "percent", "value": 0.6})
    results = {
        short: mine(EXAMPLES, CORPUS, base.model_copy(update={"short": short}), BagOfWords())
        for short in ("keep", "relax", "random", "drop")
    }
    lengths = {name: [len(example.negatives) for example in result.examples] for name, result in results.items()}
    assert min(lengths["keep"]) < 6
    assert set(lengths["relax"]) == {6}
    assert set(lengths["random"]) == {6}
    assert lengths["drop"] == [6] * lengths["keep"].count(6)
    assert results["drop"].report["dropped"] == sum(length < 6 for length in lengths["keep"]) > 0
    deep = mine(EXAMPLES, CORPUS, base.model_copy(update={"pool": 80}), BagOfWords())
    for relaxed, random, kept, best in zip(
        *(results[name].examples for name in ("relax", "random", "keep")), deep.examples, strict=True
    ):
        ceiling = 0.6 * min(relaxed.positive_scores)
        assert relaxed.negatives == best.negatives  # the best below the ceiling, however deep
        assert relaxed.negatives[: len(kept.negatives)] == random.negatives[: len(kept.negatives)] == kept.negatives
        assert max(relaxed.negative_scores + random.negative_scores) < ceiling
        assert len({d.id for d in random.negatives} | {relaxed.positives[0].id}) == 7


def test_sampling_follows_scores_and_seed():
    ranking = Ranking(np.arange(30), np.linspace(0.9, 0.3, 30, dtype=np.float32), np.array([40]), np.array([1.0], np.float32))
    base = PolicyConfig(keep=4, filter=NONE, sample="softmax", sample_from=20, temperature=0.05)
    counts = {name: np.zeros(30) for name in ("softmax", "uniform")}
    for name, found in counts.items():
        for seed in range(400):
            picked = pick(base.model_copy(update={"sample": name}), ranking, np.random.default_rng(seed))
            assert picked.ranks.tolist() == sorted(set(picked.ranks.tolist()))
            found[picked.documents] += 1
        assert found[20:].sum() == 0
    weights = np.exp(ranking.scores[:20] / 0.05)
    assert counts["softmax"][0] / 400 > 1 - (1 - weights[0] / weights.sum()) ** 4 - 0.12
    assert counts["softmax"][:5].sum() > 2 * counts["softmax"][5:10].sum()
    assert np.abs(counts["uniform"][:20] / 400 - 4 / 20).max() < 0.08
    results = [
        mine(EXAMPLES, CORPUS, CONFIG.model_copy(update={"sample": "uniform", "seed": s}), BagOfWords()) for s in (1, 1, 2)
    ]
    assert results[0].examples == results[1].examples != results[2].examples


def test_copies_of_positives_and_what_is_excluded_are_never_mined():
    long = " ".join(f"word{n}" for n in range(40))
    corpus = [
        Document("p", long),
        Document("case", long.upper()),
        Document("near", f"{long} more"),
        Document("half", " ".join(long.split()[:20])),
        Document("known", "word1 word2 judged"),
        Document("free", "word1 word2 word3"),
        Document("again", "word1  word2 word3"),
    ]
    example = Example(Query("q", "word1 word2 word3 word4"), (corpus[0],), (), "s")
    asked = []

    def exclude(example, document):
        asked.append((example.query.id, document.id))
        return document.id == "known"

    result = mine([example], corpus, MineConfig(filter=NONE), BagOfWords(), exclude=exclude)
    assert [d.id for d in result.examples[0].negatives] == ["free", "half"]
    passed = {"known_positive": 1, "equal_text": 1, "near_text": 1, "repeated_text": 1, "excluded": 1}
    assert result.report["passed"] == passed
    assert {document for _, document in asked} == {"known", "free", "half"}
    loose = mine([example], corpus, MineConfig(filter=NONE, near=1.0), BagOfWords())
    assert "near" in [d.id for d in loose.examples[0].negatives]


class Prompts(BagOfWords):
    def encode(self, texts, *, instruction="", **options):
        self.seen = {*getattr(self, "seen", set()), instruction}
        return super().encode([instruction + text for text in texts], **options)


@pytest.mark.parametrize(
    ("settings", "prompts"),
    [
        ({}, {""}),
        ({"instruction": "Find it"}, {"Instruct: Find it\nQuery: ", ""}),
        ({"template": "query: ", "document_template": "passage: "}, {"query: ", "passage: "}),
        ({"template": "Task {task}|", "instruction": "Find it", "document_instruction": "It"}, {"Task Find it|", "It "}),
    ],
)
def test_teachers_get_their_own_prompts(settings, prompts):
    encoder = Prompts()
    mine(EXAMPLES, CORPUS, MineConfig(keep=2, **settings), encoder)
    assert encoder.seen == prompts


class WordOverlap:
    name, scale = "overlap", "log_odds"

    def __init__(self):
        self.pairs = 0

    def score(self, query, documents):
        self.pairs += len(documents)
        words = set(query.split())
        return np.array([len(words & set(d.split())) - 4.0 for d in documents], dtype=np.float32)


def test_a_reranker_ranks_anew_and_its_scores_alone_decide():
    config = MineConfig(keep=5, pool=10, filter={"kind": "margin", "value": 1.0}, block=7)
    reranker = WordOverlap()
    result = mine(EXAMPLES, CORPUS, config, BagOfWords(), reranker=reranker)
    assert reranker.pairs == 25 * 11
    for example, note in zip(result.examples, result.notes, strict=True):
        assert note["mined"]["teacher"] == f"overlap over {BagOfWords().fingerprint}"
        expected = WordOverlap().score(example.query.text, [d.text for d in example.positives + example.negatives])
        assert [*example.positive_scores, *example.negative_scores] == expected.tolist()
        assert list(example.negative_scores) == sorted(example.negative_scores, reverse=True)
        assert all(score < expected[0] - 1 for score in example.negative_scores)
    with pytest.raises(ValueError, match="percent has no meaning on the log-odds of overlap"):
        mine(EXAMPLES, CORPUS, MineConfig(), BagOfWords(), reranker=reranker)


def test_sources_are_mined_one_at_a_time():
    other = Example(Query("x", "sea"), (CORPUS[3],), (), "t")
    with pytest.raises(ValueError, match="one source at a time"):
        mine([EXAMPLES[0], other], CORPUS, MineConfig(), BagOfWords())


def test_a_damaged_journal_and_a_cut_file_are_named(tmp_path):
    interrupted = tmp_path / "out"
    step = 34
    assert dies_at(step, partial(run, interrupted))
    journal = interrupted / "journal.jsonl"
    while len(journal.read_text().splitlines()) < 3:  # far enough that rows were saved
        step += 3
        assert dies_at(step, partial(run, interrupted))
    os.truncate(interrupted / "mined.jsonl.partial", 3)
    with pytest.raises(ValueError, match=r"mined\.jsonl\.partial: shorter than its journal says"):
        run(interrupted)
    journal.write_text("{nonsense\n")
    with pytest.raises(ValueError, match="damaged; begin anew"):
        run(interrupted)
    run(interrupted, restart=True)
    run(tmp_path / "whole")
    assert contents(interrupted) == contents(tmp_path / "whole")


def test_restart_forgets_vectors_and_rankings_of_other_data(tmp_path, monkeypatch):
    run(tmp_path)
    mine_folder(
        EXAMPLES[:3], iter(CORPUS), tmp_path, CONFIG.model_copy(update={"keep_pool": False}), BagOfWords(), restart=True
    )
    with pytest.raises(ValueError, match="keep_pool"):
        reapply(tmp_path, tmp_path / "again", PolicyConfig(keep=2, pool=15))

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("openembed.data.mine._mine_blocks", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
    mine_folder(EXAMPLES[:3], iter(CORPUS[:50]), tmp_path / "killed", CONFIG, BagOfWords(), restart=True)


def test_a_policy_is_not_reapplied_in_place(tmp_path, whole):
    with pytest.raises(ValueError, match="another folder"):
        reapply(whole, whole, PolicyConfig(keep=2, pool=15), restart=True)


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    journal = Journal(tmp_path, {"what": "rows"}, ("rows.jsonl",))

    def full(_handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("openembed.files.os.fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: .*rows\.jsonl\.partial"):
            journal.append(1, {"rows.jsonl": b"{}\n"}, None)
    assert Journal(tmp_path, {"what": "rows"}, ("rows.jsonl",)).done == 0
