"""kill -9 at any moment leaves the last acknowledged state, or that of the one change then under way."""

import os
import random
import select
import signal
import tempfile
import time
from pathlib import Path

import pytest
from sparse_fakes import SparseWords
from store_fakes import BagOfWords

from openembed.index.store import Store, describe_model
from openembed.records import Document

KILLS = 1000 if os.environ.get("OPENEMBED_SLOW") else 210
MEMORY = Path("/dev/shm")
"""Waiting for a disk changes nothing of what a killed process leaves behind, so where there is a file system in memory, it is
used: ten times as many kills in the same time."""


def change(store, encoders, number):
    """The ``number``-th change: additions, replacements, deletions, compactions, and openings in between."""
    kind = number % 7
    if kind == 6:
        store.compact()
    elif kind in (2, 4):
        store.delete(sorted(store.ids())[: 2 if kind == 2 else 5])
    elif kind == 5:
        store.update(
            [Document(i, f"text changed by {number}", metadata={"n": number}) for i in sorted(store.ids())[:2]], encoders
        )
    else:
        store.add([Document(f"{number:06d}-{n}", f"text {n} of {number}", metadata={"n": number}) for n in range(5)], encoders)


def state(store):
    return {document.id: document.text for document in store.documents()}


def expected(before, number):
    """The state after change ``number``, from the one before it."""
    kind, ids = number % 7, sorted(before)
    if kind in (2, 4):
        return {i: before[i] for i in ids[2 if kind == 2 else 5 :]}
    if kind == 5:
        return before | dict.fromkeys(ids[:2], f"text changed by {number}")
    return before if kind == 6 else before | {f"{number:06d}-{n}": f"text {n} of {number}" for n in range(5)}


def changed_until_killed(directory, encoders, first, awaited, delay):
    """Returns how many changes a process acknowledged that was killed ``delay`` seconds after ``awaited`` of them.

    It is killed too when it is silent for long: a forked process may wait for ever for a lock that a thread of its parent held.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for number in range(first, first + 1_000_000):
                change(Store(directory), encoders, number)  # opened anew each time: an opening is killed too
                os.write(write, b"+")
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        done = sum(len(pipe.read(1)) for _ in range(awaited) if select.select([pipe], [], [], 5 + 20 * delay)[0])
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return done + len(pipe.readall())


def created(folder, encoders):
    return Store.create(folder, model=[describe_model("fake", encoder) for encoder in encoders])


def time_of_a_change(place, encoders):
    """Returns the seconds a change takes here and now; what it imports is then there for every process forked later."""
    change(created(place / "trial", encoders), encoders, 0)
    start = time.perf_counter()
    for number in range(1, 8):
        change(Store(place / "trial"), encoders, number)
    return (time.perf_counter() - start) / 7


def check_searches(store, encoders, found):
    dense, sparse = encoders
    query_QD, query_QV = dense.encode(["text"]), sparse.encode(["text"])
    assert set(store.sparse(query_QV, 1_000_000)[0]) == set(found)
    assert set(store.dense(query_QD, 1_000_000)[0]) == set(found) == set(store.bm25(["text"], 1_000_000)[0])
    assert set(store.dense(query_QD, 1_000_000, filter={"n": {"gte": 0}})[0]) == set(found)


@pytest.fixture
def place(tmp_path):
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.mark.timeout(3600 if KILLS > 210 else 600)
def test_kill_at_any_moment_leaves_an_acknowledged_state(place, record_property):
    encoders, clock = (BagOfWords(8), SparseWords()), random.Random(3)
    created(place / "index", encoders)
    known, number, changes, unacknowledged = {}, 0, 0, 0
    usual = time_of_a_change(place, encoders)
    for kills in range(KILLS):
        delay = clock.uniform(0.0, 2 * usual)
        done = changed_until_killed(place / "index", encoders, number, clock.randint(0, 1), delay)
        for _ in range(done):
            known, number = expected(known, number), number + 1
        store = Store(place / "index")
        found = state(store)
        if found != known:
            assert found == expected(known, number), f"after {kills + 1} kills"
            unacknowledged += 1
        known, number, changes = found, number + 1, changes + done
        if kills % 10 == 0:
            check_searches(store, encoders, found)
    check_searches(Store(place / "index"), encoders, known)
    record_property("kills", KILLS)
    record_property("acknowledged", changes)
    record_property("whole though not acknowledged", unacknowledged)
    assert changes > 50
    assert unacknowledged > 0
