"""What a command can say without a model, it says before torch is imported, and leaves nothing behind."""

import json
import subprocess
import sys

CODE = """
import json, sys
import openembed.cli
for command in json.loads(sys.argv[1]):
    sys.argv = ["openembed", *command]
    try:
        openembed.cli.main()
        raise AssertionError(f"{command}: not refused")
    except SystemExit as end:
        assert end.code == 2, (command, end.code)
    assert "torch" not in sys.modules, command
"""


def test_mistakes_that_need_no_model(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "text.txt").write_text("one\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("mine")
    (tmp_path / "mine.toml").write_text("seed = 1\n")
    out, taken = str(tmp_path / "out"), str(tmp_path / "taken")
    expected = [
        (
            ["convert", "openembed-nano", out, "--to", "pylte"],
            "layout 'pylte' is not known; use openembed, pylate, colbert, opensearch or splade",
        ),
        (["convert", "openembed-nano", taken], "taken: exists and is no openembed checkpoint"),
        (["convert", "openembed-nano", taken, "--to", "pylate"], "taken: exists; give a new folder"),
        (["convert", "openembed-nano", out, "--named-prompts"], "named_prompts is for layout 'pylate'"),
        (["index", "empty.txt", "-o", out], "empty.txt: holds no texts"),
        (["index", "latin1.txt", "-o", out], "latin1.txt:1: not UTF-8"),
        (
            ["index", "text.txt", "-o", out, "--precision", "float8"],
            "--precision float8 is not known; allowed: float32, float16",
        ),
        (["encode", "openembed-nano", "empty.txt", "-o", out], "empty.txt: holds no texts"),
        (["encode", "openembed-nano", "none.txt", "-o", out], "none.txt: no such file"),
        (["evaluate", "openembed-nano", "--data", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "openembed-nano", "--data", "taken"], "taken: holds no task in a known layout"),
        (["run", "dmeo"], "dmeo: no such recipe; give the path of a TOML file or one of: "),
        (["run", "mine.toml", "--set", "seed"], "--set seed: expected path.to.key=value"),
        (["sweep", "ablatoins"], "ablatoins: no such recipe"),
        (["recipe", "show", "dmeo"], "dmeo: no such recipe"),
        (["recipe", "check", "dmeo"], "dmeo: no such recipe"),
    ]
    before = sorted(tmp_path.rglob("*"))
    asked = json.dumps([command for command, _ in expected])
    done = subprocess.run([sys.executable, "-c", CODE, asked], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(expected), done.stderr
    for line, (command, message) in zip(lines, expected, strict=True):
        assert line.startswith("error: "), line
        assert message in line, command
    assert sorted(tmp_path.rglob("*")) == before
