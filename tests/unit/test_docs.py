"""The Python of README and docs: every name it uses is there, and what needs no other model runs as it is written."""

import ast
import builtins
import re
import string
import tomllib
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from token_models import TEXTS, token_encoder, write_tokenizer
from transformers import BertConfig, BertModel

import openembed
from openembed.config import parse
from openembed.encoder import EncoderConfig
from openembed.index.tokens.files import TokenCoding
from openembed.index.tokens.muvera import EncodingSettings, Muvera
from openembed.recipe.config import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "```python" in path.read_text()]
GIVEN = {"docs/vectors.md": {"ids", "queries", "exact_positions"}}
"""What a page says in words alone."""


def blocks(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def bound(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_name_of_a_page_is_imported_or_made_there(path):
    page = str(path.relative_to(ROOT))
    known = {*dir(builtins), *GIVEN.get(page, ())}
    for block in blocks(page):
        tree = ast.parse(block)
        known |= set(bound(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                assert node.id in known, f"{page}: {node.id} comes from nowhere"
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "openembed":
                try:
                    module = import_module(node.module)
                except ImportError as error:
                    if (error.name or "").startswith("openembed"):
                        raise
                    continue  # an extra that is not installed
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "openembed":
                assert hasattr(openembed, node.attr), ast.unparse(node)


@pytest.mark.parametrize(("page", "number"), [("docs/index.md", 0), ("docs/tokens.md", 0)])
def test_what_stands_first_runs_as_it_is_written(page, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(blocks(page)[number], page, "exec"), names)
    made = names["store"] if page == "docs/index.md" else names["parts"][0].segment
    assert len(made) == (1 if page == "docs/index.md" else 100)


def test_a_store_of_token_vectors_is_used_as_it_is_written(tmp_path, monkeypatch):
    token_encoder(tmp_path / "words").save(tmp_path / "my-colbert")
    monkeypatch.chdir(tmp_path)
    names = {}
    (block,) = [block for block in blocks("docs/tokens.md") if "store.rerank" in block]
    exec(compile(block, "docs/tokens.md", "exec"), names)
    assert list(names["store"].models) == ["dense", "tokens"]
    assert names["store"].tokens(names["queries"], 10, filter={"lang": "en"})[0].keys() == {"doc-17"}


def test_the_stages_of_a_recipe_of_token_vectors_are_known(tmp_path):
    (block,) = [block for block in blocks("docs/tokens.md", "toml") if "[stage.index]" in block]
    (tmp_path / "page.toml").write_text(block)
    stages = load_recipe(tmp_path / "page.toml").stage
    assert stages["search"].steps[0].method == Muvera(candidates=200)
    assert stages["index"].coding == TokenCoding(bits=4, coded_from=1, encodings=EncodingSettings())


def test_the_settings_of_a_model_that_all_layouts_can_say(tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "bert-base-uncased", markers=False, punctuation=string.punctuation)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=240, **sizes)).save_pretrained(tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks("docs/tokens.md") if "add_special_tokens" in block]
    (settings,) = [tomllib.loads(block) for block in blocks("docs/tokens.md", "toml") if "[encoder]" in block]
    with pytest.raises(ValueError, match="has no marker"):
        openembed.build(parse(EncoderConfig, settings["encoder"] | {"tokenizer_path": None}, "test")).save(
            "no", layout="colbert"
        )
    exec(compile(block, "docs/tokens.md", "exec"), {})
    encoder = openembed.build(parse(EncoderConfig, settings["encoder"], "test"))
    for layout in ("openembed", "pylate", "colbert"):
        encoder.save(tmp_path / layout, layout=layout)
        again = openembed.load(tmp_path / layout)
        for encode in ("encode_queries", "encode_documents"):
            found, wanted = getattr(again, encode)(TEXTS), getattr(encoder, encode)(TEXTS)
            assert found.lengths_N.tolist() == wanted.lengths_N.tolist()
            np.testing.assert_allclose(found.values_TD, wanted.values_TD, atol=1e-5)
