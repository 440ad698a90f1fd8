"""Training images: the sizes that the image processor produces, and drawings at these sizes."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.drawings.architecture import MAX_PIXELS, MERGE, MIN_PIXELS, PATCH
from examples.drawings.network import Grid
from examples.drawings.scenes import Scene, degrade, paint


def _grids() -> list[Grid]:
    sides = range(160, 321, MERGE * PATCH)
    return [
        Grid(height // PATCH, width // PATCH)
        for height in sides
        for width in sides
        if MIN_PIXELS <= height * width <= MAX_PIXELS
        and max(height, width) <= 2 * min(height, width)
    ]


GRIDS = _grids()
"""Every patch grid that the processor makes of images with an aspect ratio up to about 2:1."""


def training_images(
    frames: list[Scene], seed: int, grid: Grid, rng: random.Random
) -> list[NDArray[np.uint8]]:
    """The frames of one drawing as (height, width, 3) arrays of the grid's size.

    Painted at twice the size with an aspect ratio that is a little off, as the processor rounds
    the sides of a user's image to multiples of 32 pixels.
    """
    width, height = grid.size
    stretch = rng.uniform(0.85, 1.18)
    canvas = (round(2 * width * stretch**0.5), round(2 * height / stretch**0.5))
    arrays = []
    for facts in frames:
        image = paint(facts, seed, canvas).resize(grid.size, Image.Resampling.BOX)
        arrays.append(np.asarray(degrade(image, rng)))
    return arrays
