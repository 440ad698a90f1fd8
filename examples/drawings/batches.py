"""Training batches as pure functions of their number, so that a resumed run sees the same data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from examples.drawings.analysis import analysis, dumps
from examples.drawings.arrangements import SHARE, Arrangement, arrange
from examples.drawings.conversations import SYSTEM_TEXTS, Prefix, Sequences, sequences
from examples.drawings.images import GRIDS, training_images
from examples.drawings.network import Grid
from examples.drawings.probes import place_targets, targets
from examples.drawings.questions import BY_NAME, QUESTIONS, ask
from examples.drawings.scenes import HELD_OUT_SEED, MAX_OBJECTS, POSITIONS, keyframes, scene
from service.tasks.image_analysis import PROMPT

# kind of batch -> (drawings, questions about each): about five thousand tokens
SHAPES = {"short": (16, 3), "analysis": (16, 1), "pair": (8, 2)}
BATCHES_PER_ROUND = 4
SHORT = [question for question in QUESTIONS if question.images == 1]
HARDER = {"count_color": 4, "count_shape": 6, "position": 5, "present": 6, "object_at": 3}
SHORT_WEIGHTS = [HARDER.get(question.name, 1) for question in SHORT]


@dataclass(frozen=True)
class Drawing:
    """One image, or two that are shown together, with the questions about it."""

    texts: list[tuple[str, str]]
    """Questions and answers; the answers are those of the arranged images."""
    pixels: list[np.ndarray[Any, Any]]
    labels: list[tuple[Tensor, Tensor]]
    """For each image the probe targets of the vision tower."""
    arrangement: Arrangement
    places: list[Tensor]
    """For each image the probe targets of the decoder."""

    @property
    def longest(self) -> int:
        return max(len(question) + len(answer) for question, answer in self.texts)


@dataclass
class VisionBatch:
    """Images of one size and what the probes should find in them."""

    grid: Grid
    pixels: Tensor
    """(B, height, width, 3) uint8"""
    per_token: Tensor
    """(B, attributes, T)"""
    image: Tensor
    """(B, 2)"""


@dataclass
class JointBatch:
    """Drawings with questions and answers; each drawing's questions are neighbours."""

    kind: str
    images: VisionBatch
    source: Tensor
    """(images, T): the token whose features each image token gets, see `arrangements`."""
    places: Tensor
    """(images, 3, T): see `place_targets`."""
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
        facts = scene(drawing, len(POSITIONS))  # crowded images: more to learn from each
        pixels += training_images([facts], drawing, grid, rng)
        labels.append(targets(facts, grid))
    return _stack(grid, pixels, labels)


def _stack(
    grid: Grid, pixels: list[np.ndarray[Any, Any]], labels: list[tuple[Tensor, Tensor]]
) -> VisionBatch:
    return VisionBatch(
        grid,
        torch.from_numpy(np.stack(pixels)),
        torch.stack([per_token for per_token, _ in labels]),
        torch.stack([image for _, image in labels]),
    )


def kind_of(rng: random.Random, progress: float) -> str:
    """Short questions first; then the long prompt, then two images."""
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
    share: float = SHARE,
    easy_first: bool = True,
) -> list[JointBatch]:
    """Round `number` of `rounds` of the joint phase: batches of one kind, sorted by length.

    `kind` fixes the kind; drawings have seeds from `first_seed` to `first_seed` + 2**50; `share` of
    them is arranged anew. All ranks get the same kinds and sizes of images, so that they take
    about the same time.
    """
    rng = random.Random(f"joint {seed} {number}")
    progress = number / rounds if easy_first else 1.0
    kind = kind or kind_of(rng, progress)
    drawings, questions = SHAPES[kind]
    system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.1 else ""
    prefix = Prefix(rng.choice(GRIDS), 2 if kind == "pair" else 1, system)
    order = rng.sample(range(BATCHES_PER_ROUND), BATCHES_PER_ROUND)
    rng = random.Random(f"joint {seed} {number} {rank}")
    most = 2 if progress < 0.04 else MAX_OBJECTS
    make = _pair if kind == "pair" else partial(_single, kind == "analysis", questions)
    found = [
        make(first_seed + rng.randrange(HELD_OUT_SEED), most, prefix.grid, share, rng)
        for _ in range(drawings * BATCHES_PER_ROUND)
    ]
    found.sort(key=lambda drawing: drawing.longest)
    batches = [
        _joint_batch(kind, found[start : start + drawings], prefix, tokenizer)
        for start in range(0, len(found), drawings)
    ]
    return [batches[place] for place in order]


def _joint_batch(kind: str, drawings: list[Drawing], prefix: Prefix, tokenizer: Any) -> JointBatch:
    texts = [text for drawing in drawings for text in drawing.texts]
    return JointBatch(
        kind,
        _stack(
            prefix.grid,
            [image for drawing in drawings for image in drawing.pixels],
            [label for drawing in drawings for label in drawing.labels],
        ),
        torch.stack([d.arrangement.source for d in drawings for _ in d.pixels]),
        torch.stack([places for drawing in drawings for places in drawing.places]),
        sequences(tokenizer, prefix, [text[0] for text in texts], [text[1] for text in texts]),
        len(drawings[0].texts),
    )


def _single(
    analyse: bool,
    questions: int,
    drawing: int,
    most: int,
    grid: Grid,
    share: float,
    rng: random.Random,
) -> Drawing:
    """One image with the long prompt, or with short questions."""
    shown = scene(drawing, most)
    pixels = training_images([shown], drawing, grid, rng)
    arrangement = arrange(grid, rng, {thing.cell for thing in shown.objects}, share)
    facts = arrangement.scene(shown)
    if analyse:
        texts = [(PROMPT, dumps(analysis(facts)))]
    else:
        chosen = rng.choices(SHORT, SHORT_WEIGHTS, k=questions)
        texts = [(a.prompt, a.answer) for a in (ask(question, facts, rng) for question in chosen)]
    places = place_targets([facts], arrangement)
    return Drawing(texts, pixels, [targets(shown, grid)], arrangement, places)


def _pair(drawing: int, most: int, grid: Grid, share: float, rng: random.Random) -> Drawing:
    """Two keyframes with the long prompt and what moved, or two drawings and their counts."""
    frames = keyframes(drawing, most)
    shown = [frames.first, frames.second]
    move = rng.random() < 0.8
    if move:
        pixels = training_images(shown, drawing, grid, rng)
    else:
        shown[1] = scene(drawing + 1, most)
        pixels = training_images(shown[:1], drawing, grid, rng)
        pixels += training_images(shown[1:], drawing + 1, grid, rng)
    taken = {thing.cell for facts in shown for thing in facts.objects}
    arrangement = arrange(grid, rng, taken, share)
    first, second = (arrangement.scene(facts) for facts in shown)
    if move:
        arranged = arrangement.keyframes(frames)
        moved = ask(BY_NAME["moved"], arranged, rng)
        texts = [(PROMPT, dumps(analysis(arranged))), (moved.prompt, moved.answer)]
    else:
        asked = (ask(BY_NAME["counts"], (first, second), rng) for _ in range(2))
        texts = [(a.prompt, a.answer) for a in asked]
    labels = [targets(facts, grid) for facts in shown]
    places = place_targets([first, second], arrangement)
    return Drawing(texts, pixels, labels, arrangement, places)


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
