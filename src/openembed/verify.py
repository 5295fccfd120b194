"""Does a model do what it should here? Measured answers to the questions that go wrong silently.

Each check runs the model: what its tokens see, what ends a text, which tokens are pooled, and whether padding, order,
packing and precision change a vector.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openembed.backbones.probe import run_probe
from openembed.backbones.structure import leave_int8, use_kernels
from openembed.backbones.text import TextBackbone, has_causal_layers
from openembed.encoded import Encoded, joined, kind_of, take
from openembed.encoder import Encoder
from openembed.packing import pack
from openembed.vectors import unit

TEXTS = (
    "Which planet is known as the red planet?",
    "are judo throws allowed in wrestling",
    "Mars is the fourth planet from the Sun. Its surface is covered with iron oxide, which gives it its colour.",
    "7 days",
    "naïve café — “quotes” and 中文",
    "A short note.",
)
INSTRUCTION = "Given a question, retrieve passages that answer the question"
LARGEST_COPY = 500_000_000
"""Models with more parameters are not copied for the precision check."""


@dataclass(frozen=True)
class Check:
    """One question: ``passed`` is None where it does not apply; ``detail`` is what was seen."""

    name: str
    passed: bool | None
    detail: str


def verify(encoder: Encoder) -> list[Check]:
    """Returns every check's outcome; tolerances are 1e-5 for float32 and follow the precision otherwise."""
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[encoder.dtype]
    return [
        _attention(encoder),
        _end_token(encoder),
        _instruction_span(encoder),
        _padding(encoder, 0.1 if encoder.computed_in == "int8" else tolerance),  # padded, no 8-bit kernel runs whole layers
        _order(encoder, tolerance),
        _packing(encoder, tolerance),
        _round_trip(encoder),
        _precision(encoder),
    ]


def _attention(encoder: Encoder) -> Check:
    probe = run_probe(encoder.backbone)
    seen = "sees later tokens" if probe.bidirectional else "sees earlier tokens only"
    passed = probe.bidirectional == encoder.backbone.bidirectional and probe.isolated
    return Check(
        "bidirectional" if encoder.backbone.bidirectional else "causal",
        passed,
        f"first token moves by {probe.sees_later_tokens:.1e} when the last is replaced ({seen}); "
        f"neighbours leak {probe.neighbour_leak:.1e}",
    )


def _end_token(encoder: Encoder) -> Check:
    suffix = encoder.tokenizer.suffix
    if not suffix:
        return Check("end token", None, "this model's tokenizer appends none")
    name = "".join(encoder.tokenizer.backend.id_to_token(i) for i in suffix)
    rows = encoder.tokenize(TEXTS)
    whole = all(list(row[-len(suffix) :]) == suffix for row in rows.ids)
    limit = len(encoder.tokenizer.prefix) + len(suffix) + 4
    cut = list(encoder.tokenize([" ".join(TEXTS)], max_length=limit).ids[0][-len(suffix) :]) == suffix
    expected = encoder.config.tokenizer.truncation == "keep_eos"
    return Check(
        "end token",
        whole and cut == expected,
        f"every text ends in {name}; a cut text {'keeps' if cut else 'loses'} it (rule: {encoder.config.tokenizer.truncation})",
    )


def _instruction_span(encoder: Encoder) -> Check:
    rule = encoder.config.tokenizer.pool_instruction
    prompt = encoder.query_prompt(instruction=INSTRUCTION)
    rows = encoder.tokenize(TEXTS[1:2], prompt)
    start = int(rows.pool_starts[0])
    pooled = encoder.tokenizer.decode(rows.ids[0][start:]).strip()
    if rule == "include":
        return Check("instruction span", start == 0, "the instruction is pooled with the text")
    passed = pooled.lower().endswith(TEXTS[1]) and "Query" not in pooled and "Instruct" not in pooled
    return Check("instruction span", passed, f"{start} positions left out; pooled text: {pooled!r} (rule: {rule})")


def _padding(encoder: Encoder, tolerance: float) -> Check:
    if not encoder.backbone.packable:
        return Check("padding", None, "this family runs in groups of equal length; nothing is padded")
    rows = encoder.tokenize(TEXTS)
    try:
        with torch.inference_mode():
            packed = encoder.backbone(pack(rows, device=encoder.device)).float()
            padded = _padded_states(encoder.backbone, rows.ids)
    except (RuntimeError, ValueError, TypeError) as error:
        return Check("padding", None, f"transformers' own attention cannot run it padded here ({str(error).splitlines()[0]})")
    scale = float(packed.abs().max())
    worst = float((packed - padded).abs().max()) / scale
    return Check(
        "padding", worst <= tolerance * 10, f"packed and right-padded (transformers' own attention) differ by {worst:.1e}"
    )


def _padded_states(backbone: TextBackbone, ids: list[np.ndarray]) -> Tensor:
    """Hidden states of the real tokens from a padded batch under an explicit mask, ``(T, D)``."""
    model, device = backbone.model, next(backbone.parameters()).device
    lengths = torch.tensor([len(row) for row in ids], device=device)
    longest = int(lengths.max())
    batch = torch.stack([torch.from_numpy(np.pad(row.astype(np.int64), (0, longest - len(row)))) for row in ids]).to(device)
    real = torch.arange(longest, device=device) < lengths[:, None]
    seen = real[:, None, None, :].expand(-1, 1, longest, -1)
    if not backbone.bidirectional:
        seen = seen & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    dtype = next(backbone.parameters()).dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        visible = mask if has_causal_layers(model) else real.long()
        states = model(input_ids=batch, attention_mask=visible).last_hidden_state
    finally:
        model.set_attn_implementation(before)
    return states[real].float()


def _order(encoder: Encoder, tolerance: float) -> Check:
    backward = take(encoder.encode(TEXTS[::-1]), range(len(TEXTS))[::-1])
    return _same("order", encoder.encode(TEXTS), backward, tolerance, "texts in another order")


def _packing(encoder: Encoder, tolerance: float) -> Check:
    alone = joined([encoder.encode([text]) for text in TEXTS])
    return _same("packing", encoder.encode(TEXTS), alone, tolerance, "texts packed together and each alone")


def _same(name: str, first: Encoded, second: Encoded, tolerance: float, what: str) -> Check:
    one, other = _vectors(first), _vectors(second)
    if one.shape != other.shape:
        return Check(name, False, f"{what} have {len(one)} and {len(other)} vectors")
    worst = float(np.abs(one - other).max(initial=0)) / max(1.0, float(np.abs(one).max(initial=0)))
    return Check(name, worst <= tolerance, f"{what} differ by {worst:.1e} (allowed {tolerance:.0e})")


def _vectors(encoded: Encoded) -> np.ndarray:
    """The vectors of all texts, or of all their tokens, one below the other."""
    kind = kind_of(encoded)
    return encoded.values_TD if kind == "tokens" else encoded.toarray() if kind == "sparse" else encoded


def _round_trip(encoder: Encoder) -> Check:
    rows = encoder.tokenize(TEXTS)
    changed = [text for text, row in zip(TEXTS, rows.ids, strict=True) if encoder.tokenizer.decode(row).strip() != text]
    if not changed:
        return Check("ids round trip", True, "every sample text is recovered from its token ids")
    folded = [t for t in changed if _squash(encoder.tokenizer.decode(encoder.tokenize([t]).ids[0])) != _squash(t)]
    lossy = f"{len(changed)} of {len(TEXTS)} texts come back with other case or spacing"
    return Check("ids round trip", None if not folded else False, lossy if not folded else f"lost characters in {folded[0]!r}")


def _squash(text: str) -> str:
    import unicodedata

    plain = unicodedata.normalize("NFKD", text.lower())
    return "".join(c for c in plain if not unicodedata.combining(c) and not c.isspace())


def _in_precision(encoder: Encoder, precision: str) -> Encoder:
    """A copy that computes in ``precision``, as ``load`` gives it: tables of rotary frequencies stay in float32."""
    copied = copy.deepcopy(encoder)
    leave_int8(copied.backbone)
    if precision == "int8":
        use_kernels(copied.backbone, "int8")
    else:
        for parameter in copied.parameters():
            parameter.data = parameter.data.to(getattr(torch, precision))
    return copied


def _precision(encoder: Encoder) -> Check:
    if encoder.dtype != torch.float32 or sum(p.numel() for p in encoder.parameters()) > LARGEST_COPY:
        return Check("dtype drift", None, f"measured from float32 weights of at most {LARGEST_COPY:,} parameters")
    reference_ND = unit(_vectors(_in_precision(encoder, "float32").encode(TEXTS)))
    seen = []
    for precision in ("bfloat16", "float16", *(("int8",) if encoder.device.type == "cpu" else ())):
        values_ND = unit(_vectors(_in_precision(encoder, precision).encode(TEXTS)))
        full = np.abs(reference_ND).sum(axis=1) > 0
        same = values_ND.shape == reference_ND.shape
        seen.append((precision, float((reference_ND * values_ND)[full].sum(axis=1).min()) if same else 0.0))
    detail = ", ".join(f"{name} cosine ≥ {cosine:.5f}" for name, cosine in seen)
    return Check("dtype drift", seen[0][1] > 0.98, f"against float32: {detail}")
