"""``qwen3vl batch``: reads the options, runs the job, prints its end."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from service.batch.errors import BatchError, Stopped
from service.cli.arguments import with_flag
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import UNSERVED, Settings, SettingsError, load_settings

FAILED, USAGE, INTERRUPTED = 1, 2, 130
MOST_NATIVE_BYTES = 4096
NEEDED = ("ray", "pyarrow", "pandas")


def batch(
    where: str,
    place: str,
    request: pb.RunTaskRequest,
    *,
    accept_empty: bool,
    chosen: Sequence[str],
    input_options: dict[str, Any],
    rows_per_shard: int,
    resources: dict[str, Any],
) -> int:
    """Run the job. Returns the exit code: 0 when every row has an answer or an error."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo("batch needs the extra batch: pip install 'qwen3vl-grpc[batch]'", err=True)
        return USAGE
    settings = _settings(chosen)
    # Imported here: Ray takes a second, and the usage errors above need none of it.
    from service.batch.job import Resources, Summary, run_job
    from service.batch.request import work_of
    from service.batch.sources import InputOptions

    logging.getLogger().addHandler(logging.NullHandler())  # errors are printed here, by us
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work = work_of(request, settings, accept_empty)
        options = InputOptions(where, **input_options)
        with _native_output_apart():
            done: Summary = run_job(
                work, settings, options, place, rows_per_shard, Resources(**resources)
            )
    except BatchError as error:
        typer.echo(f"qwen3vl batch: {error}", err=True)
        return FAILED
    except Stopped as stopped:
        typer.echo(
            f"Stopped. {stopped.complete} of {stopped.count} files are in {place}. "
            "The same command goes on with the others.",
            err=True,
        )
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    typer.echo(_end(done, place), err=True)
    return 0


@contextmanager
def _native_output_apart() -> Iterator[None]:
    """Keep what Ray's C++ code writes to stderr off the terminal; ``sys.stderr`` is not affected.
    It is printed when the body fails for a reason that is not our own."""
    before = sys.stderr
    before.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as kept, os.fdopen(terminal, "w", buffering=1) as stream:
        os.dup2(kept.fileno(), 2)
        sys.stderr = stream
        try:
            yield
        except (BatchError, Stopped):
            raise
        except Exception:
            kept.seek(0)
            stream.write(kept.read(MOST_NATIVE_BYTES).decode(errors="replace"))
            raise
        finally:
            os.dup2(terminal, 2)
            sys.stderr = before


def _settings(chosen: Sequence[str]) -> Settings:
    """The settings of the environment and of ``--set NAME=VALUE``; ends the command if one is
    invalid."""
    given: dict[str, Any] = {}
    for one in chosen:
        name, equals, value = one.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in Settings.model_fields:
            raise typer.BadParameter(
                f"--set {one}: not NAME=VALUE with a setting of `qwen3vl serve --help`"
            )
        if name in UNSERVED:
            raise typer.BadParameter(f"--set {one}: a batch has no port and no callers")
        given[name] = value
    try:
        return load_settings(**UNSERVED, **given)
    except SettingsError as error:
        for line in str(error).splitlines():
            typer.echo(f"qwen3vl batch: {with_flag(line)}", err=True)
        raise typer.Exit(USAGE) from None


def _end(done: Any, place: str) -> str:
    from service.batch.counts import reasons, tokens

    files = "1 file" if done.shards == 1 else f"{done.shards:,} files"
    lines = [f"{done.rows:,} rows are in {place}, in {files}."]
    if done.counts.rows:
        errors = f", {done.counts.failed:,} of them errors" if done.counts.failed else ""
        lines.append(f"This run: {done.counts.rows:,} rows{errors}, {tokens(done.counts)}.")
    if done.counts.errors:
        lines.append(f"Errors: {reasons(done.counts.errors)}.")
    if done.skipped:
        lines.append(f"{done.skipped:,} files of the input are no images and were left out.")
    return "\n".join(lines)
