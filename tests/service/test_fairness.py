"""The order in which callers get turns, and who makes room in a full queue."""

from __future__ import annotations

import pytest

from service.fairness import FairQueue


def taken(queue: FairQueue[str]) -> list[str]:
    """All items, in the order in which they are taken and never given back."""
    return [queue.take()[1] for _ in range(len(queue))]


def test_one_caller_is_served_first_come_first_served() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3"):
        queue.put("a", item)
    assert taken(queue) == ["a1", "a2", "a3"]
    with pytest.raises(IndexError):
        queue.take()


def test_callers_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "b2", "c1"):
        queue.put(item[0], item)
    assert queue.peek() == queue.peek() == "a1"
    assert taken(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_the_caller_with_the_fewest_turns_is_next() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(3):
        queue.hold("a")
    for item in ("a1", "b1", "b2", "b3", "b4"):
        queue.put(item[0], item)
    assert taken(queue) == ["b1", "b2", "b3", "a1", "b4"]
    assert (queue.held("a"), queue.held("b")) == (4, 4)
    for _ in range(4):
        queue.give_back("b")
    queue.put("a", "a2")
    queue.put("b", "b5")
    assert queue.take() == ("b", "b5")


def test_a_newcomer_is_before_a_caller_that_had_a_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3"):
        queue.put("a", item)
    assert queue.take() == ("a", "a1")
    queue.put("b", "b1")
    queue.put("b", "b2")
    queue.give_back("a")
    assert queue.take() == ("b", "b1")
    queue.give_back("b")
    assert taken(queue) == ["a2", "b2", "a3"]
    for caller in "aab":
        queue.give_back(caller)
    assert queue._lines == {}, "nothing is kept of callers that have gone"


def test_a_discarded_item_is_gone() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("a", "a1")
    queue.put("a", "a2")
    assert queue.discard("a", "a1")
    assert not queue.discard("a", "a1")
    assert not queue.discard("b", "b1")
    assert (len(queue), queue.waiting("a"), queue.waiting("b")) == (1, 1, 0)
    assert queue.discard("a", "a2")
    assert len(queue) == 0


def test_the_newest_item_of_the_longest_queue_makes_room() -> None:
    queue: FairQueue[str] = FairQueue()
    assert queue.make_room("b") is None
    for item in ("a1", "a2", "a3", "c1"):
        queue.put(item[0], item)
    assert queue.make_room("a") is None, "it is the one that has too many"
    assert queue.make_room("b") == "a3"
    queue.put("b", "b1")
    assert queue.make_room("b") is None, "it would have as many as the other"
    assert taken(queue) == ["a1", "c1", "b1", "a2"]
