"""A part of the fuzz; ``python -m tests.lmdeploy_ext.deepstack.fuzz`` runs as much of it as you like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lmdeploy_ext.deepstack.fuzz import fuzz

pytestmark = [pytest.mark.slow, pytest.mark.host]

SEEN = {
    "0 images", "1 images", "2 images", "3 images", "4 images", "video frames",
    "cancelled before its first token", "beginning from the prefix cache",
    "a whole image from the prefix cache", "a part of an image from the prefix cache",
    "several images", "not the end of an image", "end of an image",
    "text of a prompt whose images came before", "rows behind the last image", "rows of other requests",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "count"), [({}, 150), ({"moe": True, "tied": False}, 100)], ids=["dense", "experts"]
)
def test_random_requests(loud: Callable[..., Path], fields: dict[str, bool], count: int) -> None:
    found = fuzz(loud(**fields), count, seed=7)
    assert found.problems == []
    assert found.requests == count
    assert found.ties < 0.1 * found.tokens, "too many near ties for a test of anything"
    assert found.kinds.keys() >= SEEN


@pytest.mark.long
@pytest.mark.timeout(14_400)
def test_two_thousand_random_requests(loud: Callable[..., Path]) -> None:
    found = fuzz(loud(), 2000, seed=1)
    assert found.problems == []
    assert found.requests == 2000
    assert found.ties < 0.1 * found.tokens, "too many near ties for a test of anything"


def test_a_fault_is_noticed(loud: Callable[..., Path]) -> None:
    found = fuzz(loud(), 30, seed=7, fault="features swapped")
    assert len(found.problems) >= 5
