"""Tables that depend only on the grid of an image: position taps and rotary factors.

Letters: h, w the image's sides in patches; P = h*w patches in merge-block order; S sides of the
learned position grid; d head dimension.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class GridTables(NamedTuple):
    """Tables of one grid on one device.

    Attributes:
        taps: int64 (P, 4), rows of the learned position grid (flattened, S*S).
        weights: float32 (P, 4), their bilinear weights.
        rotary: complex64 (P, d/2), cos + i sin of each pair's angle. The first d/4 pairs rotate
        with the row, the others with the column.
    """

    taps: Tensor
    weights: Tensor
    rotary: Tensor


@lru_cache(maxsize=16)  # about 300 bytes per patch: 20 MB for the largest image, 16 megapixels
def grid_tables(
    h: int, w: int, merge_size: int, side: int, head_dim: int, theta: float, device: torch.device
) -> GridTables:
    """The tables of an (h, w) grid; the tables of recent grids are cached. Do not modify them."""
    with torch.inference_mode(False):
        rows, columns = _merge_order(h, w, merge_size)
        low_rows, high_rows, row_weight = _axis_taps(h, side)
        low_columns, high_columns, column_weight = _axis_taps(w, side)
        row_taps = torch.stack([low_rows, low_rows, high_rows, high_rows], dim=1)[rows]
        column_taps = torch.stack([low_columns, high_columns, low_columns, high_columns], dim=1)[
            columns
        ]
        up, left = row_weight[rows], column_weight[columns]
        weights = torch.stack(
            [(1 - up) * (1 - left), (1 - up) * left, up * (1 - left), up * left], dim=1
        )
        frequency = theta ** -(
            torch.arange(0, head_dim // 2, 2, dtype=torch.float32) * 2 / head_dim
        )
        angles = torch.cat(
            [rows[:, None].float() * frequency, columns[:, None].float() * frequency], dim=1
        )
        rotary = torch.complex(angles.cos(), angles.sin())
        taps = row_taps * side + column_taps
        return GridTables(taps.to(device), weights.to(device), rotary.to(device))


def _merge_order(h: int, w: int, merge_size: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the patches in merge-block order, int64 (P,) each."""
    blocks = (h // merge_size, merge_size, w // merge_size, merge_size)
    index = torch.arange(h * w).reshape(blocks).transpose(1, 2).flatten()
    return index // w, index % w


def _axis_taps(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower tap, upper tap and weight of the upper one, for ``size`` points over ``side`` entries.

    The corners are aligned: the first and last point coincide with the first and last entry.
    """
    source = torch.arange(size, dtype=torch.float32) * (side - 1) / max(size - 1, 1)
    low = source.floor().long()
    return low, (low + 1).clamp(max=side - 1), source - low
