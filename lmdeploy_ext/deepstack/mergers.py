"""DeepStack's mergers: compute features of image tokens from the output of a vision block.

The numbers are those of transformers' ``Qwen3VLVisionPatchMerger`` with ``use_postshuffle_norm``.

Letters: R patches; M image tokens, each of 2×2 patches that are adjacent in memory; D hidden size
of the tower; O hidden size of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6
CHUNK = 2048
"""Number of tokens that are computed at once; limits the memory for intermediate values."""
NAMES = tuple(
    f"{layer}.{kind}"
    for layer in ("norm", "linear_fc1", "linear_fc2")
    for kind in ("weight", "bias")
)


class Merger:
    """One merger: LayerNorm over the values of all 2×2 patches, linear, GELU (erf), linear.

    Args:
        load: returns the tensor of a name in `NAMES`, with the device and dtype of the tower.
        width: 4·D.

    Raises:
        ValueError: a tensor has the wrong shape.
    """

    def __init__(self, load: Callable[[str], Tensor], width: int, out_width: int) -> None:
        shapes = [(width,), (width,), (width, width), (width,), (out_width, width), (out_width,)]
        tensors = []
        for name, shape in zip(NAMES, shapes, strict=True):
            tensor = load(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has {list(tensor.shape)} instead of {list(shape)}")
            tensors.append(tensor)
        self.width = width
        self._norm_weight, self._norm_bias = tensors[:2]
        self._fc1, self._fc1_bias, self._fc2, self._fc2_bias = tensors[2:]

    def __call__(self, patches: Tensor, ranges: Sequence[tuple[int, int]], out: Tensor) -> None:
        """Compute the features of some tokens.

        Args:
            patches: (R, D), merge blocks contiguous.
            ranges: the tokens, as ranges within M = R / 4.
            out: output, (number of these tokens, O), with the dtype of the tower.
        """
        blocks = patches.view(-1, self.width)
        row = 0
        for begin, end in ranges:
            for start in range(begin, end, CHUNK):
                chunk = blocks[start : min(start + CHUNK, end)]
                count = len(chunk)
                hidden = F.layer_norm(
                    chunk, (self.width,), self._norm_weight, self._norm_bias, _EPS
                )
                hidden = F.gelu(F.linear(hidden, self._fc1, self._fc1_bias))
                torch.addmm(self._fc2_bias, hidden, self._fc2.t(), out=out[row : row + count])
                row += count
