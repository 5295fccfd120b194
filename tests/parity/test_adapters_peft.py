import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from openembed.backbones.adapters import LoraConfig, add_lora, has_lora, merge_lora


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


IDS = torch.arange(24).reshape(2, 12)


def states(model):
    with torch.no_grad():
        return model(IDS).last_hidden_state


def fill(model):
    """The same adapter values for the same layers, whatever wraps them."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name.removeprefix("base_model.model.")) + parameter.numel())
            torch.nn.init.normal_(parameter, std=0.1)


def test_starts_where_the_model_is_and_trains_only_adapters(model):
    before = states(model)
    names = {name for name, _ in model.named_parameters()}
    add_lora(model, LoraConfig())
    torch.testing.assert_close(states(model), before, rtol=0, atol=0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    layers = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in trainable}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    merge_lora(model)
    assert {name for name, _ in model.named_parameters()} == names


def test_equals_plain_peft_and_merges(model):
    plain = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
    ).eval()
    add_lora(model, LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj")))
    model.eval()
    before = states(model)
    fill(plain)
    fill(model)
    assert (states(model) - before).abs().max() > 1e-2
    torch.testing.assert_close(states(model), states(plain), rtol=0, atol=0)
    adapted = states(model)
    merge_lora(model)
    assert not has_lora(model)
    torch.testing.assert_close(states(model), adapted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states(model), states(plain.merge_and_unload()), rtol=0, atol=0)


def test_refuses_unknown_targets_and_doubled_adapters(model):
    with pytest.raises(ValueError, match=r"query name no linear layer; there are .*q_proj"):
        add_lora(model, LoraConfig(targets=("query", "q_proj")))
    add_lora(model, LoraConfig())
    with pytest.raises(ValueError, match="carries adapters already"):
        add_lora(model, LoraConfig())
