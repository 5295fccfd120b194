"""Recipe files: finding, extending, overriding."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openembed.recipe.files import merge, override, packaged_recipes, read_recipe, to_toml

PLAIN = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
)


def write(folder, name, text):
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_packaged_recipes_are_listed_with_their_stages():
    summaries = {recipe.name: recipe.summary for recipe in packaged_recipes()}
    assert {"demo", "nv_embed_v1", "nv_embed_v2"} <= set(summaries)
    assert summaries["nv_embed_v2"]["stages"] == {
        "mine": "mine",
        "mine_similarity": "mine",
        "stage1": "train",
        "stage2": "train",
        "evaluate": "evaluate",
    }
    assert all(summary["title"] for summary in summaries.values())


def test_extends_completes_and_overrides_key_by_key(tmp_path):
    write(tmp_path, "base", 'title = "a"\n[stage.one]\ndo = "train"\nsteps = 5\nlist = [1, 2]\n')
    child = write(tmp_path, "child", 'extends = "base"\n[stage.one]\nsteps = 7\nlist = [3]\n[stage.two]\ndo = "mine"\n')
    table = read_recipe(child).table
    assert table == {
        "title": "a",
        "stage": {"one": {"do": "train", "steps": 7, "list": [3]}, "two": {"do": "mine"}},
    }
    assert list(table["stage"]) == ["one", "two"]


def test_only_one_level_of_extends(tmp_path):
    write(tmp_path, "a", "seed = 1\n")
    write(tmp_path, "b", 'extends = "a"\n')
    path = write(tmp_path, "c", 'extends = "b"\n')
    with pytest.raises(ValueError, match=r"c\.toml: extends: 'b' itself extends 'a'; one level is allowed"):
        read_recipe(path)


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(ValueError, match="extends: no recipe 'nowhere'"):
        read_recipe(write(tmp_path, "a", 'extends = "nowhere"\n'))


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"nv_embed: no such recipe; .*demo, .*nano, nv_embed_v1, nv_embed_v2"):
        read_recipe("nv_embed")


def test_broken_toml_names_file_and_place(tmp_path):
    with pytest.raises(ValueError, match=r"bad\.toml: not valid TOML \(.*line 1"):
        read_recipe(write(tmp_path, "bad", "= 3\n"))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("stage.a.lr=1e-5", 1e-5),
        ("stage.a.lr = 3", 3),
        ("stage.a.lr=true", True),
        ("stage.a.lr=[1, 2]", [1, 2]),
        ("stage.a.lr='x y'", "x y"),
        ("stage.a.lr=runs/model", "runs/model"),
        ("stage.a.lr=a=b", "a=b"),
        ("stage.a.lr=", ""),
    ],
)
def test_override_reads_toml_values_and_falls_back_to_text(setting, expected):
    table = {"stage": {"a": {"lr": 0, "other": 1}}}
    assert override(table, [setting]) == {"stage": {"a": {"lr": expected, "other": 1}}}
    assert table == {"stage": {"a": {"lr": 0, "other": 1}}}, "the table given was changed"


def test_override_makes_missing_tables():
    assert override({}, ["stage.a.optimizer.lr=1"]) == {"stage": {"a": {"optimizer": {"lr": 1}}}}


@pytest.mark.parametrize("setting", ["stage.a", "=3", "a..b=3"])
def test_override_refuses_what_is_no_setting(setting):
    with pytest.raises(ValueError, match=r"expected path\.to\.key=value"):
        override({}, [setting])


def test_override_refuses_to_go_through_a_value():
    with pytest.raises(ValueError, match=r"stage.a is no table \(it is 5\)"):
        override({"stage": {"a": 5}}, ["stage.a.lr=3"])


def test_merge_leaves_its_inputs_alone():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, over) == {"a": {"b": 1, "c": 2}}
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}})


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, max_size=5))
def test_to_toml_reads_back_equal(table):
    assert tomllib.loads(to_toml(table)) == table


def test_to_toml_leaves_out_what_has_no_value():
    assert tomllib.loads(to_toml({"a": None, "b": {"c": None, "d": 1}, "e": [{"f": None}]})) == {"b": {"d": 1}, "e": [{}]}
