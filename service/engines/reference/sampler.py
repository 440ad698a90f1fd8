"""Chooses the next token with transformers' definitions, in transformers' order.

The order is: repetition penalty, grammar mask, temperature, top-k, top-p, random draw. Each request
has its own random generator and draws once per token, so a seed gives the same text in any batch.
Greedy decoding takes the lowest id among equal scores.

Letters: V width of the logits.
"""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from service.types import Sampling


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling, prompt: Tensor, vocab_size: int) -> None:
        """prompt: int64 (T,); the repetition penalty also applies to its tokens."""
        self._sampling = sampling
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
            self._generator = torch.Generator().manual_seed(_signed(seed))
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[prompt] = True

    def penalise_inplace(self, logits: Tensor) -> None:
        """Apply the repetition penalty to logits (V,). Call this before the grammar's mask."""
        if self._seen is not None:
            penalty = self._sampling.repetition_penalty
            seen = logits[self._seen]
            logits[self._seen] = torch.where(seen < 0, seen * penalty, seen / penalty)

    def choose(self, logits: Tensor) -> int:
        """The next token for masked logits, float32 (V,) on the CPU."""
        if self._generator is None:
            token = int(logits.numpy().argmax())  # the lowest id among equal scores
        else:
            scores = _top_p(
                _top_k(logits / self._sampling.temperature, self._sampling.top_k),
                self._sampling.top_p,
            )
            shares = scores.softmax(-1)
            token = int(torch.multinomial(shares, 1, generator=self._generator))
        if self._seen is not None:
            self._seen[token] = True
        return token


def _top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k best tokens, and tokens with the same score as the k-th."""
    if not 0 < k < scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)


def _top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of best tokens whose probabilities sum to at least p."""
    if p >= 1.0:
        return scores
    ascending, order = scores.sort(descending=False)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[-1] = False
    return scores.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), -torch.inf)


def _signed(seed: int) -> int:
    """A uint64 seed as int64 for torch; different seeds stay different."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
