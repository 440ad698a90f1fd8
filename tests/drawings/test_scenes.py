"""Drawings are pure functions of their seed, and the image shows what the facts say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.drawings.architecture import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH
from examples.drawings.images import GRIDS, training_images
from examples.drawings.scenes import (
    COLORS,
    HELD_OUT_SEED,
    LIGHTING,
    POSITIONS,
    RADII,
    SCENES,
    SHAPES,
    SIZES,
    Scene,
    draw,
    keyframes,
    scene,
)
from lmdeploy_ext.encoder.sizes import smart_resize

SEEDS = st.integers(0, 2 * HELD_OUT_SEED)
AREA = {
    "circle": math.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.15**2,
    "star": 10 * 0.5 * 1.12 * 0.45 * math.sin(math.pi / 5),
    "cross": 2 * 2 * 2 * 0.34 - (2 * 0.34) ** 2,
}
"""Of a shape of radius 1."""


def shares(pixels: np.ndarray) -> dict[str, float]:
    """Share of the pixels (height, width, 3) that have the shade of each colour."""
    return {
        name: float((np.abs(pixels.astype(int) - color) <= 13).all(-1).mean())
        for name, color in COLORS.items()
    }


def cell(pixels: np.ndarray, index: int) -> np.ndarray:
    """The pixels of one of the nine cells."""
    row, column = divmod(index, 3)
    return np.array_split(np.array_split(pixels, 3, 0)[row], 3, 1)[column]


@given(SEEDS, st.integers(1, 9))
def test_the_facts_are_a_function_of_the_seed(seed: int, most: int) -> None:
    facts = scene(seed, most)
    assert facts == scene(seed, most)
    assert facts.place in SCENES
    assert facts.lighting in LIGHTING
    cells = [thing.cell for thing in facts.objects]
    assert 1 <= len(cells) <= most
    assert cells == sorted(set(cells))


@settings(max_examples=15)
@given(SEEDS)
def test_the_image_is_a_function_of_facts_seed_and_size(seed: int) -> None:
    facts = scene(seed)
    state = random.getstate()
    image = draw(facts, seed, (200, 150))
    assert image.size == (200, 150)
    assert image.tobytes() == draw(facts, seed, (200, 150)).tobytes()
    assert random.getstate() == state, "the global generator was used"
    assert image.tobytes() != draw(facts, seed + 1, (200, 150)).tobytes()


@pytest.mark.parametrize("size", [(192, 192), (320, 200), (160, 288)])
@pytest.mark.parametrize("seed", range(12))
def test_colours_are_where_the_facts_say(seed: int, size: tuple[int, int]) -> None:
    facts = scene(HELD_OUT_SEED + seed, len(POSITIONS))
    pixels = np.asarray(draw(facts, HELD_OUT_SEED + seed, size))
    at = {thing.cell: thing.color for thing in facts.objects}
    for index in range(len(POSITIONS)):
        seen = shares(cell(pixels, index))
        found = max(seen, key=seen.__getitem__)
        if index in at:
            assert found == at[index], POSITIONS[index]
            assert seen[found] > 0.03
        else:
            assert seen[found] < 0.03, (POSITIONS[index], found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_have_their_area(shape: str, size: str) -> None:
    thing = scene(1).objects[0].__class__(shape, "orange", size, 4)
    pixels = np.asarray(draw(Scene("sea", "night", (thing,)), 7, (384, 384)))
    low, high = (AREA[shape] * radius**2 for radius in RADII[size])
    # The grey outline takes some of it.
    assert 0.7 * low < shares(pixels)["orange"] < high


@given(SEEDS)
def test_exactly_one_object_moves(seed: int) -> None:
    frames = keyframes(seed)
    assert frames.first == scene(seed)
    before, after = set(frames.first.objects), set(frames.second.objects)
    assert before - after == {frames.moved}
    assert {thing.cell for thing in after - before} == {frames.target}
    assert frames.target not in {thing.cell for thing in before}
    assert (frames.first.place, frames.first.lighting) == (
        frames.second.place,
        frames.second.lighting,
    )


def test_what_does_not_move_looks_the_same() -> None:
    frames = keyframes(5)
    pixels = [np.asarray(draw(f, 5, (192, 192))) for f in (frames.first, frames.second)]
    for index in range(len(POSITIONS)):
        same = np.array_equal(*(cell(array, index) for array in pixels))
        assert same == (index not in (frames.moved.cell, frames.target)), POSITIONS[index]


def test_training_grids_are_what_the_processor_makes() -> None:
    factor = PATCH * MERGE
    for grid in GRIDS:
        width, height = grid.size
        assert smart_resize(height, width, factor, MIN_PIXELS, MAX_PIXELS) == (height, width)


def test_training_images_have_the_size_of_the_grid() -> None:
    frames = keyframes(3)
    for grid in GRIDS[::5]:
        arrays = training_images([frames.first, frames.second], 3, grid, random.Random("fixed"))
        again = training_images([frames.first, frames.second], 3, grid, random.Random("fixed"))
        assert [array.shape for array in arrays] == [(*grid.size[::-1], 3)] * 2
        assert all(np.array_equal(a, b) for a, b in zip(arrays, again, strict=True))
