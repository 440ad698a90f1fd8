"""Token sequences of training: the chat format around images, question and answer.

The same ids and mRoPE positions that the processor and `get_rope_index` of transformers give, laid
out once per combination of grid, number of images and system text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.drawings.network import Grid

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer only with JSON.",
    "You answer questions about drawings. Be brief.",
)
ANSWER_TURN = "<|im_end|>\n<|im_start|>assistant\n"
PAD = "<|endoftext|>"


@dataclass(frozen=True)
class Prefix:
    """Everything before the question: system turn, start of the user turn, the images."""

    grid: Grid
    images: int = 1
    system: str = ""

    def text(self) -> str:
        system = f"<|im_start|>system\n{self.system}<|im_end|>\n" if self.system else ""
        image = "<|vision_start|>" + "<|image_pad|>" * self.grid.tokens + "<|vision_end|>"
        return f"{system}<|im_start|>user\n" + image * self.images


@dataclass
class Sequences:
    """Right-padded sequences that begin with the same prefix."""

    prefix: Prefix
    ids: Tensor
    """(B, L)"""
    starts: list[int]
    """Index of the first image token of each image."""
    scored: Tensor
    """Flat indices into (B x L) of the places from which an answer token is predicted."""
    wanted: Tensor
    """The answer token for each of these places."""

    def positions(self) -> Tensor:
        """mRoPE positions (3, L): time, row, column."""
        return positions(self.prefix.grid, self.starts, self.ids.shape[1])


def positions(grid: Grid, starts: list[int], length: int) -> Tensor:
    """mRoPE positions (3, length) of text with images of one grid at `starts`."""
    rows, columns = grid.rows // 2, grid.columns // 2
    steps = torch.arange(grid.tokens)
    image = torch.stack([steps * 0, steps // columns, steps % columns])
    parts, used, base = [], 0, 0
    for start in [*starts, length]:
        gap = start - used
        parts.append(torch.arange(base, base + gap).expand(3, -1))
        base += gap
        if start < length:
            parts.append(image + base)
            base += max(rows, columns)
        used = start + grid.tokens
    return torch.cat(parts, 1)


def sequences(
    tokenizer: Any, prefix: Prefix, questions: list[str], answers: list[str]
) -> Sequences:
    """Encode questions and answers behind their common prefix."""
    head = _encode(tokenizer, [prefix.text()])[0]
    begin = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    starts = [index + 1 for index, token in enumerate(head) if token == begin]
    asked = _encode(tokenizer, [question + ANSWER_TURN for question in questions])
    answered = _encode(tokenizer, [answer + "<|im_end|>" for answer in answers])
    longest = max(len(a) + len(b) for a, b in zip(asked, answered, strict=True))
    length = (len(head) + longest + 15) // 16 * 16  # few lengths: memory blocks can be reused
    ids = torch.full((len(asked), length), tokenizer.convert_tokens_to_ids(PAD))
    scored, wanted = [], []
    for row, (question, answer) in enumerate(zip(asked, answered, strict=True)):
        tokens = head + question + answer
        ids[row, : len(tokens)] = torch.tensor(tokens)
        first = row * length + len(head) + len(question) - 1
        scored += range(first, first + len(answer))
        wanted += answer
    return Sequences(prefix, ids, starts, torch.tensor(scored), torch.tensor(wanted))


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def lay_out(features: Tensor, starts: list[int], length: int) -> Tensor:
    """(B, images, T, D) features at their places in zeros of (B, length, D)."""
    batch, _, tokens, width = features.shape
    parts, used = [], 0
    for index, start in enumerate(starts):
        parts += [features.new_zeros(batch, start - used, width), features[:, index]]
        used = start + tokens
    parts.append(features.new_zeros(batch, length - used, width))
    return torch.cat(parts, 1)
