"""The kernels of pooled vocabulary logits over torch tensors.

Shapes: ``T`` states of all texts end to end, ``B`` texts, ``V`` vocabulary, ``K`` width. All are contiguous float32 on a CPU;
for products in bfloat16 states and weight may be bfloat16 too, and are copied.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from openembed.kernels.calls import has_half
from openembed.kernels.library import library


def serves(states_TK: Tensor, weight_VK: Tensor, products: torch.dtype) -> bool:
    """True when the kernels take such tensors and multiply in ``products``."""
    if any(x.device.type != "cpu" or not x.is_contiguous() for x in (states_TK, weight_VK)) or library() is None:
        return False
    given = {states_TK.dtype, weight_VK.dtype}
    if products == torch.bfloat16:
        return given <= {torch.float32, torch.bfloat16} and has_half()
    return products == torch.float32 and given == {torch.float32}


BLOCK = 64
"""Rows of a packed block."""


def packed_vocabulary(weight_VK: Tensor, *, half: bool = False) -> Tensor:
    """Returns the weight as the kernel reads it, int32: packed once, it serves every later call with the same ``half``."""
    weight_VK, (rows, width) = weight_VK.detach().float(), weight_VK.shape
    words = (width + 1) // 2 if half else width
    packed = torch.empty(-(-rows // BLOCK) * BLOCK * words, dtype=torch.int32)
    found = library()
    assert found is not None, "ask serves() first"
    sizes = map(c_int64, (rows, width))
    if found.oe_pack_vocabulary(_pointer(weight_VK), *sizes, int(half), _pointer(packed), torch.get_num_threads()):
        raise MemoryError("no memory for a kernel's working space")
    return packed


def largest_products(
    states_TK: Tensor,
    weight_VK: Tensor,
    offsets_B1: Tensor,
    *,
    winners: bool,
    half: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns each text's largest product with each row of the weight ``(B, V)``, and with ``winners`` its token (int32).

    The first of equal ones wins. A text without tokens has minus infinity, and token 0. ``half``: of both rounded to bfloat16,
    summed in float32. ``packed``: the weight's :func:`packed_vocabulary`, without which it is packed on the way.
    """
    states_TK, weight_VK = states_TK.float(), weight_VK.float() if packed is None else weight_VK
    shape = len(offsets_B1) - 1, len(weight_VK)
    best_BV = torch.empty(shape)
    winner_BV = torch.empty(shape, dtype=torch.int32) if winners else None
    sizes = (*shape, states_TK.shape[1])
    pointers = [_pointer(t) for t in (states_TK, weight_VK, offsets_B1)]
    results = [_pointer(best_BV), _pointer(winner_BV)]
    found = library()
    assert found is not None, "ask serves() first"
    results += [int(half), _pointer(packed), torch.get_num_threads()]
    if found.oe_largest_products(*pointers, *map(c_int64, sizes), *results):
        raise MemoryError("no memory for a kernel's working space")
    return best_BV, winner_BV


def largest_products_backward(
    grad_BV: Tensor, winner_BV: Tensor, inputs: tuple[Tensor, Tensor, Tensor], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of states and weight, those that are wanted, float32; ``inputs``: states, weight and offsets."""
    states_TK, weight_VK = inputs[0].float(), inputs[1].float()
    given = zip((states_TK, weight_VK), wanted, strict=True)
    for_states, for_weight = (torch.zeros_like(x) if want else None for x, want in given)
    grad_BV = grad_BV.contiguous()
    pointers = [_pointer(t) for t in (grad_BV, winner_BV, states_TK, weight_VK, inputs[2])]
    sizes = (*grad_BV.shape, states_TK.shape[1])
    found = library()
    assert found is not None, "ask serves() first"
    results = [_pointer(for_states), _pointer(for_weight)]
    found.oe_largest_products_backward(*pointers, *map(c_int64, sizes), *results, torch.get_num_threads())
    return for_states, for_weight


def _pointer(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())
