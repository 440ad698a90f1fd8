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

from examples.drawings.analysis import analysis, dumps
from examples.drawings.conversations import SYSTEM_TEXTS, Prefix, Sequences, sequences
from examples.drawings.network import Grid
from examples.drawings.pictures import GRIDS, training_pictures
from examples.drawings.probes import targets
from examples.drawings.questions import BY_NAME, QUESTIONS, ask
from examples.drawings.scenes import HELD_OUT_SEED, MAX_OBJECTS, POSITIONS, Scene, keyframes, scene
from service.tasks.image_analysis import PROMPT

# kind of batch -> (drawings, questions about each): about five thousand tokens
SHAPES = {"short": (16, 3), "analysis": (16, 1), "pair": (8, 2)}
BATCHES_PER_ROUND = 4
SHORT = [question for question in QUESTIONS if question.pictures == 1]
HARDER = {"count_color": 4, "count_shape": 6, "position": 5, "present": 6, "object_at": 3}
SHORT_WEIGHTS = [HARDER.get(question.name, 1) for question in SHORT]

Row = tuple[str, str, list[np.ndarray[Any, Any]], list[tuple[Tensor, Tensor]]]
"""Question, answer, pictures, probe targets."""


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


@dataclass
class JointBatch:
    """Drawings with questions and answers; each drawing's questions are neighbours."""

    kind: str
    pictures: VisionBatch
    sequences: Sequences
    questions: int
    """Questions per drawing."""


def vision_batch(number: int, size: int, seed: int, rank: int = 0) -> VisionBatch:
    """Batch `number` of the vision phase: `size` drawings; all ranks draw at the same size."""
    grid = random.Random(f"vision {seed} {number}").choice(GRIDS)
    rng = random.Random(f"vision {seed} {number} {rank}")
    pixels, labels = [], []
    for _ in range(size):
        drawing = rng.randrange(HELD_OUT_SEED)
        facts = scene(drawing, len(POSITIONS))  # crowded pictures: more to learn from each
        pixels += training_pictures([facts], drawing, grid, rng)
        labels.append(targets(facts, grid))
    return _stack(grid, pixels, labels)


def _stack(
    grid: Grid, pixels: list[np.ndarray[Any, Any]], labels: list[tuple[Tensor, Tensor]]
) -> VisionBatch:
    return VisionBatch(
        grid,
        torch.from_numpy(np.stack(pixels)),
        torch.stack([per_token for per_token, _ in labels]),
        torch.stack([picture for _, picture in labels]),
    )


def kind_of(rng: random.Random, progress: float) -> str:
    """Short questions first; then the long prompt, then two pictures."""
    shares = {"short": 0.85, "analysis": 0.15, "pair": 0.0}
    if progress > 0.12:
        shares = {"short": 0.6, "analysis": 0.3, "pair": 0.1}
    if progress > 0.35:
        shares = {"short": 0.5, "analysis": 0.2, "pair": 0.3}
    return rng.choices(list(shares), list(shares.values()))[0]


def joint_round(
    number: int,
    rounds: int,
    seed: int,
    tokenizer: Any,
    kind: str = "",
    first_seed: int = 0,
    rank: int = 0,
) -> list[JointBatch]:
    """Round `number` of `rounds` of the joint phase: batches of one kind, sorted by length.

    `kind` fixes the kind; drawings have seeds from `first_seed` to `first_seed` + 2**50. All ranks
    get the same kinds and sizes of pictures, so that they take about the same time.
    """
    rng = random.Random(f"joint {seed} {number}")
    progress = number / rounds
    kind = kind or kind_of(rng, progress)
    drawings, questions = SHAPES[kind]
    system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.1 else ""
    prefix = Prefix(rng.choice(GRIDS), 2 if kind == "pair" else 1, system)
    order = rng.sample(range(BATCHES_PER_ROUND), BATCHES_PER_ROUND)
    rng = random.Random(f"joint {seed} {number} {rank}")
    most = 2 if progress < 0.04 else MAX_OBJECTS
    groups = [
        _rows(kind, first_seed + rng.randrange(HELD_OUT_SEED), most, prefix.grid, questions, rng)
        for _ in range(drawings * BATCHES_PER_ROUND)
    ]
    groups.sort(key=lambda rows: max(len(row[0]) + len(row[1]) for row in rows))
    batches = [
        _joint_batch(kind, groups[start : start + drawings], prefix, tokenizer)
        for start in range(0, len(groups), drawings)
    ]
    return [batches[place] for place in order]


def _joint_batch(kind: str, groups: list[list[Row]], prefix: Prefix, tokenizer: Any) -> JointBatch:
    rows = [row for group in groups for row in group]
    pixels = [picture for group in groups for picture in group[0][2]]
    labels = [label for group in groups for label in group[0][3]]
    asked = sequences(tokenizer, prefix, [row[0] for row in rows], [row[1] for row in rows])
    return JointBatch(kind, _stack(prefix.grid, pixels, labels), asked, len(groups[0]))


def _rows(
    kind: str, drawing: int, most: int, grid: Grid, questions: int, rng: random.Random
) -> list[Row]:
    """One drawing (a pair of pictures for the kind "pair") with its questions."""
    if kind == "pair":
        return _pair_rows(drawing, most, grid, rng)
    facts = scene(drawing, most)
    pixels = training_pictures([facts], drawing, grid, rng)
    labels = [targets(facts, grid)]
    if kind == "analysis":
        return [(PROMPT, dumps(analysis(facts)), pixels, labels)]
    asked = [
        ask(question, facts, rng) for question in rng.choices(SHORT, SHORT_WEIGHTS, k=questions)
    ]
    return [(a.prompt, a.answer, pixels, labels) for a in asked]


def _pair_rows(drawing: int, most: int, grid: Grid, rng: random.Random) -> list[Row]:
    """Two keyframes with the long prompt and what moved, or two drawings and their counts."""
    frames = keyframes(drawing, most)
    if rng.random() < 0.8:
        pixels = training_pictures([frames.first, frames.second], drawing, grid, rng)
        labels = [targets(facts, grid) for facts in (frames.first, frames.second)]
        moved = ask(BY_NAME["moved"], frames, rng)
        texts = [(PROMPT, dumps(analysis(frames))), (moved.prompt, moved.answer)]
    else:
        both: tuple[Scene, Scene] = (frames.first, scene(drawing + 1, most))
        pixels = training_pictures([both[0]], drawing, grid, rng)
        pixels += training_pictures([both[1]], drawing + 1, grid, rng)
        labels = [targets(facts, grid) for facts in both]
        texts = [(a.prompt, a.answer) for a in (ask(BY_NAME["counts"], both, rng),) * 2]
    return [(prompt, answer, pixels, labels) for prompt, answer in texts]


class _Numbered(IterableDataset[Any]):
    def __init__(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __iter__(self) -> Iterator[Any]:
        return (self.make(number) for number in range(self.start, self.stop))


def prefetch(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    """What `make` gives for `start` to `stop`, made ahead in one other process."""
    loader = DataLoader(
        _Numbered(make, start, stop), batch_size=None, num_workers=1, prefetch_factor=8
    )
    return iter(loader)
