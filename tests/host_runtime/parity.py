"""Greedy tokens of an engine against those of a reference, where a tie may go either way.

An engine in 16-bit numbers and a reference in float may part where two logits are nearly equal, and
what follows is then about another text. So a request agrees when it has the reference's tokens up
to a place where the reference's two best logits are closer than the rounding of 16-bit numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TIE = 0.15
"""Difference of the two best logits below which either token is right. Logits of the tiny random
checkpoints have a standard deviation near 1; bfloat16 keeps 8 bits of each of their terms."""


@dataclass(frozen=True)
class Expected:
    """What the reference says for one prompt: tokens, and for each its lead over the second best."""

    tokens: list[int]
    leads: list[float]


def difference(got: Sequence[int], expected: Expected, tie: float = TIE) -> str | None:
    """None when the tokens agree, otherwise where and by how much they do not."""
    for index, (mine, wanted) in enumerate(zip(got, expected.tokens, strict=False)):
        if mine != wanted:
            lead = expected.leads[index]
            if lead < tie:
                return None
            return f"token {index}: {mine} instead of {wanted}, which leads by {lead:.3f}"
    if len(got) != len(expected.tokens):
        return f"{len(got)} tokens instead of {len(expected.tokens)}"
    return None


def same(got: Sequence[Sequence[int]], expected: Sequence[Expected]) -> int:
    """The number of requests with the very same tokens."""
    return sum(list(one) == other.tokens for one, other in zip(got, expected, strict=True))
