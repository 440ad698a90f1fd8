"""Training batches as pure functions of their number, so that a resumed run sees the same data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .network import Grid
from .pictures import GRIDS, training_pictures
from .probes import targets
from .scenes import HELD_OUT_SEED, scene


@dataclass
class VisionBatch:
    """Pictures of one size and what the probes should find in them."""

    grid: Grid
    pixels: Tensor
    """(B, height, width, 3) uint8"""
    per_token: Tensor
    """(B, attributes, T)"""
    picture: Tensor
    """(B, 2)"""


def vision_batch(number: int, size: int, seed: int) -> VisionBatch:
    """Batch `number` of the vision phase: `size` drawings."""
    rng = random.Random(f"vision {seed} {number}")
    grid = rng.choice(GRIDS)
    pixels, labels = [], []
    for _ in range(size):
        drawing = rng.randrange(HELD_OUT_SEED)
        facts = scene(drawing)
        pixels += training_pictures([facts], drawing, grid, rng)
        labels.append(targets(facts, grid))
    return VisionBatch(
        grid,
        torch.from_numpy(np.stack(pixels)),
        torch.stack([per_token for per_token, _ in labels]),
        torch.stack([picture for _, picture in labels]),
    )


class _Numbered(IterableDataset[Any]):
    def __init__(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __iter__(self) -> Iterator[Any]:
        return (self.make(number) for number in range(self.start, self.stop))


def prefetch(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    """Batches `start` to `stop`, made ahead in one other process."""
    loader = DataLoader(
        _Numbered(make, start, stop), batch_size=None, num_workers=1, prefetch_factor=12
    )
    return iter(loader)
