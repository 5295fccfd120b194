"""Two gloo processes against one: gradients, weights, resuming on another number of ranks, and failing together."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_programs import CASES, SHARDED, Stopped, gradient_of, run
from ranks import PROGRAMS, launch, program
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

from openembed.train.distributed import ALONE, balance, joined, lost_contact, share


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    program("gradients", folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [*CASES, *SHARDED])
def test_gradient_is_that_of_one_process(two_ranks, tmp_path, name):
    case = CASES.get(name) or SHARDED[name][0]
    alone = gradient_of(tmp_path, case)
    half = case.compute.get("precision") == "bf16"
    sharded_half = half and name in SHARDED  # weights travel in bf16: other roundings than autocast's
    for found in (ranks[name] for ranks in two_ranks):
        assert found["losses"] == pytest.approx(alone["losses"], rel=0.02 if sharded_half else 1e-5)
        assert found["gradients"].keys() == alone["gradients"].keys()
        both = (found["gradients"], alone["gradients"])
        pair = [torch.cat([g[n].flatten().double() for n in alone["gradients"]]) for g in both]
        assert cosine_similarity(*pair, dim=0).item() == pytest.approx(1, abs=2e-3 if sharded_half else 1e-6)
        assert (pair[0].norm() / pair[1].norm()).item() == pytest.approx(1, abs=0.02 if sharded_half else 1e-5)
        assert found["norm"] == pytest.approx(alone["norm"], rel=0.02 if sharded_half else 1e-5)
        clipped = torch.cat([g.flatten() for g in found["clipped"].values()])
        assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
        if not half:
            for key, gradient in alone["gradients"].items():
                torch.testing.assert_close(found["gradients"][key], gradient, rtol=1e-5, atol=1e-6)


def metrics(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    tensors = {}
    for path in sorted((folder / "out" / "model").glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def require_close(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


LORA = {"lora": {"rank": 4, "dropout": 0.2}}
FSDP = {"compute": {"chunk_tokens": 40, "parallel": "fsdp"}}
ACCUMULATED = {"batch": {"size": 4, "negatives": 2, "accumulation": 2}}
FAST = {"optimizer": {"lr": 2e-2, "warmup": 0}}
CACHED = {"compute": {"chunk_tokens": 40, "parallel": "fsdp", "live_chunks": 0}, **FAST}
PLAN = [
    {"name": "ddp", "changes": ACCUMULATED},
    {"name": "ddp_again", "changes": ACCUMULATED, "stop_after": 4},
    {"name": "ddp_again", "changes": ACCUMULATED},
    {"name": "fsdp", "changes": {**LORA, **FSDP}},
    {"name": "cached", "changes": CACHED},
    {"name": "moved", "changes": LORA},
    {"name": "moved_split", "changes": FSDP},
    {"name": "left", "stop_after": 6},
    {"name": "left_split", "changes": FSDP, "stop_after": 6},
    {"name": "auto", "changes": {"compute": {"chunk_tokens": "auto"}}},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two ranks; two of them were begun by one process, two others are left for it to finish."""
    folder = tmp_path_factory.mktemp("trained")
    for name, changes in (("moved", LORA), ("moved_split", {})):
        with pytest.raises(Stopped):
            run(folder / name, stop_after=4, **changes)
    program("trainings", folder, json.dumps(PLAN))
    for name, changes in (("alone", {}), ("alone_lora", LORA), ("alone_accumulated", ACCUMULATED), ("alone_fast", FAST)):
        run(folder / name, **changes)
    return folder


@pytest.mark.parametrize(("name", "other"), [("ddp", "alone_accumulated"), ("fsdp", "alone_lora"), ("cached", "alone_fast")])
def test_two_ranks_end_with_the_weights_of_one(trained, name, other):
    require_close(weights(trained / name), weights(trained / other))
    for ours, theirs in zip(metrics(trained / name), metrics(trained / other), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["evaluation"]["first"] == pytest.approx(theirs["evaluation"]["first"], abs=1e-4)
        assert ours["tokens"] == theirs["tokens"]
        assert 0.5 <= ours["balance"] <= 1


def test_resumed_on_as_many_ranks_is_byte_for_byte_the_same(trained):
    first, second = weights(trained / "ddp"), weights(trained / "ddp_again")
    assert {n: t.numpy().tobytes() for n, t in first.items()} == {n: t.numpy().tobytes() for n, t in second.items()}
    assert [line["step"] for line in metrics(trained / "ddp_again")] == list(range(1, 9))


@pytest.mark.parametrize(("name", "other"), [("moved", "alone_lora"), ("moved_split", "alone")])
def test_begun_by_one_process_finished_by_two(trained, name, other):
    require_close(weights(trained / name), weights(trained / other))


@pytest.mark.parametrize("name", ["left", "left_split"])
def test_begun_by_two_finished_by_one(trained, name):
    assert run(trained / name).resumed_from == 6
    require_close(weights(trained / name), weights(trained / "alone"))


def test_micro_batch_size_is_settled_once(trained):
    state = json.loads((trained / "auto" / "out" / "checkpoint" / "step-00000008" / "state.json").read_text())
    assert state["settings"]["config"]["compute"]["chunk_tokens"] == "auto"
    assert state["settings"]["chunk_tokens"] >= 256


def test_different_data_is_refused_by_all_ranks(tmp_path):
    results = launch([PROGRAMS, "failing", tmp_path])
    for code, output in results:
        # torch's threads sometimes abort a process that is ending, after it has said why; nothing else may
        aborted = code == -6 and output.rstrip().endswith("terminate called without an active exception")
        assert code == 1 or aborted, output
        assert "differ in first" in output
    assert not (tmp_path / "out").exists()


def test_a_rank_that_dies_ends_the_others(tmp_path):
    results = launch([PROGRAMS, "dying", tmp_path])
    assert results[1][0] == 9
    assert results[0][0] == 1
    assert lost_contact(RuntimeError(results[0][1]))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_cover_all_and_are_even(tokens, ranks):
    shares = share(tokens, ranks)
    assert sorted(number for numbers in shares for number in numbers) == list(range(len(tokens)))
    loads = [sum(tokens[number] for number in numbers) for numbers in shares]
    assert max(loads) <= sum(tokens) / ranks + max(tokens)
    assert balance(tokens, ranks) == pytest.approx(np.mean(loads) / max(loads))


def test_a_process_on_its_own_agrees_with_itself():
    assert ALONE.agree(lambda: 3, leader_first=True) == ALONE.lead(lambda: 3) == ALONE.from_leader(3) == 3
    with pytest.raises(KeyError):
        ALONE.lead(lambda: {}["missing"])


def test_an_incomplete_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"LOCAL_RANK.* is not; start the ranks with torchrun"), joined("cpu"):
        pass
