"""What is kept stays within its bounds."""

from __future__ import annotations

import threading

import pytest

from service.schema_compiler.cache import SingleFlightCache


def test_what_is_kept_is_not_made_again() -> None:
    made: list[str] = []
    kept: SingleFlightCache[str] = SingleFlightCache(max_entries=2, max_characters=100)

    def get(key: str, characters: int = 1) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return kept.get(key, characters, make)

    assert [get("a"), get("b"), get("a")] == ["A", "B", "A"]
    assert made == ["a", "b"]
    get("c")  # the one used last but one has to go
    get("a")
    get("b")
    assert made == ["a", "b", "c", "b"]


def test_long_texts_leave_room_for_few() -> None:
    made: list[int] = []
    kept: SingleFlightCache[None] = SingleFlightCache(max_entries=100, max_characters=100)
    for key in (1, 2, 3, 1, 3):
        kept.get(key, 40, lambda key=key: made.append(key))  # type: ignore[misc]
    assert made == [1, 2, 3, 1]
    kept.get(4, 1000, lambda: made.append(4))
    kept.get(4, 1000, lambda: made.append(4))  # the last one, whatever its length
    kept.get(3, 40, lambda: made.append(3))
    assert made == [1, 2, 3, 1, 4, 3]


def test_threads_that_ask_for_the_same_result_wait_for_one_of_them() -> None:
    cache: SingleFlightCache[str] = SingleFlightCache(max_entries=2, max_characters=100)
    begun, may_end = threading.Event(), threading.Event()
    made: list[str] = []
    results: list[str] = []

    def make() -> str:
        begun.set()
        assert may_end.wait(60)
        made.append("a")
        return "A"

    threads = [
        threading.Thread(target=lambda: results.append(cache.get("a", 1, make))) for _ in range(4)
    ]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    assert cache.get("b", 1, lambda: "B") == "B"  # other keys do not wait
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert (results, made) == (["A"] * 4, ["a"])


def test_errors_are_not_kept() -> None:
    cache: SingleFlightCache[str] = SingleFlightCache(max_entries=2, max_characters=100)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", 1, lambda: str(1 // 0))
    assert cache.get("a", 1, lambda: "A") == "A"
