"""Requests for the tests of DeepStack."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.host_runtime.cases import Case, make_case

SIZES = [(h, w) for h in range(2, 11) for w in range(2, 11) if h * w <= 48]
"""In tokens."""
PICTURES = (1, 0, 2, 3, 0, 4, 5, 6)
"""Of the first requests."""


def mixed_cases(token: int, count: int, seed: int = 11) -> list[Case]:
    """Requests with 0 to 6 pictures, at the start, at the end, in a row, as frames of a video, and
    some that begin like another. No two pictures have one size."""
    source = random.Random(seed)
    sizes = source.sample(SIZES, len(SIZES))
    cases: list[Case] = []
    for number in range(count):
        pictures = PICTURES[number] if number < len(PICTURES) else source.randrange(4)
        grids = [(2 * h, 2 * w) for h, w in (sizes.pop() for _ in range(pictures))]
        words = [source.randrange(1, 12) for _ in range(pictures + 1)]
        words[0] *= number % 3 != 0
        words[-1] += 20 * (pictures == 0)
        video = number % 4 == 2
        case = make_case(number + 100 * seed, grids, words, token, max_new_tokens=5, video=video)
        cases.append(case)
        if number % 2 and len(case.tokens) > 70:
            cases.append(with_another_end(case, source))
    return cases


def with_another_end(case: Case, source: random.Random) -> Case:
    """The same up to its last picture: its beginning is in the prefix cache, perhaps up to the middle of a picture."""
    end = [source.randrange(10, 300) for _ in range(9)]
    return replace(case, tokens=case.tokens[: case.spans[-1][1]] + end)
