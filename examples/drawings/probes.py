"""Throw-away linear heads: what the features of the vision tower say, and what the decoder reads.

Each feature stream of the vision tower gets attributes of its own: scene and lighting in the merged
features; colour, size and shape in the three DeepStack features. So an engine that drops, swaps or
delays a DeepStack feature answers visibly wrong.

Where objects are, their order and what changed between two images are for the decoder to find out
from the positions of tokens. Heads on its image tokens, half-way up, teach it that sooner.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.drawings.arrangements import CELLS, Arrangement, cell_tokens
from examples.drawings.network import Grid
from examples.drawings.scenes import COLORS, LIGHTING, SCENES, SHAPES, SIZES, Scene

# attribute -> (feature stream, classes); class 0 of a per-token attribute means "no object here"
TOKEN_PROBES = {
    "color": (1, 1 + len(COLORS)),
    "size": (2, 1 + len(SIZES)),
    "shape": (3, 1 + len(SHAPES)),
}
IMAGE_PROBES = {"scene": len(SCENES), "lighting": len(LIGHTING)}
PLACE_PROBES = {"position": 1 + CELLS, "rank": 1 + CELLS, "change": 3}
"""Read from the decoder. Class 0: no object here, no change; a change is 1 arrived, 2 left."""
PLACE_LAYER = 1
"""The decoder layer behind which they are read: the next one can already look for places."""


def targets(facts: Scene, grid: Grid) -> tuple[Tensor, Tensor]:
    """Classes per token, (attributes, T), and of the whole image, (2,)."""
    per_token = torch.zeros(len(TOKEN_PROBES), grid.tokens, dtype=torch.long)
    tokens = cell_tokens(grid)
    for thing in facts.objects:
        labels = (
            list(COLORS).index(thing.color),
            SIZES.index(thing.size),
            SHAPES.index(thing.shape),
        )
        per_token[:, tokens[thing.cell]] = torch.tensor(labels) + 1
    image = (list(SCENES).index(facts.place), list(LIGHTING).index(facts.lighting))
    return per_token, torch.tensor(image)


def place_targets(frames: list[Scene], arrangement: Arrangement) -> list[Tensor]:
    """For each arranged image of a drawing the classes of PLACE_PROBES per token, (3, T)."""
    tokens = len(arrangement.source)
    labels, before = [], None
    for facts in frames:
        label = torch.zeros(len(PLACE_PROBES), tokens, dtype=torch.long)
        now = {thing.cell for thing in facts.objects}
        for rank, thing in enumerate(facts.objects):
            label[:2, arrangement.marks[thing.cell]] = torch.tensor([thing.cell, rank]) + 1
        if before is not None:
            for kind, cells in ((1, now - before), (2, before - now)):
                for cell in cells:
                    label[2, arrangement.marks[cell]] = kind
        labels.append(label)
        before = now
    return labels


class Probes(nn.Module):
    """Linear heads over the feature streams (merged, DeepStack 0, 1, 2) and the decoder, width D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = {name: classes for name, (_, classes) in TOKEN_PROBES.items()}
        heads |= IMAGE_PROBES | PLACE_PROBES
        self.heads = nn.ModuleDict({k: nn.Linear(width, n) for k, n in heads.items()})

    def forward(
        self, features: list[Tensor], per_token: Tensor, image: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss, and the accuracy of each attribute where there is an object."""
        loss = features[0].new_zeros((), dtype=torch.float32)
        accuracy = {}
        for index, (name, (stream, _)) in enumerate(TOKEN_PROBES.items()):
            more, accuracy[name] = self._per_token(name, features[stream], per_token[:, index])
            loss = loss + more
        mean = features[0].float().mean(1)
        for index, name in enumerate(IMAGE_PROBES):
            logits = self.heads[name](mean).float()
            loss = loss + F.cross_entropy(logits, image[:, index])
            accuracy[name] = (logits.argmax(-1) == image[:, index]).float().mean()
        return loss, accuracy

    def places(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same for the decoder's image tokens, (B, T, D), and `place_targets`, (B, 3, T)."""
        loss = hidden.new_zeros((), dtype=torch.float32)
        accuracy = {}
        for index, name in enumerate(PLACE_PROBES):
            more, accuracy[name] = self._per_token(name, hidden, wanted[:, index])
            loss = loss + more
        return loss, accuracy

    def _per_token(self, name: str, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with and without the attribute weigh the same; accuracy of those with it."""
        logits = self.heads[name](hidden).float()
        entropy = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        present = (wanted > 0).float()
        absent = 1 - present
        count = present.sum().clamp(min=1)  # single images have no change
        loss = (entropy * present).sum() / count + (entropy * absent).sum() / absent.sum()
        right = (logits.argmax(-1) == wanted).float()
        return loss, (right * present).sum() / count
