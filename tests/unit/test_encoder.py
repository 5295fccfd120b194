import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import TEXTS
from tiny_training import sentence, tiny_encoder, tiny_sparse_encoder

import openembed
from openembed.config import parse
from openembed.encoder import EncoderConfig, PromptConfig
from openembed.packing import pack


@pytest.fixture(scope="module")
def encoder(make_encoder):
    return make_encoder(head={"kind": "latent_attention", "latents": 6, "heads": 2})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(TEXTS))), budget=st.integers(1, 300))
def test_batching_and_order_do_not_change_a_vector(encoder, order, budget):
    expected = encoder.encode(TEXTS)
    values = encoder.encode([TEXTS[i] for i in order], token_budget=budget)
    np.testing.assert_allclose(values, expected[list(order)], atol=1e-6)


def test_vectors_are_float32_of_length_one_unless_asked(encoder):
    values = encoder.encode(TEXTS)
    assert values.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, atol=1e-5)
    raw = encoder.encode(TEXTS, normalize=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), values, atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.width)


def test_encoding_leaves_the_training_mode_as_it_was(encoder):
    encoder.train()
    first = encoder.encode(TEXTS)
    assert encoder.training
    encoder.eval()
    np.testing.assert_array_equal(first, encoder.encode(TEXTS))


def test_saved_encoder_is_the_same_and_replaces_whole(make_encoder, tmp_path):
    for head in ({"kind": "mean"}, {"kind": "self_attention", "heads": 4}, {"kind": "latent_attention", "latents": 3}):
        encoder = make_encoder(head=head, projections=[{"width": 6}])
        encoder.save(tmp_path / "model")
        again = openembed.load(tmp_path / "model")
        np.testing.assert_array_equal(encoder.encode(TEXTS), again.encode(TEXTS))
        assert again.fingerprint == encoder.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_fingerprint_follows_weights_and_configuration(make_encoder):
    encoder = make_encoder()
    before = encoder.fingerprint
    assert before == make_encoder().fingerprint != make_encoder(seed=1).fingerprint
    assert before != make_encoder(max_length=100).fingerprint
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    assert encoder.fingerprint != before


def test_saving_over_something_else_is_refused(make_encoder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no openembed checkpoint"):
        make_encoder().save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_older_checkpoint(make_encoder, tmp_path, monkeypatch):
    make_encoder().save(tmp_path / "model")
    before = openembed.load(tmp_path / "model").fingerprint
    changed = make_encoder(seed=5)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("openembed.checkpoints.native.write_sentence_transformers_files", full_disk)
    with pytest.raises(OSError, match="No space"):
        changed.save(tmp_path / "model")
    assert openembed.load(tmp_path / "model").fingerprint == before
    assert os.listdir(tmp_path) == ["model"]


def test_damaged_and_missing_files_are_named(make_encoder, tmp_path):
    make_encoder(head={"kind": "latent_attention", "latents": 3}).save(tmp_path / "whole")

    def broken(name, change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        change(folder / name)
        return folder

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])

    for name, change, message in [
        ("model.safetensors", truncate, r"model\.safetensors: truncated or damaged"),
        ("head.safetensors", truncate, r"head\.safetensors: truncated or damaged"),
        ("head.safetensors", os.unlink, r"head\.safetensors: no such file"),
        ("tokenizer.json", os.unlink, r"tokenizer\.json: no such file"),
        ("openembed.json", truncate, r"openembed\.json: not valid JSON"),
        ("openembed.json", lambda p: _edit(p, nonsense=1), r"openembed\.json: nonsense: Extra inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            openembed.load(broken(name, change))


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_that_are_missing_are_not_made_up(make_encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    make_encoder().save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are incomplete; missing .*layers\.1\.mlp\.up_proj"):
        openembed.load(tmp_path / "model")


def test_a_model_that_is_nowhere_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        openembed.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no model here"):
        openembed.load(tmp_path)


def test_a_plain_model_needs_a_head(make_encoder, tmp_path):
    encoder = make_encoder(attention="causal")
    encoder.backbone.model.save_pretrained(tmp_path)
    encoder.tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="has no head"):
        openembed.load(tmp_path)
    opened = openembed.load(tmp_path, head={"kind": "last_token"})
    assert not opened.backbone.bidirectional
    assert opened.encode(["a"]).shape == (1, 32)
    with pytest.raises(ValueError, match="kind"):
        openembed.load(tmp_path, head={"kind": "nonsense"})


def test_dtype_and_configuration_errors(make_encoder, tmp_path):
    make_encoder().save(tmp_path / "model")
    assert openembed.load(tmp_path / "model", dtype="bfloat16").encode(["a"]).dtype == np.float32
    with pytest.raises(ValueError, match="dtype 'int3' is not supported"):
        openembed.load(tmp_path / "model", dtype="int3")
    with pytest.raises(ValueError, match=r"test: head\.latent_attention\.latnets: Extra inputs.*got 3"):
        make_encoder(head={"kind": "latent_attention", "latnets": 3})
    with pytest.raises(ValueError, match="tokenizer_path"):
        openembed.build(parse(EncoderConfig, {"backbone": {"architecture": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1,
                        "n_head": 2, "vocab_size": 300}}, "head": {"kind": "mean"}}, "test"))  # fmt: skip
    with pytest.raises(ValueError, match="vocab_size is 100"):
        make_encoder(architecture={"vocab_size": 100})


def test_precision_that_overflows_is_named(make_encoder):
    encoder = make_encoder()
    with torch.no_grad():
        encoder.backbone.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        encoder.encode(["a"])


def test_prompts_render_once():
    prompts = PromptConfig(template="Instruct: {task}\nQuery: ")
    rendered = prompts.render("find it")
    assert rendered == "Instruct: find it\nQuery: "
    assert prompts.render(rendered) == rendered
    assert prompts.render("Instruct: find it\nQuery:") == "Instruct: find it\nQuery:"
    assert prompts.render("") == ""
    assert PromptConfig(template="{task}: ").render("query") == "query: "


def test_a_setting_at_its_default_leaves_fingerprints_alone(make_encoder):
    from pydantic import Field

    from openembed.config import chosen
    from openembed.heads.pooling import MeanConfig

    class Later(EncoderConfig):
        added: int = 3
        table: dict[str, int] = Field(default_factory=dict)

    config = make_encoder().config
    assert chosen(Later(**config.model_dump())) == chosen(config)
    assert chosen(Later(**config.model_dump(), added=4)) == {**chosen(config), "added": 4}
    assert chosen(MeanConfig()) == {"kind": "mean"}
    assert make_encoder().fingerprint != make_encoder(head={"kind": "cls"}).fingerprint


def test_fingerprint_follows_the_tokenizer(make_encoder, tokenizer_dir, tmp_path):
    from tokenizers import Tokenizer, normalizers

    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert make_encoder(tokenizer_path=str(tmp_path)).fingerprint != make_encoder().fingerprint


BERT = {"model_type": "bert", "max_position_embeddings": 24}


@pytest.mark.parametrize(
    ("family", "positions"),
    [(BERT, 24), ({**BERT, "model_type": "roberta", "pad_token_id": 300}, None), ({"model_type": "mistral"}, None)],
    ids=["bert", "roberta", "mistral"],
)
def test_no_text_is_longer_than_the_learned_positions(make_encoder, family, positions):
    if family["model_type"] == "roberta":  # counts from padding_idx + 1
        family = {**family, "max_position_embeddings": 24 + 301}
        positions = 24
    encoder = make_encoder(architecture=family, attention="model")
    assert encoder.encode(["word " * 100]).shape == (1, 32)
    assert encoder.max_length == (positions or 192)
    if positions:
        encoder.encode(["word " * 100], max_length=positions)
        with pytest.raises(ValueError, match="25 is more than the 24 positions"):
            encoder.encode(["word"], max_length=25)


def test_options_are_checked(encoder):
    for options in ({"max_length": 0}, {"token_budget": 0}, {"max_length": -3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            encoder.encode_queries(["a"], **options)
    with pytest.raises(TypeError, match="batch_size"):
        encoder.encode_documents(["a"], batch_size=3)
    with pytest.raises(ValueError, match="not both"):
        encoder.document_prompt(task="a", instruction="b")


def test_encoding_leaves_each_part_in_its_own_mode(make_encoder):
    encoder = make_encoder(architecture={"attention_dropout": 0.5})
    expected = encoder.encode(TEXTS)
    encoder.backbone.train()
    encoder.training = False
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected)
    assert encoder.backbone.training
    assert not encoder.training
    assert not encoder.head.training


def test_adapters_are_merged_before_saving(make_encoder, tmp_path):
    from openembed.backbones.adapters import LoraConfig, add_lora, merge_lora

    encoder = make_encoder()
    add_lora(encoder.backbone.model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="merge them before saving"):
        encoder.save(tmp_path / "model")
    assert os.listdir(tmp_path) == []
    merge_lora(encoder.backbone.model)
    encoder.save(tmp_path / "model")
    openembed.load(tmp_path / "model")


@pytest.mark.parametrize("atomic", [True, False])
def test_an_older_checkpoint_is_replaced_in_one_step_where_the_system_can(make_encoder, tmp_path, monkeypatch, atomic):
    from openembed import files

    make_encoder().save(tmp_path / "model")
    renames, rename = [], os.rename
    monkeypatch.setattr("openembed.checkpoints.folder.os.rename", lambda a, b: (renames.append(a), rename(a, b)))
    if not atomic:
        monkeypatch.setattr("openembed.checkpoints.folder.exchange", lambda first, second: False)
    elif not files.exchange(_folder(tmp_path / "a"), _folder(tmp_path / "b")):
        pytest.skip("this system has no atomic exchange")
    changed = make_encoder(seed=5)
    changed.save(tmp_path / "model")
    assert len(renames) == (0 if atomic else 2)
    assert openembed.load(tmp_path / "model").fingerprint == changed.fingerprint
    assert sorted(os.listdir(tmp_path)) == (["a", "b", "model"] if atomic else ["model"])


def _folder(path):
    path.mkdir()
    return path


def test_a_head_for_a_model_that_has_one_is_refused(make_encoder, tmp_path):
    make_encoder().save(tmp_path / "model")
    with pytest.raises(ValueError, match="has its own head"):
        openembed.load(tmp_path / "model", head={"kind": "cls"})


def test_a_revision_reaches_the_hub(make_encoder, tmp_path, monkeypatch):
    make_encoder().save(tmp_path / "model")
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    openembed.load("someone/model", revision="abc")
    assert (asked["name"], asked["revision"]) == ("someone/model", "abc")
    assert not any(pattern.endswith(".py") for pattern in asked["allow_patterns"])


def test_the_model_is_probed_once_and_as_it_will_run(make_encoder, tmp_path, monkeypatch):
    from openembed.backbones.prepacked import PrepackedLinear, available
    from openembed.backbones.probe import check

    make_encoder().save(tmp_path / "model")
    probed = []

    def watch(backbone):
        probed.append(any(isinstance(module, PrepackedLinear) for module in backbone.modules()))
        return check(backbone)

    monkeypatch.setattr("openembed.checkpoints.check", watch)
    openembed.load(tmp_path / "model")
    assert probed == [available()]


def test_precision_drift_is_that_of_a_model_loaded_so(make_encoder, tmp_path):
    from openembed.verify import _in_precision

    encoder = make_encoder()
    encoder.save(tmp_path / "model")
    loaded = openembed.load(tmp_path / "model", dtype="bfloat16")
    np.testing.assert_array_equal(_in_precision(encoder, "bfloat16").encode(TEXTS), loaded.encode(TEXTS))
    assert encoder.dtype == torch.float32


def test_a_token_the_model_has_no_row_for_is_named(make_encoder, tmp_path):
    make_encoder().save(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    values = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["added_tokens"].append({"id": 384, "content": "ZZ", **flags})
    path.write_text(json.dumps(values))
    encoder = openembed.load(tmp_path / "model")
    assert encoder.encode(["plain"]).shape == (1, 32)
    with pytest.raises(ValueError, match="text 1 has the token 'ZZ'"):
        encoder.encode(["plain", "a ZZ"])


STEPPED = {
    "latent attention": tiny_encoder,
    "vocabulary": tiny_sparse_encoder,
    "table": lambda folder: tiny_sparse_encoder(folder, query_head={"kind": "idf_lookup", "trainable": True}),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("head", STEPPED)
def test_after_a_step_of_any_optimizer_texts_are_encoded_by_the_new_weights(head, fused, tmp_path):
    """What is kept of the weights between encodings (folded, packed, as an array, hashed) goes with them."""
    encoder, texts = STEPPED[head](tmp_path / "tokenizer").eval(), [sentence(1, 2, 3), sentence(*range(5, 25))]

    def encoded(model):
        rows = [model.encode_queries(texts), model.encode_documents(texts)]
        return [row if isinstance(row, np.ndarray) else row.toarray() for row in rows]

    before, fingerprint = encoded(encoder), encoder.fingerprint
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.05, fused=fused)
    for queries in (True, False):
        rows = encoder.tokenize(texts, queries=np.full(len(texts), queries) if encoder.sided else None)
        encoder(pack(rows)).square().sum().backward()
    optimizer.step()
    after = encoded(encoder)
    encoder.save(tmp_path / "stepped")
    anew = openembed.load(tmp_path / "stepped")
    for old, new, expected in zip(before, after, encoded(anew), strict=True):
        np.testing.assert_allclose(new, expected, atol=1e-5)
        assert abs(new - old).max() > 1e-3
    assert fingerprint != encoder.fingerprint == anew.fingerprint
