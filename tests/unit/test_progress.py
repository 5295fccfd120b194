"""Progress where there is no terminal: a line at the start, one a minute, on standard error alone."""

import json
import logging
import sys

import pytest

import openembed.cli
from openembed import progress as module
from openembed.progress import progress


@pytest.fixture
def clock(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "openembed.progress")
    monkeypatch.setattr(logging.getLogger("openembed.progress"), "propagate", True)
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_the_start_and_one_a_minute_at_most(clock, caplog):
    with progress("scifact: encode document", 5_183, "texts") as advance:
        assert caplog.messages == ["scifact: encode document: 5,183 texts"]
        for _ in range(130):
            clock[0] += 1
            advance(20)
    assert caplog.messages[1:] == [
        "scifact: encode document: 1,200 of 5,183 texts, 20.0/s, 0:03:19 left",
        "scifact: encode document: 2,400 of 5,183 texts, 20.0/s, 0:02:19 left",
    ]


def test_of_an_unknown_total_the_count_is_told(clock, caplog):
    with progress("add", None, "documents") as advance:
        assert caplog.messages == []
        clock[0] += 90
        advance(9)
    assert caplog.messages == ["add: 9 documents, 0.1/s"]


def test_nothing_done_yet_has_no_end(clock, caplog):
    with progress("train", 5, "steps") as advance:
        clock[0] += 60
        advance(0)
    assert caplog.messages[-1] == "train: 0 of 5 steps, 0.0/s"


def test_what_is_not_to_be_shown_is_not(clock, caplog):
    with progress("encode", 5, "texts", show=False) as advance:
        clock[0] += 90
        advance(5)
    assert caplog.messages == []


def test_the_command_writes_it_to_standard_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    command = ["encode", "openembed-nano", str(tmp_path / "two.txt"), "-o", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(sys, "argv", ["openembed", *command])
    with pytest.raises(SystemExit) as end:
        openembed.cli.main()
    said = capsys.readouterr()
    assert (end.value.code or 0) == 0
    assert json.loads(said.out)["count"] == 2
    assert said.err == "encode: 2 texts\n"
