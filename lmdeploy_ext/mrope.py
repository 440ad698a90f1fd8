"""Multimodal rotary positions (mRoPE) of Qwen3-VL, in plain numpy.

Every token has three positions: temporal, height and width. Text tokens increment all three. For an
image of merged grid (rows, columns) that begins at position ``base``, the temporal position is
``base`` for all tokens, the height position is ``base + row`` and the width position is ``base +
column``; the next text continues at ``base + max(rows, columns)``. The numbers equal those of
transformers' ``Qwen3VLModel.get_rope_index``; the method is from the Qwen2-VL paper (arXiv
2409.12191, 2.1).

Letters: T tokens of the prompt, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def mrope_positions(
    length: int,
    spans: Sequence[tuple[int, int]],
    grids: npt.ArrayLike,
    merge_size: int = 2,
) -> tuple[npt.NDArray[np.int32], int]:
    """Position ids of one prompt.

    Args:
        length: number of tokens T, image placeholders included.
        spans: for each image, the half-open range ``[begin, end)`` of its placeholder tokens,
            in the order of the prompt.
        grids: integers (N, 3): each image's (t, h, w) in patches before merging. A video has one
            span and one grid with t = 1 for each of its frame groups.
        merge_size: patches per side that are merged into one token.

    Returns:
        Positions (3, T) int32 in the order temporal, height, width; and the delta: highest position
        + 1 - T. The token generated at index i of the sequence has position ``i + delta`` in all
        three streams.

    Raises:
        ValueError: spans and grids do not match each other or the prompt; the message names the
        image.
    """
    rows_columns = merged_grids(length, spans, grids, merge_size)
    positions = np.empty((3, length), dtype=np.int32)
    count = np.arange(length, dtype=np.int32)
    temporal, height, width = positions
    base = cursor = 0
    for (begin, end), (rows, columns) in zip(spans, rows_columns, strict=True):
        if begin > cursor:
            positions[:, cursor:begin] = count[base : base + begin - cursor]
            base += begin - cursor
        temporal[begin:end] = base
        height[begin:end].reshape(rows, columns)[:] = count[base : base + rows, None]
        width[begin:end].reshape(rows, columns)[:] = count[base : base + columns]
        base += max(rows, columns)
        cursor = end
    positions[:, cursor:] = count[base : base + length - cursor]
    return positions, base - cursor


def merged_grids(
    length: int, spans: Sequence[tuple[int, int]], grids: npt.ArrayLike, merge_size: int = 2
) -> list[tuple[int, int]]:
    """Merged (rows, columns) of each image.

    Takes the arguments of `mrope_positions`. Raises ValueError if they do not match each other.
    """
    if length < 0 or merge_size < 1:
        raise ValueError(f"length {length} must be >= 0 and merge_size {merge_size} >= 1")
    rows_columns = []
    cursor = 0
    entries = _grid_entries(grids)
    if len(entries) != len(spans):
        raise ValueError(f"{len(spans)} spans but {len(entries)} grids")
    for index, ((begin, end), (t, h, w)) in enumerate(zip(spans, entries, strict=True)):
        if t != 1:
            raise ValueError(
                f"image {index}: grid {(t, h, w)} has t = {t}; give each frame a span and grid"
            )
        if h < 1 or w < 1 or h % merge_size or w % merge_size:
            raise ValueError(
                f"image {index}: grid {(t, h, w)} needs sides in positive multiples of {merge_size}"
            )
        if not cursor <= begin < end <= length:
            raise ValueError(
                f"image {index}: span [{begin}, {end}) is not inside [{cursor}, {length}); "
                "spans must be sorted, disjoint and within the prompt"
            )
        rows, columns = h // merge_size, w // merge_size
        if end - begin != rows * columns:
            raise ValueError(
                f"image {index}: span [{begin}, {end}) has {end - begin} tokens, "
                f"grid {(t, h, w)} needs {rows * columns}"
            )
        rows_columns.append((rows, columns))
        cursor = end
    return rows_columns


def _grid_entries(grids: npt.ArrayLike) -> list[list[int]]:
    array = np.asarray(grids)
    if array.size == 0:
        return []
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu":
        raise ValueError(f"grids must be integers (N, 3), got {array.dtype} {array.shape}")
    entries: list[Any] = array.tolist()
    return entries
