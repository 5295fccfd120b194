"""Bulk encoding and mining on a Ray cluster of several local nodes, one of which is killed midway."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from ray_programs import Dying, DyingTokens, Refusing, Watched, WatchedTerms, WatchedTokens, absent
from token_models import token_encoder
from typer.testing import CliRunner

import openembed
from openembed import bulk, bulk_output
from openembed.bulk import BulkConfig, encode_file
from openembed.cli import app

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from openembed.ray_encode import RayConfig, RayEncoder  # noqa: E402

CONFIG = BulkConfig(chunk=8)
CHUNKS = 30
HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
STORE = {"object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, where the driver is, and two nodes of one CPU each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(openembed.__file__).parents[1]), str(Path(__file__).parents[1])]))
        patch.setenv("RAY_worker_niceness", "0")  # workers are nice to others by default, and wait long on a busy machine
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, **STORE}
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1, **STORE)
        ray.init(made.address, log_to_driver=False)
        yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        {"_id": f"d{n}", "title": f"T{n}", "text": f"text {n} about " + "one thing " * (n % 17)} for n in range(8 * CHUNKS - 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def wholes(corpus, tmp_path_factory):
    """What one machine writes, for each kind of vectors."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for model in (Watched, WatchedTerms, WatchedTokens):
        encode_file(model(), corpus, folder / model.__name__, CONFIG)
        found[model] = contents(folder / model.__name__)
    return found


@pytest.fixture(scope="module")
def whole(wholes):
    return wholes[Watched]


def calls(log):
    return [line.split("\t") for line in log.read_text().splitlines()]


@pytest.fixture
def journalled(monkeypatch):
    """The lines that are written to the journal."""
    lines, real = [], bulk_output.append_synced

    def watched(file, data, path):
        real(file, data, path)
        if path.name == "journal.jsonl":
            lines.append(json.loads(data))

    monkeypatch.setattr(bulk_output, "append_synced", watched)
    return lines


def written(journalled, model):
    """How many chunks were put in their place: vectors one a line, others where a line says how many rows there are."""
    return len(journalled) if model is Watched else sum("rows" in line for line in journalled)


@pytest.mark.parametrize("model", [Watched, WatchedTerms, WatchedTokens])
def test_the_files_are_those_of_one_machine(cluster, corpus, wholes, tmp_path, model):
    log = tmp_path / "log"
    encoder = RayEncoder(partial(model, log, 0.1))
    encoded = encode_file(encoder, corpus, tmp_path / "out", CONFIG)
    assert contents(tmp_path / "out") == wholes[model]
    assert (encoded.count, encoded.resumed) == (237, 0)
    assert len({first for _, first in calls(log)}) == CHUNKS
    assert len({process for process, _ in calls(log)}) == 2, "both nodes worked"


def test_other_formats_gzip_and_prompts(cluster, corpus, tmp_path):
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    config = BulkConfig(chunk=64, precision="int8", dimensions=24, kind="query", instruction="Find it")
    encode_file(Watched(), packed, tmp_path / "here", config)
    encode_file(RayEncoder(partial(Watched, tmp_path / "log")), packed, tmp_path / "there", config)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert "scales.npy" in contents(tmp_path / "there")


def test_what_the_encoder_refuses_is_said_and_not_tried_again(cluster, tmp_path):
    (tmp_path / "c.txt").write_text("good\n" * 8 + "poison\n" + "good\n" * 8)
    with pytest.raises(ValueError, match="there is poison in it"):
        encode_file(RayEncoder(partial(Refusing, tmp_path / "log")), tmp_path / "c.txt", tmp_path / "out", CONFIG)


def test_a_model_that_is_not_there_is_said(cluster):
    with pytest.raises(ValueError, match=r"cannot be opened on the cluster: .*/no/model: no such model folder"):
        RayEncoder(absent)
    with pytest.raises(ValueError, match="no node of the cluster has the 64 CPUs"):
        RayEncoder(Watched, RayConfig(cpus=64))


def test_begun_on_the_cluster_and_finished_without_it(cluster, corpus, whole, tmp_path, journalled):
    class Stopping:
        """Stops after 12 chunks, some of which came out of turn."""

        def __init__(self, encoder):
            self._encoder = encoder
            for name in ("fingerprint", "width", "computed_in", "device", "config", "wrap", "query_prompt", "document_prompt"):
                setattr(self, name, getattr(encoder, name))

        def encode_chunks(self, path, numbers, config):
            for place, item in enumerate(self._encoder.encode_chunks(path, [*numbers[::2], *numbers[1::2]], config)):
                if place == 12:
                    raise RuntimeError("the driver died")
                yield item

    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        encode_file(Stopping(RayEncoder(partial(Watched, tmp_path / "log"))), corpus, out, CONFIG)
    assert len(journalled) == 12
    assert 88 <= encode_file(Watched(), corpus, out, CONFIG).resumed <= 96
    assert len(journalled) == CHUNKS
    assert contents(out) == whole


def test_begun_without_the_cluster_and_finished_on_it(cluster, corpus, whole, tmp_path, monkeypatch):
    real, out = bulk.encoded_chunk, tmp_path / "out"
    left = [7]

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "encoded_chunk", failing)
        with pytest.raises(RuntimeError):
            encode_file(Watched(), corpus, out, CONFIG)
    log = tmp_path / "log"
    assert encode_file(RayEncoder(partial(Watched, log)), corpus, out, CONFIG).resumed == 56
    assert contents(out) == whole
    assert len({first for _, first in calls(log)}) == CHUNKS - 7


@pytest.mark.parametrize(("dying", "model"), [(Dying, Watched), (DyingTokens, WatchedTokens)])
def test_workers_that_die_are_replaced(cluster, corpus, wholes, tmp_path, journalled, dying, model):
    encoder = RayEncoder(partial(dying, tmp_path / "log", 3))
    encode_file(encoder, corpus, tmp_path / "out", CONFIG)
    assert (tmp_path / "log.deaths").read_text() == "xxx"
    assert contents(tmp_path / "out") == wholes[model]
    assert written(journalled, model) == CHUNKS


@pytest.mark.parametrize("model", [Watched, WatchedTerms])
def test_mining_on_the_cluster_is_mining_on_one_machine(cluster, tmp_path, model):
    from openembed.data.mine import MineConfig, mine_folder
    from openembed.records import Document, Example, Query

    words = [f"{a} {b}" for a in ("red", "old", "wet", "big") for b in ("stone", "river", "bird", "house", "salt")]
    documents = [Document(f"d{n}", f"a {words[n % 20]} text {n}") for n in range(60)]
    examples = [Example(Query(f"q{n}", f"which {words[n]}"), (documents[n],)) for n in range(12)]
    config = MineConfig(instruction="Find", filter={"kind": "none", "value": 0.0}, keep=3, pool=10, near=1.0)
    here = mine_folder(examples, documents, tmp_path / "here", config, model())
    log = tmp_path / "log"
    there = mine_folder(examples, documents, tmp_path / "there", config, RayEncoder(partial(model, log)))
    assert (there.folder / "mined.jsonl").read_bytes() == (here.folder / "mined.jsonl").read_bytes()
    assert (there.folder / "meta.json").read_bytes() == (here.folder / "meta.json").read_bytes()
    assert calls(log), "documents were encoded by workers"


def test_the_commands_with_a_real_model(cluster, corpus, tmp_path):
    encode_file(openembed.load("openembed-nano"), corpus, tmp_path / "whole", BulkConfig(chunk=32))

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return json.loads(result.stdout)

    report = run("encode", "openembed-nano", corpus, "-o", tmp_path / "out", "--chunk", 32, "--ray", cluster.address, "--json")
    assert (report["count"], report["resumed"]) == (237, 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    token_encoder(tmp_path / "pieces").save(tmp_path / "tokens")
    for out, there in (("here", ()), ("there", ("--ray", cluster.address))):
        run("encode", tmp_path / "tokens", corpus, "-o", tmp_path / out, "--chunk", 32, "--json", *there)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"query": f"q {n}", "positive": f"p {n}"}) + "\n" for n in range(9))
    )
    mined = run("mine", tmp_path / "train.jsonl", "-o", tmp_path / "mined", "--teacher", "openembed-nano", "--filter", "none",
                "--keep", 2, "--ray", cluster.address, "--json")  # fmt: skip
    assert mined["queries"] == 9
    with pytest.raises(ValueError, match="--ray is for a teacher that encodes"):
        run("mine", tmp_path / "train.jsonl", "-o", tmp_path / "other", "--ray", cluster.address, "--json")


@pytest.mark.parametrize("model", [WatchedTokens, Watched])
def test_a_node_killed_midway_changes_no_byte(cluster, corpus, wholes, tmp_path, journalled, model):
    """Last: it takes a node away. Its raylet gets SIGKILL while both nodes are at work; the other one does the rest."""
    log, killed, dead = tmp_path / "log", [], []
    while len(cluster.worker_nodes) < 2:
        cluster.add_node(num_cpus=1, **STORE)
    encoder = RayEncoder(partial(model, log, 0.3))

    def kill():
        while len(journalled) < 6 or len({process for process, _ in calls(log)}) < 2:
            time.sleep(0.05)
        node = next(iter(cluster.worker_nodes))
        killed.append(len(journalled))
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        dead.append(node)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    encoded = encode_file(encoder, corpus, tmp_path / "out", CONFIG)
    thread.join(5)
    assert killed, "the node was killed"
    assert killed[0] < CHUNKS - 4, "while chunks were to go"
    assert contents(tmp_path / "out") == wholes[model]
    assert encoded.ids() == [f"d{n}" for n in range(237)]
    assert written(journalled, model) == CHUNKS, "every chunk was written once"
    assert len({first for _, first in calls(log)}) == CHUNKS
    assert sum(node["Alive"] for node in ray.nodes()) == 2
    cluster.remove_node(*dead, allow_graceful=False)


def test_no_cluster_and_no_ray_are_said(tmp_path):
    (tmp_path / "c.txt").write_text("text\n")
    program = "from openembed.cli import main; main()"
    absent = "import sys; sys.modules['ray'] = None; "
    arguments = ["encode", "openembed-nano", tmp_path / "c.txt", "-o", tmp_path / "out", "--ray"]
    for code, address, message in (
        (program, "127.0.0.1:9", "error: no Ray cluster at '127.0.0.1:9'"),
        (absent + program, "auto", "error: ray is not installed; --ray needs: pip install 'openembed[ray]'"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *map(str, arguments), address], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr, done.stderr
    assert not np.any([path.name == "meta.json" for path in tmp_path.rglob("*")])
