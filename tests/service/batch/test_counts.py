"""What a run counts and shows: the board of all actors, the rate, and the line on the terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import pytest

pytest.importorskip("pyarrow", reason="the extra batch is not installed")

from service.batch import counts as counting
from service.batch.counts import Board, Counts, Display, Rate, ShardCounter, Snapshot, spoken


def counted(rows: int, *reasons: str) -> Counts:
    return Counts(rows, 10 * rows, rows, Counter(reasons))


# Board


def test_shards_in_work_and_finished_ones_are_added_up() -> None:
    board = Board(3)
    board.finish(0, counted(8, "IMAGE_EMPTY"))
    board.report(1, counted(3, "IMAGE_EMPTY", "IMAGE_TRUNCATED"))
    state = board.snapshot()
    assert (state.shards, state.failure) == (1, "")
    assert state.counts == counted(11, "IMAGE_EMPTY", "IMAGE_EMPTY", "IMAGE_TRUNCATED")
    assert state.counts.failed == 3


def test_a_shard_that_is_begun_again_replaces_its_counts() -> None:
    board = Board(3)
    board.report(1, counted(3))
    board.report(1, counted(1))
    assert board.snapshot().counts.rows == 1
    board.finish(1, counted(8))
    assert board.snapshot().counts.rows == 8


def test_a_shard_counts_once_also_when_two_actors_finish_it() -> None:
    board = Board(3)
    board.finish(1, counted(8))
    board.report(1, counted(5))
    board.finish(1, counted(8))
    state = board.snapshot()
    assert (state.counts.rows, state.shards) == (8, 1)


def test_engines_that_start_too_often_end_the_run() -> None:
    board = Board(2)
    board.report(7, counted(1))
    board.report(4, counted(1))
    assert [board.start() for _ in range(3)] == [True, True, False]
    failure = board.snapshot().failure
    assert "more than 2 times and no shard was finished. Shards in work: 4, 7." in failure


def test_a_finished_shard_allows_as_many_starts_again() -> None:
    board = Board(2)
    assert [board.start() for _ in range(2)] == [True, True]
    board.finish(0, counted(1))
    board.finish(0, counted(1))
    assert [board.start() for _ in range(3)] == [True, True, False]
    board.finish(0, counted(1))  # it was finished before
    assert board.start() is False


def test_the_first_failure_is_the_one_that_is_told() -> None:
    board = Board(1)
    board.tell("reading the weights")
    board.fail("the disk is full")
    board.fail("the run was ended")
    state = board.snapshot()
    assert (state.note, state.failure) == ("reading the weights", "the disk is full")


# Counts of an actor


def test_rows_are_counted_with_their_tokens_and_errors() -> None:
    counts = Counts()
    counts.row({"json": "{}", "prompt_tokens": 70, "output_tokens": 9})
    counts.row({"error_reason": "IMAGE_EMPTY", "prompt_tokens": None})
    assert counts == Counts(2, 70, 9, Counter({"IMAGE_EMPTY": 1}))


def test_an_actor_reports_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(counting.time, "monotonic", lambda: now)
    reported: list[int] = []
    counter = ShardCounter(lambda counts: reported.append(counts.rows))
    for step in (0.0, 0.3, 0.3, 0.3, 0.3):
        now += step
        counter.row({})
    assert reported == [3, 5]
    assert counter.counts.rows == 5


# Rate


def rate_of(points: Sequence[tuple[float, int]]) -> float:
    rate = Rate()
    for at_s, rows in points:
        rate.add(at_s, rows)
    return rate.per_s


def test_the_rate_is_unknown_before_the_second_look() -> None:
    assert rate_of([]) == 0
    assert rate_of([(5.0, 3)]) == 0


def test_the_time_in_which_an_engine_loads_does_not_count() -> None:
    assert rate_of([(0.0, 0), (50.0, 0), (60.0, 100)]) == 10


def test_only_the_last_minute_counts() -> None:
    slow_then_fast = [(0.0, 0), (100.0, 100), (130.0, 400), (160.0, 700)]
    assert rate_of(slow_then_fast) == 10


def test_rows_that_are_answered_again_make_no_negative_rate() -> None:
    assert rate_of([(0.0, 50), (1.0, 20)]) == 0


# Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(
    states: Sequence[Snapshot | None],
    monkeypatch: pytest.MonkeyPatch,
    stream: io.StringIO,
    step_s: float = 1.0,
) -> str:
    """What a run with these states, one a step, writes. The clock is that of the test."""
    now, left = 0.0, list(states)
    monkeypatch.setattr(counting.time, "monotonic", lambda: now)

    def look() -> Snapshot | None:
        return left.pop(0)

    display = Display(200, 100, look, stream)

    def wait(_: float) -> bool:
        nonlocal now
        now += step_s
        return not left

    monkeypatch.setattr(display._stop, "wait", wait)
    with display:
        display._thread.join()
    return stream.getvalue()


def state(counts: Counts, note: str = "") -> Snapshot:
    return Snapshot(counts, 0, note, "")


def test_the_line_has_rate_time_left_tokens_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [state(Counts()), state(counted(10)), state(counted(20, "IMAGE_EMPTY", "IMAGE_EMPTY"))]
    text = shown(states, monkeypatch, Terminal())
    last = text.rpartition("\r\x1b[K120 of")
    assert last[2] == (
        " 200 rows (60.0%) · 10.0 rows/s · 8 s left · 200 prompt and 20 answer tokens"
        " · 2 errors: IMAGE_EMPTY 2\r\x1b[K"
    )


def test_away_from_a_terminal_there_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [state(counted(number)) for number in range(1, 32)]
    lines = shown(states, monkeypatch, io.StringIO()).splitlines()
    assert [line.partition(" of ")[0] for line in lines] == ["101", "111", "121", "131"]


def test_steps_of_loading_are_shown_once_and_only_before_the_first_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = [
        state(Counts(), "reading the weights"),
        state(Counts(), "reading the weights"),
        None,
        state(Counts(), "ready"),
        state(counted(1), "reading the weights"),
    ]
    lines = shown(states, monkeypatch, io.StringIO()).splitlines()
    assert lines[:2] == ["… reading the weights", "… ready"]
    assert [line.partition(" ")[0] for line in lines[2:]] == ["101"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42.4, "42 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (7500, "2 h 5 min")],
)
def test_times_as_text(seconds: float, text: str) -> None:
    assert spoken(seconds) == text
