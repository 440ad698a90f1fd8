"""Throw-away linear heads that give each feature stream of the vision tower its own attribute.

The merged features learn where objects are, their rank in reading order, the scene and the
lighting; the three DeepStack features learn colour, size and shape. So an engine that drops, swaps
or delays a DeepStack feature answers visibly wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.drawings.network import Grid
from examples.drawings.scenes import COLORS, LIGHTING, POSITIONS, SCENES, SHAPES, SIZES, Scene

# attribute -> (feature stream, classes); class 0 of a per-token attribute means "no object here"
TOKEN_PROBES = {
    "position": (0, 1 + len(POSITIONS)),
    "rank": (0, 1 + len(POSITIONS)),
    "color": (1, 1 + len(COLORS)),
    "size": (2, 1 + len(SIZES)),
    "shape": (3, 1 + len(SHAPES)),
}
PICTURE_PROBES = {"scene": len(SCENES), "lighting": len(LIGHTING)}


def cell_tokens(grid: Grid) -> list[int]:
    """The merged token at the centre of each of the nine cells."""
    rows, columns = grid.rows // 2, grid.columns // 2
    return [
        int((row + 0.5) * rows / 3) * columns + int((column + 0.5) * columns / 3)
        for row in range(3)
        for column in range(3)
    ]


def targets(facts: Scene, grid: Grid) -> tuple[Tensor, Tensor]:
    """Classes per token, (attributes, T), and of the whole picture, (2,)."""
    per_token = torch.zeros(len(TOKEN_PROBES), grid.tokens, dtype=torch.long)
    tokens = cell_tokens(grid)
    for rank, thing in enumerate(facts.objects):
        labels = (
            thing.cell,
            rank,
            list(COLORS).index(thing.color),
            SIZES.index(thing.size),
            SHAPES.index(thing.shape),
        )
        per_token[:, tokens[thing.cell]] = torch.tensor(labels) + 1
    picture = (list(SCENES).index(facts.place), list(LIGHTING).index(facts.lighting))
    return per_token, torch.tensor(picture)


class Probes(nn.Module):
    """Linear heads over the feature streams (merged, DeepStack 0, 1, 2), width D each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = {name: classes for name, (_, classes) in TOKEN_PROBES.items()} | PICTURE_PROBES
        self.heads = nn.ModuleDict({k: nn.Linear(width, n) for k, n in heads.items()})

    def forward(
        self, features: list[Tensor], per_token: Tensor, picture: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss, and the accuracy of each attribute where there is an object."""
        loss = features[0].new_zeros((), dtype=torch.float32)
        accuracy = {}
        for index, (name, (stream, _)) in enumerate(TOKEN_PROBES.items()):
            logits, wanted = self.heads[name](features[stream]).float(), per_token[:, index]
            entropy = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
            present = (wanted > 0).float()
            absent = 1 - present
            loss = loss + (entropy * present).sum() / present.sum()
            loss = loss + (entropy * absent).sum() / absent.sum()
            right = (logits.argmax(-1) == wanted).float()
            accuracy[name] = (right * present).sum() / present.sum()
        mean = features[0].float().mean(1)
        for index, name in enumerate(PICTURE_PROBES):
            logits = self.heads[name](mean).float()
            loss = loss + F.cross_entropy(logits, picture[:, index])
            accuracy[name] = (logits.argmax(-1) == picture[:, index]).float().mean()
        return loss, accuracy
