"""mRoPE positions against transformers' ``get_rope_index``."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings

from lmdeploy_ext.mrope import mrope_positions
from tests.lmdeploy_ext.prompts import Prompt, prompts


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(prompts())
def test_equals_transformers(prompt: Prompt) -> None:
    length = len(prompt.types)
    grids = np.array([piece.grid for piece in prompt.pieces]).reshape(-1, 3)
    positions, delta = mrope_positions(length, prompt.spans, grids)
    expected, expected_delta = prompt.positions()
    assert positions.dtype == np.int32
    assert positions.shape == (3, length)
    np.testing.assert_array_equal(positions, expected)
    assert delta == expected_delta


def test_adjacent_images() -> None:
    """No text between: the second image starts behind the longer side of the first."""
    positions, delta = mrope_positions(8, [(0, 6), (6, 8)], np.array([[1, 4, 6], [1, 2, 4]]))
    np.testing.assert_array_equal(
        positions,
        [[0, 0, 0, 0, 0, 0, 3, 3], [0, 0, 0, 1, 1, 1, 3, 3], [0, 1, 2, 0, 1, 2, 3, 4]],
    )
    assert delta == 5 - 8


def test_no_tokens_and_no_images() -> None:
    positions, delta = mrope_positions(0, [], np.empty((0, 3), dtype=np.int64))
    assert positions.shape == (3, 0)
    assert delta == 0
    positions, delta = mrope_positions(3, [], [])
    np.testing.assert_array_equal(positions, [[0, 1, 2]] * 3)
    assert delta == 0


def test_other_merge_size() -> None:
    positions, delta = mrope_positions(7, [(1, 5)], [(1, 6, 6)], merge_size=3)
    np.testing.assert_array_equal(positions[1], [0, 1, 1, 2, 2, 3, 4])
    assert delta == -2


@pytest.mark.parametrize(
    ("length", "spans", "grids", "message"),
    [
        (10, [(0, 4)], [], "1 spans but 0 grids"),
        (10, [(0, 4), (3, 7)], [(1, 4, 4)] * 2, "image 1: span"),
        (10, [(5, 9), (0, 4)], [(1, 4, 4)] * 2, "image 1: span"),
        (10, [(8, 12)], [(1, 4, 4)], "image 0: span"),
        (10, [(-1, 3)], [(1, 4, 4)], "image 0: span"),
        (10, [(0, 3)], [(1, 4, 4)], "has 3 tokens, grid .* needs 4"),
        (10, [(0, 4)], [(1, 4, 5)], "multiples of 2"),
        (10, [(0, 0)], [(1, 0, 4)], "positive"),
        (10, [(0, 8)], [(2, 4, 4)], "t = 2"),
        (10, [(0, 4)], [(1.0, 4.0, 4.0)], "integers"),
        (10, [(0, 4)], [(4, 4)], "integers"),
        (-1, [], [], "length"),
    ],
)
def test_invalid_spans_and_grids_are_refused(
    length: int, spans: list, grids: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(length, spans, grids)


def test_importing_stays_light() -> None:
    code = (
        "import sys, lmdeploy_ext, lmdeploy_ext.mrope, lmdeploy_ext.packing, lmdeploy_ext.encoder;"
        "sys.exit(', '.join({'torch', 'timm', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
