"""The output of a run: one Parquet file for each shard, and the record of the plan.

A file is written under a hidden temporary name and renamed when it is complete, so that a file under its
own name always has all rows of its shard. A later run with the same plan leaves it out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from service.batch.errors import BatchError
from service.batch.places import is_local, opened
from service.batch.sources import InputOptions, Piece, Source
from service.tasks.image_analysis import FIELDS, STRING_FIELDS

PLAN = "_plan.json"
"""Readers of Parquet folders leave out names that begin with ``_`` or a dot."""
LOCK = ".lock"
FORMAT = 1
PART = re.compile(r"part-(\d{5,})-of-(\d{5,})\.parquet")
TEMPORARY = re.compile(r"\.part-\d+-of-\d+\.parquet\.[0-9a-f]+")

USAGE_COLUMNS = ("prompt_tokens", "image_tokens", "output_tokens", "attempts")
STRINGS = pa.list_(pa.string())


@dataclass(frozen=True)
class AnswerColumns:
    """The columns of the answers.

    json: whether the answers are JSON; otherwise they are text.
    analysis: whether they are image analyses, whose fields get columns of their own.
    """

    json: bool
    analysis: bool

    @property
    def schema(self) -> pa.Schema:
        fields = [pa.field("json" if self.json else "text", pa.string())]
        if self.analysis:
            fields += [
                pa.field(name, pa.string() if name in STRING_FIELDS else STRINGS) for name in FIELDS
            ]
        fields += [pa.field(name, pa.int32()) for name in USAGE_COLUMNS]
        fields += [pa.field("error_reason", pa.string()), pa.field("error_message", pa.string())]
        return pa.schema(fields)


def with_answers(
    keys: pa.Table, answers: Sequence[Mapping[str, Any]], columns: AnswerColumns
) -> pa.Table:
    """The keys, and a column for each part of the answers."""
    found = pa.Table.from_pylist(list(answers), schema=columns.schema)
    for name in found.column_names:
        keys = keys.append_column(found.schema.field(name), found.column(name))
    return keys


def check_names(keys: pa.Schema, columns: AnswerColumns) -> None:
    """Raise ``BatchError`` where a key has the name of a column of the answers."""
    both = [name for name in keys.names if name in columns.schema.names]
    if both:
        raise BatchError(
            f"{', '.join(both)}: the answers have a column of this name; choose the columns to keep "
            "with --keep, or rename it"
        )


class Output:
    """The folder of the output, of this machine or a URI."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._filesystem, self._path = opened(place)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep other runs of this machine out of it. Temporary files of a run
        that was killed are removed."""
        try:
            self._filesystem.create_dir(self._path, recursive=True)
        except OSError as error:
            raise BatchError(f"{self.place} cannot be created: {error}") from None
        if not is_local(self.place):
            yield
            return
        with open(f"{self._path}/{LOCK}", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BatchError(f"another run writes to {self.place}") from None
            for name in self._names():
                if TEMPORARY.fullmatch(name):
                    self._filesystem.delete_file(f"{self._path}/{name}")
            yield

    def agree(self, plan: Mapping[str, Any]) -> bool:
        """Record the plan, or compare it with that of an earlier run. Returns whether there was one.

        Raises ``BatchError`` for another plan, or for a folder that has other files.
        """
        text = self._read(PLAN)
        if text is None:
            others = [name for name in self._names() if name != LOCK]
            if others:
                raise BatchError(
                    f"{self.place} is not empty and was not written by qwen3vl batch "
                    f"({others[0]}, …); choose another folder"
                )
            self._write(PLAN, json.dumps(plan, indent=2, ensure_ascii=False).encode())
            return False
        try:
            before = json.loads(text)
        except ValueError:
            raise BatchError(f"{self.place}/{PLAN} is not JSON; choose another folder") from None
        changed = [
            f"  {name}: {_short(before.get(name))} before, {_short(value)} now"
            for name, value in plan.items()
            if name != "version" and before.get(name) != value
        ]
        if changed:
            raise BatchError(
                f"{self.place} has the answers of another run. To go on with that run, give the same "
                "input and options; otherwise choose another folder. Changed:\n"
                + "\n".join(changed)
            )
        return True

    def done(self, pieces: Sequence[Piece]) -> set[int]:
        """The numbers of the shards that are complete. Raises ``BatchError`` for a file that does
        not have the rows of its shard."""
        found = set()
        for name in self._names():
            match = PART.fullmatch(name)
            if match is None:
                continue
            number = int(match[1])
            try:
                with self._filesystem.open_input_file(f"{self._path}/{name}") as file:
                    rows = pq.ParquetFile(file).metadata.num_rows
            except (pa.ArrowInvalid, OSError):
                rows = -1
            if number >= len(pieces) or rows != pieces[number].rows:
                raise BatchError(
                    f"{self.place}/{name} does not have the rows of its shard; remove it, and the run "
                    "writes it again"
                )
            found.add(number)
        return found

    def write(self, number: int, count: int, table: pa.Table) -> None:
        """Write a shard. Until the end its file has a temporary name."""
        name = part_name(number, count)
        temporary = f"{self._path}/.{name}.{uuid.uuid4().hex}"
        try:
            with self._filesystem.open_output_stream(temporary) as file:
                pq.write_table(table, file, compression="zstd")
            self._publish(temporary, name)
        except BaseException:
            if is_local(self.place):
                Path(temporary).unlink(missing_ok=True)
            raise

    def _publish(self, temporary: str, name: str) -> None:
        if not is_local(self.place):
            self._filesystem.move(temporary, f"{self._path}/{name}")
            return
        _sync(temporary)
        os.replace(temporary, f"{self._path}/{name}")
        _sync(self._path)

    def _write(self, name: str, data: bytes) -> None:
        temporary = f"{self._path}/.{name}.tmp"
        with self._filesystem.open_output_stream(temporary) as file:
            file.write(data)
        self._publish(temporary, name)

    def _read(self, name: str) -> bytes | None:
        try:
            with self._filesystem.open_input_stream(f"{self._path}/{name}") as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def _names(self) -> list[str]:
        found = self._filesystem.get_file_info(fs.FileSelector(self._path))
        names = sorted(one.base_name for one in found)
        return [name for name in names if name != f".{PLAN}.tmp"]


def part_name(number: int, count: int) -> str:
    return f"part-{number:05d}-of-{count:05d}.parquet"


def plan_of(
    version: str,
    options: InputOptions,
    source: Source,
    request: Mapping[str, Any],
    rows_per_shard: int,
) -> dict[str, Any]:
    """The record of a plan: all that decides which rows there are, and what their answers are."""
    digest = hashlib.sha256("\n".join(source.files).encode(errors="surrogateescape"))
    return {
        "format": FORMAT,
        "version": version,
        "input": source.kind,
        "input_rows": sum(piece.rows for piece in source.pieces),
        "input_files": len(source.files),
        "input_sha256": digest.hexdigest(),
        "image_column": options.image_column,
        "path_column": options.path_column,
        "root": options.root,
        "columns": list(source.key_schema.names),
        "rows_per_shard": rows_per_shard,
        **request,
    }


def _sync(path: str) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"
