"""Linear layers that compute each row independently of the other rows, bit for bit.

A request must get the same answer alone and in a batch. Ordinary matrix multiplication selects its
kernel, and thus the order of additions, by the number of rows. On x86 the weight is therefore
stored in the layout of oneDNN's inner product, which adds the inputs in the same order for any
number of rows: measured to be equal bit for bit in float32 and bfloat16. On other processors
`row_invariant` is False, and nearly equal scores may be resolved differently in a batch.

oneDNN generates code for every new number of rows, which takes milliseconds. Rows are therefore
padded to a few sizes, see `padded`.

Letters: R rows; I inputs; O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKING_ROWS = 16  # number of rows, a hint for the layout only


def row_invariant(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `Linear` computes every row independently of the others."""
    if device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def padded(rows: int) -> int:
    """The padded number of rows: 1, or a multiple of 4; of 16 above 32; of 64 above 256."""
    if rows == 1:
        return 1
    unit = 4 if rows <= 32 else 16 if rows <= 256 else 64
    return -(-rows // unit) * unit


class Linear:
    """y = x W^T + b."""

    __slots__ = ("_adding_kernel", "_bias", "_kernel", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight (O, I), bias (O,), both with the dtype and device of later inputs."""
        self._bias = bias
        self._weight = weight
        self._kernel = self._adding_kernel = None
        if row_invariant(weight.dtype, weight.device):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKING_ROWS)
            self._kernel = torch.ops.mkldnn._linear_pointwise.default
            # In bfloat16 the fused sum depends on the number of rows.
            if weight.dtype is torch.float32:
                self._adding_kernel = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        """x (R, I), contiguous -> (R, O)."""
        if self._kernel is None:
            return F.linear(x, self._weight, self._bias)
        rows = x.shape[0]
        size = padded(rows)
        if rows != size:
            x = F.pad(x, (0, 0, 0, size - rows))
        result: Tensor = self._kernel(x, self._weight, self._bias, "none", [], "")
        return result if rows == size else result[:rows]

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (R, I), residual (R, O), both contiguous -> residual + y (R, O), a new tensor."""
        if self._adding_kernel is None or x.shape[0] != padded(x.shape[0]):
            return residual + self(x)
        result: Tensor = self._adding_kernel(x, residual, self._weight, self._bias, "add")
        return result


class Norm:
    """RMS norm over the last axis: x / sqrt(mean(x^2) + eps) * weight.

    Letters: N size of the last axis.
    """

    __slots__ = ("_eps", "_share", "_weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        """weight (..., N), with the dtype and device of later inputs."""
        self._weight = weight
        self._share = 1 / weight.shape[-1]
        self._eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x (R, ..., N) -> the same shape and type, a new tensor."""
        # Five small kernels. On a CPU F.rms_norm runs a dozen and takes three times as long for few
        # rows.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, length, length, value=self._share).rsqrt_()
        result = (x * scale).to(x.dtype)
        result *= self._weight
        return result
