"""One linear layer with 8-bit products, for models whose layers :mod:`openembed.backbones.fused` does not run whole.

Shapes: ``T`` tokens, ``K`` inputs, ``N`` outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openembed.kernels.calls import PackedLinear, quantize, weight_codes
from openembed.kernels.library import library


class Int8Weights:
    """A weight in 8 bits (one scale an output); what it is multiplied with is quantised row by row, as it comes.

    By our kernels where they run, else by torch's product of signed bytes, with one scale and no zero point a row.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.outputs = len(weight_NK)
        self._packed = PackedLinear(weight_NK, bias_N, int8=True) if library() is not None else None
        if self._packed is None:
            codes_NK, self._scale_N = weight_codes(weight_NK.detach().float())
            self._codes_KN = codes_NK.t()
            self._bias_N = None if bias_N is None else bias_N.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        """Returns ``x Wᵀ + b`` for ``x`` of shape ``(…, K)``, in its precision."""
        rows_TK = x.reshape(-1, x.shape[-1]).float().contiguous()
        if self._packed is not None:
            out_TN = self._packed.store(quantize(rows_TK))[:, : self.outputs]
        else:
            out_TN = self._by_torch(rows_TK)
        return out_TN.reshape(*x.shape[:-1], self.outputs).to(x.dtype)

    def _by_torch(self, rows_TK: Tensor) -> Tensor:
        scale_T1 = rows_TK.abs().amax(1, keepdim=True).clamp_min_(1e-12) / 127
        out_TN = torch._int_mm((rows_TK / scale_T1).round_().to(torch.int8), self._codes_KN).float()
        out_TN = out_TN.mul_(scale_T1).mul_(self._scale_N)
        return out_TN if self._bias_N is None else out_TN.add_(self._bias_N)
