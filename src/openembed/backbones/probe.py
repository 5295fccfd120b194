"""Proof at load time that a backbone sees what it should: both ways inside a text, nothing of its neighbours.

A decoder that stays causal, or texts that leak into one another when packed, give plausible and wrong vectors; both are
refused before the first one is made.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openembed.backbones.text import TextBackbone
from openembed.packing import Packed, TokenRows, pack

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest accepted relative difference between packed and alone, by precision."""


@dataclass(frozen=True)
class Probe:
    """What was measured: largest changes relative to the hidden states' scale."""

    sees_later_tokens: float
    """Change of a text's first position when its last token is replaced."""
    neighbour_leak: float
    """Change of a text's states when its neighbour in the pack is replaced."""
    packed_difference: float
    """Difference between a text's states packed with others and alone."""
    tolerance: float

    @property
    def bidirectional(self) -> bool:
        """True when the first position moved."""
        return self.sees_later_tokens > 1e-6

    @property
    def isolated(self) -> bool:
        """True when neighbours do not matter and packing changes nothing."""
        return self.neighbour_leak <= self.tolerance and self.packed_difference <= self.tolerance


def run_probe(backbone: TextBackbone, seed: int = 0) -> Probe:
    """Returns the measurements on a few short random texts (five forward passes of about 30 tokens)."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            return _measure(backbone, np.random.default_rng(seed))
    finally:
        backbone.train(was_training)


def _measure(backbone: TextBackbone, rng: np.random.Generator) -> Probe:
    low, high = backbone.vocabulary // 4, max(backbone.vocabulary // 2, backbone.vocabulary // 4 + 2)
    first, second, third = (rng.integers(low, high, size=n) for n in (9, 9, 6))
    changed = first.copy()
    changed[-1] = low + (changed[-1] - low + 1) % (high - low)
    device = next(backbone.parameters()).device

    def states(*texts: np.ndarray) -> Tensor:
        rows = TokenRows([t.astype(np.int32) for t in texts], np.zeros(len(texts), dtype=np.int32))
        packed: Packed = pack(rows, device=device)
        return backbone(packed).float()

    together = states(first, second, third)
    after_change = states(changed, second, third)
    alone = torch.cat([states(first), states(second), states(third)])
    scale = together.abs().max().clamp_min(1e-12)
    n = len(first)
    return Probe(
        sees_later_tokens=float((after_change[0] - together[0]).abs().max() / scale),
        neighbour_leak=float((after_change[n:] - together[n:]).abs().max() / scale),
        packed_difference=float((alone - together).abs().max() / scale),
        tolerance=TOLERANCE.get(next(backbone.parameters()).dtype, 1e-1),
    )


def check(backbone: TextBackbone) -> Probe:
    """Returns the probe of a sound backbone; leaves packing for groups of equal length where a family needs that.

    Raises ``ValueError`` when the model stays causal though a bidirectional one was asked for (or the reverse), or when
    texts influence one another however it is run.
    """
    probe, reason = _try(backbone)
    if _sound(backbone, probe):
        return probe  # type: ignore[return-value]
    reason = reason or _difference(probe)
    for open_masks in (False, True) if backbone.bidirectional else (False,):
        backbone.stop_packing(open_masks=open_masks)
        latest, failure = _try(backbone)
        probe = latest or probe
        if _sound(backbone, latest):
            logger.warning("%s cannot be packed (%s): texts run in groups of equal length", _name(backbone), reason)
            return latest  # type: ignore[return-value]
    if probe is None:
        raise ValueError(f"{_name(backbone)} cannot be used as a text backbone: {failure}")
    if not probe.isolated:
        raise ValueError(f"{_name(backbone)} mixes neighbouring texts ({_difference(probe)}): its vectors would depend on the "
            "batch. Use another model family.")  # fmt: skip
    raise ValueError(_wrong_view(backbone, probe))


def _sound(backbone: TextBackbone, probe: Probe | None) -> bool:
    return probe is not None and probe.isolated and probe.bidirectional == backbone.bidirectional


def _difference(probe: Probe | None) -> str:
    if probe is None:
        return ""
    return (
        f"packed and alone differ by {probe.packed_difference:.1e}, neighbours leak {probe.neighbour_leak:.1e}, "
        f"allowed {probe.tolerance:.0e}"
    )


def _wrong_view(backbone: TextBackbone, probe: Probe) -> str:
    if backbone.bidirectional:
        return (
            f"{_name(backbone)} stays causal: replacing a text's last token leaves its first position unchanged, so "
            "later words would be ignored. Set backbone.attention = 'causal' with a last-token head, or use another family."
        )
    return (
        f"{_name(backbone)} sees later tokens (change {probe.sees_later_tokens:.1e}) though attention = 'causal' was asked "
        "for. Set backbone.attention = 'bidirectional' or 'model'."
    )


def _try(backbone: TextBackbone) -> tuple[Probe | None, str]:
    try:
        return run_probe(backbone), ""
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _name(backbone: TextBackbone) -> str:
    return type(backbone.model).__name__
