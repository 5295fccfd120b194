"""NV-Embed layouts against vectors of the published code, and what a wrong checkpoint is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import openembed


@pytest.fixture(scope="module")
def cases(golden_dir):
    return json.loads((golden_dir / "expected.json").read_text())


@pytest.fixture(scope="module")
def encoder(golden_dir):
    return openembed.load(golden_dir)


@pytest.fixture
def copy_dir(golden_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(golden_dir, folder)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def encode(encoder, case, **options):
    return encoder.encode(case["prompts"], instruction=case["instruction"], max_length=case["max_length"], **options)


def test_every_reference_vector(encoder, cases):
    for case in cases:
        np.testing.assert_allclose(encode(encoder, case), case["embeddings"], atol=1e-5, err_msg=case["name"])


@pytest.mark.parametrize("token_budget", [1, 40, 200])
def test_reference_vectors_in_any_batch_size_and_order(encoder, cases, token_budget):
    for case in cases:
        turned = {**case, "prompts": case["prompts"][::-1]}
        values = encode(encoder, turned, token_budget=token_budget)[::-1]
        np.testing.assert_allclose(values, case["embeddings"], atol=1e-5)


def test_unfolded_head_gives_the_same_vectors(encoder, cases):
    from openembed.packing import pack

    case = cases[0]
    rows = encoder.tokenize(case["prompts"], case["instruction"], case["max_length"])
    values = torch.nn.functional.normalize(encoder(pack(rows)), dim=-1).detach()
    np.testing.assert_allclose(values, case["embeddings"], atol=1e-5)


def test_shards_and_half_precision_files_open(copy_dir, cases):
    tensors = load_file(copy_dir / "model.safetensors")
    (copy_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name].contiguous() for name in members}, copy_dir / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (copy_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_allclose(encode(openembed.load(copy_dir), cases[0]), cases[0]["embeddings"], atol=1e-5)
    save_file({name: tensors[name].half() for name in names[1::2]}, copy_dir / "model-00002-of-00002.safetensors")
    np.testing.assert_allclose(encode(openembed.load(copy_dir), cases[0]), cases[0]["embeddings"], atol=5e-3)
    (copy_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: no such file"):
        openembed.load(copy_dir)


def test_an_early_version_1_config_opens(copy_dir, cases):
    config = json.loads((copy_dir / "config.json").read_text())
    del config["hidden_size"]
    head = config["latent_attention_config"]
    config["latent_attention_config"] = {"model_type": "latent_attention", "num_cross_heads": head["num_cross_heads"]}
    (copy_dir / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(encode(openembed.load(copy_dir), cases[2]), cases[2]["embeddings"], atol=1e-5)


def test_instructions_come_from_the_checkpoint_when_it_has_them(copy_dir):
    assert "SciFact" in openembed.load(copy_dir).config.prompts.tasks
    (copy_dir / "instructions.json").write_text(json.dumps({"Mine": {"query": "Find it", "corpus": ""}}))
    encoder = openembed.load(copy_dir)
    assert encoder.query_prompt(task="Mine") == "Instruct: Find it\nQuery: "
    with pytest.raises(ValueError, match="unknown task 'SciFact'; this model knows: Mine"):
        encoder.query_prompt(task="SciFact")


def test_weights_that_do_not_fit_are_named(copy_dir):
    path = copy_dir / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "embedding_model.norm.weight"}, path)
    with pytest.raises(ValueError, match=r"missing \['norm.weight'\]"):
        openembed.load(copy_dir)
    save_file({**tensors, "embedding_model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"unexpected \['lm_head.weight'\]"):
        openembed.load(copy_dir)
    save_file({**tensors, "other.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"unexpected tensor 'other.weight'"):
        openembed.load(copy_dir)
    save_file({**tensors, "embedding_model.norm.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"norm.weight has shape \(3,\), expected \(64,\)"):
        openembed.load(copy_dir)


def test_a_truncated_file_is_named(copy_dir):
    path = copy_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
        openembed.load(copy_dir)


def test_empty_long_and_special_inputs_give_finite_vectors(encoder):
    texts = ["", "a</s>b", "word " * 3000, "\x00", "\ud800"]
    values = encoder.encode(texts, max_length=64)
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1.0, atol=1e-5)
    with pytest.raises(ValueError, match="instruction takes"):
        encoder.encode(["text"], instruction="long " * 100, max_length=32)
    with pytest.raises(TypeError, match="list of strings"):
        encoder.encode("one string")


def test_queries_documents_and_tasks(encoder):
    text = ["judo"]
    task = "Given a scientific claim, retrieve documents that support or refute the claim"
    literal = encoder.encode(text, instruction=f"Instruct: {task}\nQuery: ")
    for values in (
        encoder.encode_queries(text, task="SciFact"),
        encoder.encode_queries(text, instruction=task),
        encoder.encode_queries(text, instruction=f"Instruct: {task}\nQuery: "),
    ):
        np.testing.assert_array_equal(values, literal)
    np.testing.assert_array_equal(encoder.encode_documents(text), encoder.encode(text))
    np.testing.assert_array_equal(encoder.encode_documents(text, task="SciFact"), encoder.encode(text))
    assert encoder.document_prompt(task="STS12") == encoder.query_prompt(task="STS12") != ""
    with pytest.raises(ValueError, match="not both"):
        encoder.encode_queries(text, task="SciFact", instruction=task)


def test_the_end_token_is_read_where_newer_libraries_keep_it(copy_dir, cases):
    (copy_dir / "special_tokens_map.json").unlink()
    np.testing.assert_allclose(encode(openembed.load(copy_dir), cases[0]), cases[0]["embeddings"], atol=1e-5)
    path = copy_dir / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": {"content": "<unk>"}}))
    assert openembed.load(copy_dir).config.tokenizer.eos_token == "<unk>"
    path.unlink()
    assert openembed.load(copy_dir).config.tokenizer.eos_token == "</s>"


def test_a_head_that_lacks_weights_or_a_broken_task_table_is_named(copy_dir):
    tensors = load_file(copy_dir / "model.safetensors")
    for missing in ("latents", "cross_attend_blocks.0.fn.to_q.weight"):
        name = f"latent_attention_model.{missing}"
        save_file({k: v for k, v in tensors.items() if k != name}, copy_dir / "model.safetensors")
        with pytest.raises(ValueError, match=rf"head's weights are incomplete; missing \['{name}'\]"):
            openembed.load(copy_dir)
    save_file(tensors, copy_dir / "model.safetensors")
    (copy_dir / "instructions.json").write_text('{"SciFact": "Find it"}')
    with pytest.raises(ValueError, match=r"instructions\.json: expected"):
        openembed.load(copy_dir)


def test_pooling_of_the_instruction_where_the_checkpoint_says_so(copy_dir):
    path = copy_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "is_mask_instruction": False}))
    encoder = openembed.load(copy_dir)
    prompt = encoder.query_prompt(task="SciFact")
    np.testing.assert_allclose(encoder.encode(["judo"], instruction=prompt), encoder.encode([prompt + "judo"]), atol=1e-6)
