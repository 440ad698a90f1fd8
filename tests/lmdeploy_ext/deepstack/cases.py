"""Requests for the tests of DeepStack."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.host_runtime.cases import Case, make_case

SIZES = [(h, w) for h in range(2, 11) for w in range(2, 11) if h * w <= 48]
"""In tokens."""
IMAGES = (1, 0, 2, 3, 0, 4, 5, 6)
"""Of the first requests."""


def mixed_cases(token: int, count: int, seed: int = 11) -> list[Case]:
    """Requests with 0 to 6 images, at the start, at the end, in a row, as frames of a video, and
    some that begin like another. No two images have one size."""
    source = random.Random(seed)
    sizes = source.sample(SIZES, len(SIZES))
    cases: list[Case] = []
    for number in range(count):
        images = IMAGES[number] if number < len(IMAGES) else source.randrange(4)
        grids = [(2 * h, 2 * w) for h, w in (sizes.pop() for _ in range(images))]
        words = [source.randrange(1, 12) for _ in range(images + 1)]
        words[0] *= number % 3 != 0
        words[-1] += 20 * (images == 0)
        video = number % 4 == 2
        case = make_case(number + 100 * seed, grids, words, token, max_new_tokens=5, video=video)
        cases.append(case)
        if number % 2 and len(case.tokens) > 70:
            cases.append(with_another_end(case, source))
    return cases


def with_another_end(case: Case, source: random.Random) -> Case:
    """The same up to its last image: its beginning is in the prefix cache, perhaps up to the middle of an image."""
    end = [source.randrange(10, 300) for _ in range(9)]
    return replace(case, tokens=case.tokens[: case.spans[-1][1]] + end)
