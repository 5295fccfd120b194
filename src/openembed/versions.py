"""Whether a weight has changed since something was computed from it and kept: packed copies, tables, fingerprints.

torch counts changes in place, but not those of tensors made in inference mode, and not those of optimizers that write from
kernels of their own (fused ones, bitsandbytes'): steps of all optimizers are counted here. Not seen: edits through ``.data``.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_counter = count(1)
_steps = 0


def _stepped(_optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    global _steps
    _steps = next(_counter)


register_optimizer_step_post_hook(_stepped)


def version(*tensors: Tensor) -> tuple[object, ...]:
    """Returns what differs once one of ``tensors`` has changed or was replaced, or any optimizer made a step."""
    if len(tensors) == 1:  # asked for at every query that is looked up
        (t,) = tensors
        return _steps, t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype
    return _steps, *((t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype) for t in tensors)
