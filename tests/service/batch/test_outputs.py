"""The output of a batch: complete files only, and never the answers of two different runs."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pa = pytest.importorskip("pyarrow", reason="the extra batch is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra batch is not installed")

from service.batch.errors import BatchError  # noqa: E402
from service.batch.outputs import (  # noqa: E402
    AnswerColumns,
    Output,
    check_names,
    part_name,
    plan_of,
    with_answers,
)
from service.batch.sources import InputOptions, list_input  # noqa: E402
from tests.service.batch.inputs import write_parquet  # noqa: E402

PLAN = {"format": 1, "version": "1", "input_sha256": "a", "rows_per_shard": 2}


@dataclass
class Rows:
    rows: int


def table(rows: int) -> Any:
    return pa.table({"id": range(rows)})


def names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()} - {".lock", "_plan.json"}


def done(output: Output, rows: Sequence[int]) -> set[int]:
    return output.done([Rows(one) for one in rows])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_shard_has_its_name_when_it_is_complete(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "new" / "out"))
    with output.locked():
        assert not output.agree(PLAN)
        output.write(1, 3, table(2))
        assert names(tmp_path / "new" / "out") == {"part-00001-of-00003.parquet"}
        assert done(output, [2, 2, 1]) == {1}
        assert output.agree({**PLAN, "version": "2"})


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(str(tmp_path))

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(OSError, match="disk full"):
        output.write(0, 1, table(1))
    assert names(tmp_path) == set()


def test_a_file_that_is_being_written_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write, seen = Output(str(tmp_path)), pq.write_table, set[str]()

    def writes(*args: Any, **options: Any) -> None:
        write(*args, **options)
        seen.update(names(tmp_path))

    monkeypatch.setattr(pq, "write_table", writes)
    output.write(0, 1, table(1))
    (temporary,) = seen
    assert temporary.startswith(f".{part_name(0, 1)}.")
    assert names(tmp_path) == {part_name(0, 1)}


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".{part_name(0, 3)}.0123abcd"
    other = tmp_path / ".note"
    for file in (left, other):
        file.touch()
    with Output(str(tmp_path)).locked():
        assert names(tmp_path) == {".note"}


def test_another_plan_is_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    with output.locked():
        output.agree(PLAN)
        with pytest.raises(BatchError) as caught:
            output.agree({**PLAN, "input_sha256": "b", "rows_per_shard": 3})
    assert 'input_sha256: "a" before, "b" now' in str(caught.value)
    assert "rows_per_shard: 2 before, 3 now" in str(caught.value)
    assert json.loads((tmp_path / "_plan.json").read_text()) == PLAN


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").touch()
    output = Output(str(tmp_path))
    with output.locked(), pytest.raises(BatchError, match=r"mine\.parquet"):
        output.agree(PLAN)


@pytest.mark.parametrize("rows", [1, 3, None])
def test_a_file_without_the_rows_of_its_shard_is_refused(tmp_path: Path, rows: int | None) -> None:
    output = Output(str(tmp_path))
    if rows is None:
        (tmp_path / part_name(0, 1)).write_bytes(b"PAR1")
    else:
        output.write(0, 1, table(rows))
    with pytest.raises(BatchError, match="remove it"):
        done(output, [2])


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BatchError, match="another run"), output.locked():
            pass


def test_the_columns_of_answers() -> None:
    columns = AnswerColumns(json=True, analysis=False)
    rows = [{"json": "{}", "prompt_tokens": 3}, {"error_reason": "IMAGE_EMPTY"}]
    found = with_answers(pa.table({"id": [7, 8]}), rows, columns).to_pylist()
    empty = dict.fromkeys(columns.schema.names)
    assert found == [{"id": 7, **empty, **rows[0]}, {"id": 8, **empty, **rows[1]}]
    with pytest.raises(BatchError, match="--keep"):
        check_names(pa.schema([("json", pa.string())]), columns)


@pytest.mark.parametrize("changed", ["a.parquet", "b.parquet"])
def test_the_plan_knows_a_changed_input(tmp_path: Path, changed: str) -> None:
    def plan() -> dict[str, Any]:
        options = InputOptions(str(tmp_path))
        return plan_of("1", options, list_input(options, 2), {"task": "a"}, 2)

    for name in ("a.parquet", "b.parquet"):
        write_parquet(tmp_path / name, [b"1", b"2"])
    first = plan()
    assert plan() == first
    write_parquet(tmp_path / changed, [b"1", b"3"])
    assert plan()["input_sha256"] != first["input_sha256"]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"image_column": "a"}, {"image_column": "b"}),
        ({"path_column": "first"}, {"path_column": "second"}),
        ({"path_column": "first"}, {"path_column": "first", "root": "elsewhere"}),
        ({"image_column": "a"}, {"image_column": "a", "keep": ("first",)}),
    ],
)
def test_the_plan_knows_another_choice_of_columns(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any]
) -> None:
    def plan(chosen: dict[str, Any]) -> dict[str, Any]:
        options = InputOptions(str(tmp_path), **chosen)
        return plan_of("1", options, list_input(options, 2), {"task": "a"}, 2)

    columns = {"first": ["x"], "second": ["y"], "a": [b"1"], "b": [b"2"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert plan(before) != plan(now)
