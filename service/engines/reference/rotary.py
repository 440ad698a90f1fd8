"""Rotary tables for interleaved mRoPE.

Letters: P positions; F = head_dim / 2 frequencies; R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """Unit complex numbers by position and frequency, from float32 angles as in transformers.

    Frequency j uses the height if j mod 3 is 1 and the width if it is 2, within the length of their
    sections; all other frequencies use the time.
    """

    def __init__(
        self,
        theta: float,
        section: tuple[int, int, int],
        positions: int,
        device: torch.device,
    ) -> None:
        frequencies = sum(section)
        steps = torch.arange(0, 2 * frequencies, 2, dtype=torch.float32) / (2 * frequencies)
        angles = torch.arange(positions, dtype=torch.float32)[:, None] / theta**steps
        self._table = torch.polar(torch.ones_like(angles), angles).to(device)  # (P, F)
        stream = torch.zeros(frequencies, dtype=torch.int64)
        for axis in (1, 2):
            stream[axis : 3 * section[axis] : 3] = axis
        self._stream = stream
        self._frequency = torch.arange(frequencies, device=device)

    def for_prompt(self, positions: Tensor) -> Tensor:
        """positions (3, R) int64 on the CPU -> complex64 (R, 1, F)."""
        by_frequency = positions[self._stream].T.to(self._table.device)  # (R, F)
        return self._table[by_frequency, self._frequency][:, None]

    def for_text(self, positions: Tensor) -> Tensor:
        """positions (R,) int64, the same in all three streams -> complex64 (R, 1, F)."""
        return self._table[positions][:, None]


def to_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key weight (or bias, or norm) into rotary pairs.

    In the checkpoint, values j and j + d/2 of a head form a pair. This function makes the pair
    adjacent, so that a rotation is one complex product. Queries and keys have the same order, so
    their dot product does not change.
    """
    half = rows.shape[0] // heads // 2
    split = rows.view(heads, 2, half, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)
