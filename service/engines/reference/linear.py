"""Linear layers whose rows do not depend on each other, not even in the last bit.

A request must get the same answer alone and in a batch. Ordinary matrix multiplication picks its
kernel, and with it the order of additions, by the number of rows. On x86 the weight is therefore
laid out once for oneDNN's inner product, which adds along the inputs in the same order for any
number of rows: measured equal bit for bit in float32 and bfloat16. Elsewhere `row_invariant` is
False, and near ties may fall differently in a batch.

Letters: R rows; I inputs; O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKING_ROWS = 16  # a hint for the layout only


def row_invariant(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Linear` computes every row as if it were alone."""
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


class Linear:
    """y = x W^T + b."""

    __slots__ = ("_bias", "_kernel", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight (O, I), bias (O,), both in the type and on the device of the inputs to come."""
        self._bias = bias
        self._weight = weight
        self._kernel = None
        if row_invariant(weight.dtype, weight.device):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKING_ROWS)
            self._kernel = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """x (R, I), contiguous -> (R, O)."""
        if self._kernel is None:
            return F.linear(x, self._weight, self._bias)
        result: Tensor = self._kernel(x, self._weight, self._bias, "none", [], "")
        return result
