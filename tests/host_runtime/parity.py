"""Greedy tokens of an engine against those of a reference, where a tie may go either way.

An engine in 16-bit numbers and a reference in float may part where two logits are nearly equal, and
what follows is then about another text. So a request agrees when it has the reference's tokens up
to a place where the reference's two best logits are closer than the rounding of 16-bit numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TIE = 0.15
"""Difference of the two best logits below which either token is right. Logits of the tiny random
checkpoints have a standard deviation near 1; bfloat16 keeps 8 bits of each of their terms."""


@dataclass(frozen=True)
class Expected:
    """What the reference says for one prompt: tokens, and for each its lead over the second best."""

    tokens: list[int]
    leads: list[float]


@dataclass
class Tally:
    """What the requests of one test came to.

    ties: for each request that parts from the reference, where, and by how much the reference's
    token leads there: (index of the request, index of the token, lead of the logit).
    """

    requests: int = 0
    same: int = 0
    ties: list[tuple[int, int, float]] = field(default_factory=list)


TALLIES: dict[str, Tally] = {}
"""By test; pytest prints them at the end."""


def parting(got: Sequence[int], expected: Expected) -> int | None:
    """Index of the first token that is another one or is missing; None when there is none."""
    pairs = zip(got, expected.tokens, strict=False)
    for index, (mine, wanted) in enumerate(pairs):
        if mine != wanted:
            return index
    lengths = len(got), len(expected.tokens)
    return None if lengths[0] == lengths[1] else min(lengths)


def difference(got: Sequence[int], expected: Expected, tie: float = TIE) -> str | None:
    """None when the tokens agree, otherwise where and by how much they do not."""
    index = parting(got, expected)
    if index is None:
        return None
    if index == len(got) or index == len(expected.tokens):
        return f"{len(got)} tokens instead of {len(expected.tokens)}"
    lead = expected.leads[index]
    if lead < tie:
        return None
    return f"token {index}: {got[index]} instead of {expected.tokens[index]}, which leads by {lead:.3f}"


def same(got: Sequence[Sequence[int]], expected: Sequence[Expected]) -> int:
    """The number of requests with the very same tokens."""
    return sum(list(one) == other.tokens for one, other in zip(got, expected, strict=True))


def check(answered: Sequence[Mapping[str, Any]], wanted: Sequence[Expected]) -> None:
    """Every answer agrees with the reference, and most are the very same; counts them in `TALLIES`."""
    tokens = [answer["tokens"] for answer in answered]
    pairs = list(zip(tokens, wanted, strict=True))
    tally = TALLIES.setdefault(
        os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0], Tally()
    )
    tally.requests += len(pairs)
    tally.same += same(tokens, wanted)
    differences = {}
    for index, (got, expected) in enumerate(pairs):
        differences[index] = difference(got, expected)
        at = parting(got, expected)
        if at is not None and differences[index] is None:
            tally.ties.append((index, at, expected.leads[at]))
    wrong = {index: text for index, text in differences.items() if text is not None}
    assert not wrong, wrong
    assert same(tokens, wanted) >= 0.7 * len(wanted), "too many ties for a test of anything"


def report(tallies: Mapping[str, Tally]) -> Iterator[str]:
    """Lines for a reader: each test, its ties with the gap between the two best logits, the sum."""
    for name, one in tallies.items():
        yield f"{one.same} of {one.requests} requests have the very same tokens: {name}"
        for request, token, lead in one.ties:
            yield f"    request {request} parts at token {token}, where the logits are {lead:.3f} apart"
    requests, identical = (
        sum(getattr(one, name) for one in tallies.values()) for name in ("requests", "same")
    )
    leads = [lead for one in tallies.values() for _, _, lead in one.ties]
    yield (
        f"{requests} requests, {identical} token-identical, {len(leads)} up to a tie "
        f"(at most {max(leads, default=0):.3f} apart; {TIE} is allowed)"
    )
