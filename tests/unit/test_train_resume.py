import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import tiny_encoder, train_config, two_sources

from openembed.checkpoints import load
from openembed.train import checkpoint
from openembed.train.loop import train

LORA = {"rank": 4, "dropout": 0.2}


class Stopped(Exception):
    pass


def run(folder, stop_after=None, family="llama", **changes):
    config = train_config(evaluate_every=1, **changes)

    def evaluate(encoder, step):
        torch.rand(7)  # an evaluation may draw numbers; training must not notice
        if stop_after is not None and step > stop_after:
            raise Stopped
        return {"step": step}

    encoder = tiny_encoder(folder / "tokenizer", family)
    return train(config, encoder, folder / "out", examples=two_sources(), evaluate=evaluate)


def weights(folder):
    tensors = {}
    for path in sorted((folder / "out" / "model").glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("stop_after", [0, 2, 3, 4, 7])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, lora, stop_after):
    changes = {"lora": lora, "batch": {"size": 4, "negatives": 2, "accumulation": 2}}
    whole = run(tmp_path / "whole", **changes)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_after=stop_after, **changes)
    result = run(tmp_path / "cut", **changes)
    assert result.resumed_from == stop_after // 3 * 3
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert steps(tmp_path / "cut") == list(range(1, 9))
    assert result.evaluation == whole.evaluation == {"step": 8.0}


@pytest.mark.parametrize("lora", [None, LORA])
def test_resumes_where_some_parameters_never_get_a_gradient(tmp_path, lora):
    run(tmp_path / "whole", family="bert", lora=lora)  # its pooler takes no part in the vectors
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_after=4, family="bert", lora=lora)
    assert run(tmp_path / "cut", family="bert", lora=lora).resumed_from == 3
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


KILLED = """
import sys, time
from pathlib import Path
from tiny_training import tiny_encoder, train_config, two_sources
from openembed.train.loop import train
folder = Path(sys.argv[1])
def evaluate(encoder, step):
    time.sleep(0.05)
    return {}
config = train_config(steps=30, save_every=4, evaluate_every=1, lora={"rank": 4, "dropout": 0.2})
train(config, tiny_encoder(folder / "tokenizer"), folder / "out", examples=two_sources(), evaluate=evaluate)
"""


def launch(folder):
    source = Path(checkpoint.__file__).parents[2]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(source)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment, stderr=subprocess.PIPE)


def test_killed_twice_ends_byte_for_byte_the_same(tmp_path):
    whole = launch(tmp_path / "whole")
    _, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors.decode()
    for target in (6, 17):
        process = launch(tmp_path / "cut")
        metrics = tmp_path / "cut" / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().count("\n") >= target):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "cut" / "out" / "model").exists()
    last = launch(tmp_path / "cut")
    _, errors = last.communicate(timeout=240)
    assert last.returncode == 0, errors.decode()
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert steps(tmp_path / "cut") == list(range(1, 31))


def test_finished_run_is_not_run_again(tmp_path):
    run(tmp_path)
    before = weights(tmp_path)
    again = run(tmp_path)
    assert again.resumed_from == again.steps == 8
    assert weights(tmp_path) == before


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog):
    run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_after=7)
    folder = tmp_path / "cut" / "out" / "checkpoint"
    newest = folder / "step-00000006" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    result = run(tmp_path / "cut")
    assert result.resumed_from == 3
    assert "step-00000006 is damaged: weights.safetensors" in caplog.text
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_only_damaged_checkpoints_are_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=4)
    (tmp_path / "out" / "checkpoint" / "step-00000003" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"every checkpoint is damaged \(step-00000003\); delete them"):
        run(tmp_path)


def test_an_unfinished_write_is_no_checkpoint(tmp_path):
    leftover = tmp_path / ".writing-abc"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    assert not leftover.exists()


def test_newest_two_checkpoints_are_kept(tmp_path):
    run(tmp_path)
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoint").iterdir())
    assert kept == ["step-00000006", "step-00000008"]


def test_other_settings_data_or_model_are_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=4)
    with pytest.raises(ValueError, match=r"config.optimizer.lr was 0.001, is 0.002"):
        run(tmp_path, optimizer={"lr": 2e-3, "warmup": 2})
    config, encoder = train_config(), tiny_encoder(tmp_path / "tokenizer")
    data = two_sources()
    with pytest.raises(ValueError, match=r"data\.first was"):
        train(config, encoder, tmp_path / "out", examples={**data, "first": data["first"][1:]})
    encoder = tiny_encoder(tmp_path / "tokenizer")
    next(encoder.head.parameters()).data += 1
    with pytest.raises(ValueError, match="model was"):
        train(config, encoder, tmp_path / "out", examples=data)


def test_metrics_line_cut_short_by_a_crash_is_dropped(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=4)
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(tmp_path)
    assert steps(tmp_path) == list(range(1, 9))


def test_saved_model_opens_and_gives_the_trained_vectors(tmp_path):
    encoder = tiny_encoder(tmp_path / "tokenizer")
    result = train(train_config(lora=LORA), encoder, tmp_path / "out", examples=two_sources())
    texts = ["w1 w2 w3", "w9"]
    opened = load(result.model, device="cpu")
    np.testing.assert_allclose(opened.encode(texts), encoder.encode(texts), atol=1e-6)
    assert not any("lora" in name for name in opened.state_dict())
