"""`pack`: expansion, spans, positions, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy_ext.mrope import mrope_positions
from lmdeploy_ext.packing import PackedImage, pack

PAD = 900


def still(h: int, w: int, values: int = 768) -> PackedImage:
    return PackedImage(np.zeros((h * w, values), np.uint8), (1, h, w))


def test_expands_images_between_text() -> None:
    first, second = still(4, 6), still(2, 2, values=1536)
    request = pack([[1, 2], first, np.array([3]), second, []], PAD)
    assert request.token_ids.tolist() == [1, 2, *[PAD] * 6, 3, PAD]
    assert request.token_ids.dtype == np.int32
    assert request.spans == ((2, 8), (9, 10))
    assert request.images == (first, second)
    positions, delta = mrope_positions(10, [(2, 8), (9, 10)], [(1, 4, 6), (1, 2, 2)])
    np.testing.assert_array_equal(request.position_ids, positions)
    assert request.position_delta == delta


def test_images_without_text_and_an_empty_prompt() -> None:
    request = pack([still(2, 2), still(2, 4)], PAD)
    assert request.spans == ((0, 1), (1, 3))
    empty = pack([], PAD)
    assert empty.token_ids.shape == (0,)
    assert empty.position_ids.shape == (3, 0)
    assert empty.spans == ()
    assert empty.position_delta == 0


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ([1, PAD, 2], "segment 1: text contains the image placeholder id 900"),
        (np.array([PAD]), "placeholder"),
        ([-1], "between 0"),
        ([2**31], "between 0"),
        ([1.5], "integers"),
        ([[1, 2]], "flat"),
        ([True], "integers"),
    ],
)
def test_invalid_text_segments_are_refused(run: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([still(2, 2), run], PAD)  # type: ignore[list-item]


def test_refuses_other_merge_size() -> None:
    image = PackedImage(np.zeros((9, 768), np.uint8), (1, 3, 3), merge_size=3)
    assert image.num_tokens == 1
    with pytest.raises(ValueError, match="merge size 3"):
        pack([image], PAD)
    assert pack([image], PAD, merge_size=3).spans == ((0, 1),)


@pytest.mark.parametrize(
    ("shape", "dtype", "grid"),
    [
        ((24, 768), np.float32, (1, 4, 6)),
        ((23, 768), np.uint8, (1, 4, 6)),
        ((24, 16, 48), np.uint8, (1, 4, 6)),
        ((15, 768), np.uint8, (1, 3, 5)),
        ((48, 768), np.uint8, (2, 4, 6)),
        ((0, 768), np.uint8, (1, 0, 4)),
    ],
)
def test_refuses_patches(shape: tuple, dtype: type, grid: tuple) -> None:
    with pytest.raises(ValueError, match=r"grid|uint8"):
        PackedImage(np.zeros(shape, dtype), grid)
