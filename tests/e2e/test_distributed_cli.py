"""Recipes on two ranks through the command line: rank 0 speaks and writes, and all end together."""

import json

from ranks import launch

COMMAND = ["-m", "openembed", "run", "demo", "--smoke", "--device", "cpu"]


def test_a_recipe_runs_on_two_ranks_and_is_done_once(tmp_path):
    out = tmp_path / "out"
    command = [*COMMAND, "--set", "stage.stage1.compute.chunk_tokens=200", "--out", out]
    (first, said), (second, silent) = launch(command)
    assert (first, second) == (0, 0), said + silent
    assert "stage1: memory: about" in said
    assert "Report:" in said
    assert "Report" not in silent
    assert "stage1" not in silent
    lines = (out / "stage1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert "balance" in json.loads(lines[0])
    assert (out / "stage2" / "model" / "openembed.json").is_file()

    again = launch([*COMMAND, "--set", "stage.stage1.compute.parallel=fsdp", "--out", out, "--json"])
    assert [code for code, _ in again] == [0, 0]
    stages = json.loads(again[0][1])["stages"]
    assert all(stage["skipped"] for stage in stages)


def test_an_error_of_rank_0_ends_all_with_one_message(tmp_path):
    (first, said), (second, silent) = launch([*COMMAND, "--out", tmp_path / "out", "--set", "stage.mine.keep=0"])
    assert (first, second) == (2, 2)
    assert "error: rank" in said + silent
    (tmp_path / "taken" / "mine").mkdir(parents=True)
    (tmp_path / "taken" / "mine" / "notes.txt").write_text("mine")
    (first, said), (second, silent) = launch([*COMMAND, "--out", tmp_path / "taken"])
    assert (first, second) == (2, 2)
    assert "error: rank 0:" in said
    assert "was not written by a run" in said
    assert silent == ""
