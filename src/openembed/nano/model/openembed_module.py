"""A self-contained sentence-transformers module for an openembed checkpoint; it needs openembed nowhere.

It repeats, on padded batches, what openembed computes on packed ones: tokens as ``openembed.json`` says, a decoder under an
explicit mask, pooling over the right span, the head. Shapes: ``B`` texts, ``L`` padded length, ``D`` width.
"""

from __future__ import annotations

import json
import os
import re
import shutil

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules.input_module import InputModule
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel

ACTIVATIONS = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def masked_mean(states, weights):
    """Returns the weighted mean over tokens, ``(B, D)``."""
    return (states.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


class FeedForward(nn.Module):
    """Gated feed-forward, value half first."""

    def __init__(self, width, expansion):
        super().__init__()
        self.up = nn.Linear(width, 2 * expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x):
        """Returns ``(B, L, D)``."""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class LatentAttention(nn.Module):
    """Tokens attend to learned latents, then are averaged (NV-Embed's released block)."""

    def __init__(self, config, width):
        super().__init__()
        self.heads = config["heads"]
        inner = self.heads * (config["head_width"] or width)
        self.latents = nn.Parameter(torch.empty(config["latents"], width))
        self.norm, self.norm_latents, self.norm_feed_forward = (nn.LayerNorm(width) for _ in range(3))
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.feed_forward = FeedForward(width, config["expansion"])

    def forward(self, x, mask, pool):
        """Returns ``(B, D)``."""
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(self.norm_latents(self.latents)).chunk(2, dim=-1)
        k, v = (y.unflatten(-1, (self.heads, -1)).transpose(0, 1) for y in (k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1).to(v.dtype)
        x = self.to_out((weights @ v).transpose(1, 2).flatten(-2)) + x
        x = self.feed_forward(self.norm_feed_forward(x)) + x
        return masked_mean(x, pool)


class PaperLatentAttention(nn.Module):
    """softmax(Q Kᵀ) V with K = V = latents, then an MLP, then the mean (as the paper prints it)."""

    def __init__(self, config, width):
        super().__init__()
        self.heads = config["heads"]
        self.latents = nn.Parameter(torch.empty(config["latents"], width))
        self.up = nn.Linear(width, config["expansion"] * width)
        self.down = nn.Linear(config["expansion"] * width, width)

    def forward(self, x, mask, pool):
        """Returns ``(B, D)``."""
        q = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latents = self.latents.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        weights = (q @ latents.transpose(-1, -2)).float().softmax(-1).to(latents.dtype)
        return masked_mean(self.down(F.gelu(self.up((weights @ latents).transpose(1, 2).flatten(-2)))), pool)


class SelfAttention(nn.Module):
    """One bidirectional block over the text, then the mean."""

    def __init__(self, config, width):
        super().__init__()
        self.heads = config["heads"]
        self.norm, self.norm_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.feed_forward = FeedForward(width, config["expansion"])

    def forward(self, x, mask, pool):
        """Returns ``(B, D)``."""
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask == 0, torch.finfo(x.dtype).min)[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = self.to_out(out.transpose(1, 2).flatten(-2)) + x
        x = self.feed_forward(self.norm_feed_forward(x)) + x
        return masked_mean(x, pool)


class Plain(nn.Module):
    """The heads without weights: mean, weighted_mean, mean_sqrt_length, max, cls, last_token and their concatenation."""

    def __init__(self, config, width):
        super().__init__()
        self.parts = config["parts"] if config["kind"] == "concat" else [config["kind"]]
        self.after_instruction = config.get("after_instruction", False)

    def forward(self, x, mask, pool):
        """Returns ``(B, parts · D)``."""
        x = x.float()
        position = torch.arange(1, x.shape[1] + 1, device=x.device)
        last = mask.sum(1) - 1
        values = {
            "mean": lambda: masked_mean(x, pool),
            "weighted_mean": lambda: masked_mean(x, pool * position),
            "mean_sqrt_length": lambda: (x * pool[..., None]).sum(1) / pool.sum(1, keepdim=True).sqrt(),
            "max": lambda: x.masked_fill(pool[..., None] == 0, float("-inf")).amax(1),
            "cls": lambda: x[torch.arange(len(x), device=x.device), pool.argmax(1)] if self.after_instruction else x[:, 0],
            "last_token": lambda: x[torch.arange(len(x), device=x.device), last],
        }
        return torch.cat([values[part]() for part in self.parts], dim=1)


class Projection(nn.Module):
    """A linear layer after pooling."""

    def __init__(self, config, width):
        super().__init__()
        self.linear = nn.Linear(width, config["width"], bias=config["bias"])
        self.activation = ACTIVATIONS[config["activation"]]()
        same = width == config["width"]
        self.residual = (
            (nn.Identity() if same else nn.Linear(width, config["width"], bias=False)) if config["residual"] else None
        )

    def forward(self, x):
        """Returns ``(B, width)``."""
        out = self.activation(self.linear(x.to(self.linear.weight.dtype)))
        return (out if self.residual is None else out + self.residual(x)).float()


def build_head(config, width):
    """Returns the head that ``openembed.json`` names."""
    if config["kind"] == "latent_attention":
        return (PaperLatentAttention if config["variant"] == "paper" else LatentAttention)(config, width)
    return SelfAttention(config, width) if config["kind"] == "self_attention" else Plain(config, width)


class OpenEmbedModule(InputModule):
    """Tokenizer, backbone and head of an openembed checkpoint as one sentence-transformers module."""

    def __init__(self, folder, **model_options):
        super().__init__()
        self.folder = folder
        with open(os.path.join(folder, "openembed.json"), encoding="utf-8") as file:
            self.settings = json.load(file)
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        self.reading_special = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        names = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
        self.max_seq_length = self.settings["max_length"]
        self.prefix, self.suffix = self._surroundings()
        self.model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", **model_options)
        self.causal = self._is_causal()
        width = self.model.config.hidden_size
        self.head = build_head(self.settings["head"], width)
        width *= len(self.settings["head"].get("parts", [0]))
        self.projections = nn.ModuleList()
        for config in self.settings["projections"]:
            self.projections.append(Projection(config, width))
            width = config["width"]
        self.width = width
        weights = os.path.join(folder, "head.safetensors")
        if os.path.isfile(weights):
            tensors = {name: tensor.to(self.model.dtype) for name, tensor in load_file(weights).items()}
            parts = nn.ModuleDict({"head": self.head, "projections": self.projections})
            parts.load_state_dict(tensors, strict=True, assign=True)

    @classmethod
    def load(
        cls, model_name_or_path, subfolder="", token=None, cache_folder=None, revision=None, local_files_only=False, **kwargs
    ):
        """Returns the module of a local folder or hub repository."""
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        options = dict(kwargs.get("model_kwargs") or {})
        options.pop("attn_implementation", None)
        options.setdefault("dtype", torch.float32)
        return cls(folder, **options)

    def save(self, output_path, *args, **kwargs):
        """Writes the checkpoint's files with the present weights and ``max_seq_length``; also over themselves."""
        self.model.save_pretrained(output_path)
        parts = nn.ModuleDict({"head": self.head, "projections": self.projections})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.state_dict().items()}
        if tensors:
            save_file(tensors, os.path.join(output_path, "head.safetensors"))
        for name in ("openembed_module.py", "tokenizer.json", "tokenizer_config.json"):
            source, target = os.path.join(self.folder, name), os.path.join(output_path, name)
            if os.path.realpath(source) != os.path.realpath(target):
                shutil.copyfile(source, target)
        with open(os.path.join(output_path, "openembed.json"), "w", encoding="utf-8") as file:
            json.dump({**self.settings, "max_length": self.max_seq_length}, file, indent=2, ensure_ascii=False)

    def get_embedding_dimension(self):
        """Returns the width of a vector."""
        return self.width

    def preprocess(self, inputs, prompt=None, **kwargs):
        """Returns padded ids with the attention and the pooling mask."""
        prompt = self._clean(prompt or "")
        rows, starts = [], []
        marked = bool(self.special.search(prompt))
        tokenizer = self.reading_special if marked else self.tokenizer
        for text in inputs:
            text = self._clean(text)
            text = self.special.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text) if marked else text
            encoding = tokenizer.encode(prompt + text, add_special_tokens=False)
            rows.append(self._row(encoding.ids))
            starts.append(self._start(encoding, prompt, len(prompt) + len(text), tokenizer))
        lengths = torch.tensor([len(row) for row in rows])
        position = torch.arange(int(lengths.max()))
        pad = self.suffix[-1] if self.suffix else 0
        ids = torch.tensor([row + [pad] * (len(position) - len(row)) for row in rows])
        mask = (position < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "pool_mask": mask * (position >= torch.tensor(starts)[:, None])}

    def forward(self, features, **kwargs):
        """Adds ``sentence_embedding`` (not normalised) and ``token_embeddings``."""
        mask, pool = features["attention_mask"], features["pool_mask"].float()
        states = self.model(
            input_ids=features["input_ids"], attention_mask=self._visible(mask), position_ids=self._positions(mask)
        ).last_hidden_state
        values = self.head(states, mask, pool)
        for projection in self.projections:
            values = projection(values)
        features.update(sentence_embedding=values, token_embeddings=states)
        return features

    def _visible(self, mask):
        """An additive mask that hides padding, and later tokens where the model is causal."""
        if getattr(self.model.config, "sliding_window", None) is not None:
            return mask
        length, dtype = mask.shape[1], self.model.dtype
        seen = mask[:, None, None, :].bool().expand(-1, 1, length, -1)
        if self.causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)

    def _is_causal(self):
        """Whether tokens see earlier ones only: as ``openembed.json`` says, or as the checkpoint's own code does."""
        attention = self.settings["backbone"]["attention"]
        if attention != "model":
            return attention == "causal"
        layers = any(getattr(module, "is_causal", False) is True for module in self.model.modules())
        return layers and getattr(self.model.config, "is_causal", None) is not False

    def _positions(self, mask):
        embeddings = getattr(self.model, "embeddings", None)
        offset = embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
        return torch.arange(mask.shape[1], device=mask.device).expand_as(mask) + offset

    def _surroundings(self):
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        framed = self.tokenizer.encode("a", add_special_tokens=True).ids
        first = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        prefix, suffix = framed[:first], framed[first + len(bare) :]
        token = self.settings["tokenizer"]["eos_token"]
        eos = self.tokenizer.token_to_id(token) if token else None
        return prefix, suffix if eos is None or suffix[-1:] == [eos] else [*suffix, eos]

    def _row(self, body):
        limit = self.max_seq_length
        if self.settings["tokenizer"]["truncation"] == "keep_eos":
            body = body[: limit - len(self.prefix) - len(self.suffix)]
        return ([*self.prefix, *body, *self.suffix] or [0])[:limit]

    def _start(self, encoding, prompt, end, tokenizer):
        rule = self.settings["tokenizer"]["pool_instruction"]
        if not prompt or rule == "include":
            return 0
        if rule.startswith("exclude_by_count"):
            count = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
            return count + (len(self.prefix) if rule == "exclude_by_count_and_prefix" else 0)
        tokens = (encoding.char_to_token(i) for i in range(len(prompt), end))
        return len(self.prefix) + next((t for t in tokens if t is not None), len(encoding.ids))

    def _clean(self, text):
        text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        return text.lower() if self.settings["tokenizer"]["lowercase"] else text
