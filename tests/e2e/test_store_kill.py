"""kill -9 at any moment leaves the last acknowledged state, or that of the one change then under way."""

import random
import subprocess
import sys
import time
from pathlib import Path

from store_fakes import BagOfWords

from openembed.index.store import Store, describe_model

WRITER = Path(__file__).with_name("store_writer.py")


def after(ids, number):
    """What change ``number`` may leave, given ids before it: deletions depend on segment order, so any two may go."""
    if number % 5 == 4:
        return lambda found: found == ids
    if number % 3 == 2:
        return lambda found: found <= ids and len(ids - found) == min(2, len(ids))
    return lambda found: found == ids | {f"{number}-{n}" for n in range(3)}


def test_kill_at_any_moment_leaves_an_acknowledged_state(tmp_path):
    encoder, clock = BagOfWords(8), random.Random(3)
    Store.create(tmp_path / "index", model=describe_model("bag", encoder))
    ids, number, changes = set(), 0, 0
    for _round in range(8):
        process = subprocess.Popen([sys.executable, WRITER, tmp_path / "index", str(number)], stdout=subprocess.PIPE, text=True)
        first = "".join(process.stdout.readline() for _line in range(clock.randint(3, 9)))
        time.sleep(clock.uniform(0.0, 0.05))
        process.kill()
        lines = (first + process.communicate()[0]).splitlines(keepends=True)
        lines = [line.split() for line in lines if line.endswith("\n")]
        changes += sum(line[0] == "done" for line in lines)
        for line in lines:
            number = int(line[1])
            if line[0] == "done":
                ids = set(line[2:])
        store = Store(tmp_path / "index")
        found = set(store.ids())
        assert found == ids or (lines[-1][0] == "begin" and after(ids, number)(found))
        assert {document.id for document in store.documents()} == found
        vectors_QD = encoder.encode([f"text 0 of {number}"])
        assert set(store.dense(vectors_QD, 1_000_000)[0]) == found == set(store.bm25(["text"], 1_000_000)[0])
        ids, number = found, number + 1
    assert changes > 10
    assert len(store) == len(ids)
