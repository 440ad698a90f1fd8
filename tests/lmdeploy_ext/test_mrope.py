"""mRoPE positions against transformers' ``get_rope_index``."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from lmdeploy_ext.mrope import mrope_positions

IMAGE, VIDEO = 1, 2  # transformers' token types


def oracle_model() -> Qwen3VLModel:
    config = Qwen3VLConfig(
        text_config={"num_hidden_layers": 0, "hidden_size": 16, "vocab_size": 16},
        vision_config={"depth": 0, "hidden_size": 16, "deepstack_visual_indexes": []},
    )
    with torch.device("meta"):
        return Qwen3VLModel(config)


MODEL = oracle_model()


def oracle(types: list[int], grids: list[tuple[int, int, int]]) -> tuple[np.ndarray, int]:
    """Positions (3, T) and delta from transformers; ``types`` has one entry per token."""
    images = [grid for kind, grid in _runs(types, grids) if kind == IMAGE]
    frames = [grid for kind, grid in _runs(types, grids) if kind == VIDEO]
    positions, delta = MODEL.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor([types], dtype=torch.int),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(frames) if frames else None,
    )
    return positions[:, 0].numpy(), int(delta)


def _runs(types: list[int], grids: list[tuple[int, int, int]]) -> list[tuple[int, tuple]]:
    kinds = [k for k, before in zip(types, [0, *types], strict=False) if k and k != before]
    return list(zip(kinds, grids, strict=True))


# A prompt: text of some length, then several times (sides of an image, text behind it).
# transformers finds images as runs of one token type: two of a kind need a text token between.
SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))
PROMPTS = st.tuples(
    st.integers(0, 12),
    st.lists(st.tuples(SIDES, st.sampled_from([IMAGE, VIDEO]), st.integers(0, 12)), max_size=6),
)


@settings(max_examples=300, deadline=None)
@given(PROMPTS)
def test_equals_transformers(prompt: tuple) -> None:
    before, pieces = prompt
    types, spans, grids = [0] * before, [], []
    for index, ((rows, columns), kind, behind) in enumerate(pieces):
        spans.append((len(types), len(types) + rows * columns))
        grids.append((1, 2 * rows, 2 * columns))
        types += [kind] * (rows * columns)
        same_next = index + 1 < len(pieces) and pieces[index + 1][1] == kind
        types += [0] * (max(behind, 1) if same_next else behind)
    if not types:
        return
    positions, delta = mrope_positions(len(types), spans, np.array(grids).reshape(-1, 3))
    expected, expected_delta = oracle(types, grids)
    assert positions.dtype == np.int32
    assert positions.shape == (3, len(types))
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
def test_refuses(length: int, spans: list, grids: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mrope_positions(length, spans, grids)


def test_importing_stays_light() -> None:
    code = (
        "import sys, lmdeploy_ext, lmdeploy_ext.mrope, lmdeploy_ext.packing, lmdeploy_ext.encoder;"
        "sys.exit(', '.join({'torch', 'timm', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
