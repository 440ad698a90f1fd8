"""Image features put in other places, so that nothing but order and mRoPE says where things are.

The nine cells of an image change places: the three columns among themselves, the three rows among
themselves, in all feature streams alike. The right answer is that of the scene with its objects in
the new cells. What features say about their own place in the image is then worth nothing, and the
decoder has to learn to read places from the positions of tokens.

Objects are marked at the central token of their cell (`cell_tokens`), so that features one token
late would hardly ever leave their cell. In a "late" arrangement they are one token late and count
as being in the next cell: an offset by one token becomes an offset by one cell.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from examples.drawings.network import Grid
from examples.drawings.scenes import POSITIONS, Keyframes, Scene

CELLS = len(POSITIONS)
SHARE = 0.8
"""Share of drawings whose cells change places."""
LATE = 0.2
"""Share of drawings whose features are one token late, where the last cell is free."""


@dataclass(frozen=True)
class Arrangement:
    """Where the merged tokens of an image go."""

    source: Tensor
    """(T,): the token of the image whose features each token gets."""
    cells: tuple[int, ...]
    """Cell of the image -> cell in which its object counts as being."""
    marks: tuple[int, ...]
    """Cell -> token at which an object in it is marked."""

    def scene(self, facts: Scene) -> Scene:
        """The scene with its objects in their new cells."""
        things = [replace(thing, cell=self.cells[thing.cell]) for thing in facts.objects]
        return replace(facts, objects=tuple(sorted(things, key=lambda thing: thing.cell)))

    def keyframes(self, frames: Keyframes) -> Keyframes:
        return Keyframes(
            self.scene(frames.first),
            self.scene(frames.second),
            replace(frames.moved, cell=self.cells[frames.moved.cell]),
            self.cells[frames.target],
        )


def central(tokens: int) -> tuple[int, int, int]:
    """The central token of each third of a side of 5 or more merged tokens."""
    first, second, third = (int((index + 0.5) * tokens / 3) for index in range(3))
    return first, second, third


def cell_tokens(grid: Grid) -> list[int]:
    """The merged token at the centre of each of the nine cells."""
    rows, columns = grid.rows // 2, grid.columns // 2
    return [row * columns + column for row in central(rows) for column in central(columns)]


def arrange(grid: Grid, rng: random.Random, taken: set[int], share: float = SHARE) -> Arrangement:
    """A random arrangement for images with objects in the cells `taken`; share 0: all in place.

    A late one would push an object of the last cell over the edge, hence `taken`.
    """
    rows, columns = [0, 1, 2], [0, 1, 2]
    if rng.random() < share:
        rng.shuffle(rows)
        rng.shuffle(columns)
    source = _source(grid, rows, columns)
    cells = [3 * rows.index(cell // 3) + columns.index(cell % 3) for cell in range(CELLS)]
    marks = cell_tokens(grid)
    late = rng.random() < LATE and share > 0
    if late and all(cells[cell] < CELLS - 1 for cell in taken):
        source = source.roll(1)
        cells = [(cell + 1) % CELLS for cell in cells]
        marks = [(marks[cell - 1] + 1) % grid.tokens for cell in range(CELLS)]
    return Arrangement(source, tuple(cells), tuple(marks))


def _source(grid: Grid, rows: list[int], columns: list[int]) -> Tensor:
    """(T,) for thirds of the image that come from the thirds `rows` and `columns` of it."""
    down = _side(grid.rows // 2, rows)
    across = _side(grid.columns // 2, columns)
    return (torch.tensor(down)[:, None] * len(across) + torch.tensor(across)).flatten()


def _side(tokens: int, thirds: list[int]) -> list[int]:
    """For each token of a side the one that it comes from.

    Central tokens come from central tokens and the others from as far away from one. Where that
    would be outside, from the other side of it: never a second copy of a central token.
    """
    centers, found = central(tokens), []
    for token in range(tokens):
        third = token * 3 // tokens
        offset = token - centers[third]
        center = centers[thirds[third]]
        inside = 0 <= center + offset < tokens
        found.append(center + offset if inside else center - offset)
    return found
