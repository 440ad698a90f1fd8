"""Random prompts of text, images and video frames, and transformers' mRoPE positions for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Token types as transformers numbers them."""


@dataclass(frozen=True)
class Piece:
    """An image or a video frame of merged sides, and the number of text tokens behind it."""

    rows: int
    columns: int
    kind: int = IMAGE
    behind: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return (1, 2 * self.rows, 2 * self.columns)


@dataclass(frozen=True)
class Prompt:
    """Text tokens in front, then pieces."""

    before: int
    pieces: tuple[Piece, ...]

    @property
    def types(self) -> list[int]:
        """Type of each token."""
        types = [TEXT] * self.before
        for piece in self.pieces:
            types += [piece.kind] * (piece.rows * piece.columns) + [TEXT] * piece.behind
        return types

    @property
    def spans(self) -> list[tuple[int, int]]:
        spans, begin = [], self.before
        for piece in self.pieces:
            spans.append((begin, begin + piece.rows * piece.columns))
            begin = spans[-1][1] + piece.behind
        return spans

    def positions(self) -> tuple[npt.NDArray[np.int64], int]:
        """Positions (3, T) and delta of transformers' ``get_rope_index``.

        It finds images as runs of one token type, so it is asked for the parts of a prompt between
        neighbours of one kind; each part begins behind the highest position of the one before.
        """
        parts, start = [], 0
        for part in self._parts():
            positions = _rope_index(part)
            parts.append(positions + start)
            start += int(positions.max(initial=-1)) + 1
        joined = np.concatenate(parts, axis=1)
        return joined, start - joined.shape[1]

    def _parts(self) -> list[Prompt]:
        parts, before, pieces = [], self.before, list[Piece]()
        for piece in self.pieces:
            if pieces and pieces[-1].kind == piece.kind and not pieces[-1].behind:
                parts.append(Prompt(before, tuple(pieces)))
                before, pieces = 0, []
            pieces.append(piece)
        return [*parts, Prompt(before, tuple(pieces))]


def prompts(max_pieces: int = 8) -> st.SearchStrategy[Prompt]:
    """Any prompt of at least one token: pieces at the start, at the end, next to each other."""
    side, text = st.integers(1, 9), st.integers(0, 12)
    piece = st.builds(Piece, side, side, st.sampled_from([IMAGE, VIDEO]), text)
    pieces = st.integers(0, max_pieces).flatmap(
        lambda count: st.lists(piece, min_size=count, max_size=count).map(tuple)
    )
    return st.builds(Prompt, text, pieces).filter(lambda prompt: len(prompt.types) > 0)


def features(prompt: Prompt) -> Sequence[str]:
    """What is special about a prompt."""
    pieces = prompt.pieces
    kinds = {piece.kind for piece in pieces}
    neighbours = [(one.kind, other.kind) for one, other in pairwise(pieces) if not one.behind]
    found = {
        "text only": not pieces,
        "starts with a piece": pieces and not prompt.before,
        "ends with a piece": pieces and not pieces[-1].behind,
        "neighbours of one kind": any(one == other for one, other in neighbours),
        "neighbours of two kinds": any(one != other for one, other in neighbours),
        "images and video": kinds == {IMAGE, VIDEO},
        f"{len(pieces)} pieces": True,
    }
    return [name for name, holds in found.items() if holds]


@cache
def _model() -> Qwen3VLModel:
    config = Qwen3VLConfig(
        text_config={"num_hidden_layers": 0, "hidden_size": 16, "vocab_size": 16},
        vision_config={"depth": 0, "hidden_size": 16, "deepstack_visual_indexes": []},
    )
    with torch.device("meta"):
        return Qwen3VLModel(config)


def _rope_index(prompt: Prompt) -> npt.NDArray[np.int64]:
    images = [piece.grid for piece in prompt.pieces if piece.kind == IMAGE]
    frames = [piece.grid for piece in prompt.pieces if piece.kind == VIDEO]
    types = torch.tensor([prompt.types], dtype=torch.int)
    positions, _ = _model().get_rope_index(
        torch.zeros_like(types),
        types,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(frames) if frames else None,
    )
    return positions[:, 0].numpy()
