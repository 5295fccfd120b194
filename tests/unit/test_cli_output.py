"""Tables say all they have to say: in full lines where there is no terminal, folded in a narrow one."""

import io

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from openembed.cli import app, output
from openembed.recipe.files import packaged_recipes

NAME, MODEL, TITLE = "inference_free_sparse_small", "multi_vector_system_one", "A title that is rather long and goes on"


def shown(monkeypatch, width, models=1):
    table = Table("recipe", "title", box=None, pad_edge=False)
    for number in range(models):
        table.add_column(f"{MODEL}{number}", justify="right")
    table.add_row(NAME, TITLE, *["0.512 *"] * models)
    terminal = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(output, "console", lambda: terminal)
    output.print_table(table)
    return terminal.file.getvalue()


@pytest.mark.parametrize(("width", "models"), [(64, 1), (80, 1), (95, 2), (400, 9)])
def test_names_stay_whole_where_they_fit(monkeypatch, width, models):
    text = shown(monkeypatch, width, models)
    assert NAME in text
    assert all(f"{MODEL}{number}" in text for number in range(models))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(("width", "models"), [(24, 1), (40, 1), (60, 3)])
def test_nothing_is_cut_where_they_do_not(monkeypatch, width, models):
    text = shown(monkeypatch, width, models)
    letters = sorted("".join(text.split()))
    table = "recipetitle" + "".join(f"{MODEL}{number}" for number in range(models)) + NAME + TITLE + "0.512*" * models
    assert letters == sorted("".join(table.split()))


def test_lists_are_whole_in_a_pipe():
    lines = CliRunner().invoke(app, ["recipe", "list"]).stdout.splitlines()
    for recipe in packaged_recipes():
        (line,) = (line for line in lines if line.split(" ")[0] == recipe.name)
        assert recipe.table["title"] in line
