"""A full disk, and searching while another process writes."""

import errno
import multiprocessing
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from store_fakes import BagOfWords

from openembed.index.store import Store, describe_model
from openembed.records import Document

DOCUMENTS = [Document(f"d{n}", f"text number {n} " + "filling " * 40, metadata={"n": n}) for n in range(300)]


def run_limited(action, limit):
    """Returns the exit code of a forked process in which no file may grow beyond ``limit`` bytes: 0, or that of an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            action()
            code = 0
        except OSError as error:
            code = 2 if error.errno == errno.EFBIG and error.filename else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_no_room_at_any_file_leaves_the_state_as_it_was(tmp_path):
    encoder = BagOfWords()
    store = Store.create(tmp_path / "index", model=describe_model("bag", encoder))
    store.add(DOCUMENTS[:20], encoder)
    sizes = set()
    copy = Store.create(tmp_path / "copy", model=describe_model("bag", encoder))
    copy.add(DOCUMENTS[20:], encoder)
    for path in (tmp_path / "copy" / "segments").rglob("*"):
        sizes.add(path.stat().st_size)
    before = [document.id for document in store.documents()]
    codes = []
    for limit in sorted(size - 1 for size in sizes if size > 4096):
        codes.append(run_limited(lambda: Store(store.directory).add(DOCUMENTS[20:], encoder), limit))
        after = Store(store.directory)
        assert [document.id for document in after.documents()] == before
        assert sorted(path.name for path in (store.directory / "segments").iterdir()) == ["000001"]
    assert len(codes) > 3
    assert set(codes) == {2}, "every error must be that of the system and name the file"
    assert Store(store.directory).add(DOCUMENTS[20:], encoder) == 280


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_with_one_clear_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        Store.create(disk / "index", [Document("first", "small")])
        (tmp_path / "many.txt").write_text("".join(f"line {n} {'word' * 20}{n}\n" for n in range(20_000)))
        command = [sys.executable, "-m", "openembed", "add", str(disk / "index"), str(tmp_path / "many.txt")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: no space left on the device while writing")
        assert done.stderr.count("\n") == 1
        assert list(Store(disk / "index").ids()) == ["first"]
    finally:
        subprocess.run(["umount", disk], check=True)


def write_forever(directory, width):
    store, encoder, number = Store(directory), BagOfWords(width), 0
    while True:
        store.add([Document(f"new{number}", "text added meanwhile")], encoder)
        store.delete([f"new{number}"])
        if number % 5 == 4:
            store.compact()
        number += 1


def test_searching_while_another_process_writes(tmp_path):
    encoder = BagOfWords(16)
    store = Store.create(tmp_path / "index", model=describe_model("bag", encoder))
    store.add(DOCUMENTS, encoder)
    query_QD = encoder.encode(["text number 7", "filling"])
    expected, words = store.dense(query_QD, 5), store.bm25(["number 7"], 5)
    writer = multiprocessing.get_context("spawn").Process(target=write_forever, args=(tmp_path / "index", 16), daemon=True)
    writer.start()
    try:
        reader, states = Store(tmp_path / "index"), set()
        while len(states) < 30:
            if reader.refresh():
                states.add(reader._state.manifest.change)
            assert writer.is_alive()
            fresh = Store(tmp_path / "index")
            for one in (reader, fresh, store):
                found = [{i: s for i, s in hits.items() if i.startswith("d")} for hits in one.dense(query_QD, 6)]
                assert [dict(list(hits.items())[:5]) for hits in found] == expected
                assert set(one.bm25(["number 7"], 5)[0]) == set(words[0])
            assert len(fresh) in (300, 301)
            assert not np.isnan(list(fresh.dense(query_QD, 1)[0].values())).any()
    finally:
        writer.kill()
        writer.join()
