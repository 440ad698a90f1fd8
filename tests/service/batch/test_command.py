"""`qwen3vl batch` as a process, on a local Ray."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("pyarrow", reason="the extra batch is not installed")
import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from service.cli.app import app
from tests.service.batch.inputs import damaged, drawing, write_parquet

# Not imported: Ray reads its environment at its import, which comes after CONNECTION has prepared it.
if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra batch is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[3]
LIMIT_S = 600
pytestmark = pytest.mark.timeout(
    1200
)  # some tests start Ray several times, on machines that may be busy
PROMPT = ("--prompt", "What is it?", "--set", "engine=fake")
BEGUN: list[subprocess.Popen[str]] = []
"""Commands of the test that runs."""


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """A test that fails leaves no command behind, which would slow the tests after it."""
    yield
    while BEGUN:
        process = BEGUN.pop()
        if process.poll() is None:
            process.kill()  # its Ray ends with it
            process.wait()


def begin(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start the command, as the leader of a process group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "batch", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    BEGUN.append(process)
    return process


def batch(*words: object, code: int = 0) -> str:
    """Run the command to its end. Returns what it wrote to stderr; stdout stays empty."""
    process = begin(*words)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (code, ""), err
    return err


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < LIMIT_S
        time.sleep(0.02)


def parts(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.glob("part-*"))


def rows_in(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder).to_pylist()
    return rows


@pytest.mark.slow
def test_a_batch_from_its_start_to_its_end(tmp_path: Path) -> None:
    """One run that is interrupted, and one that goes on. Ray is silent."""
    images: list[bytes | None] = [drawing(number) for number in range(30)]
    images[4:4] = [*damaged().values(), None]
    write_parquet(tmp_path / "in.parquet", images)
    words = (
        tmp_path / "in.parquet",
        tmp_path / "out",
        "--task",
        "image-analysis",
        "--shard-rows",
        8,
    )
    process = begin(*words)
    wait_until(lambda: parts(tmp_path / "out"), process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does on a terminal
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, err
    assert "The same command goes on" in err
    before = {
        name: (tmp_path / "out" / name).stat().st_mtime_ns for name in parts(tmp_path / "out")
    }

    err = batch(*words)
    assert "35 rows are in" in err
    assert not [line for line in err.splitlines() if "ray" in line.lower() or "Traceback" in line]
    after = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in parts(tmp_path / "out")}
    assert len(after) == 5
    assert {name: after[name] for name in before} == before
    rows = rows_in(tmp_path / "out")
    assert sorted(row["id"] for row in rows) == list(range(35))
    reasons = {row["id"]: row["error_reason"] for row in rows if row["error_reason"]}
    assert reasons == dict(enumerate([*damaged(), "IMAGE_EMPTY"], start=4))
    assert all(row["tags"] for row in rows if row["id"] not in reasons)

    assert "This run" not in batch(*words)  # nothing is left to do


@pytest.mark.long
def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", [drawing(0)])
    words = (tmp_path / "in.parquet", tmp_path / "out", "--task", "image-analysis")
    err = batch(*words, "--set", f"model={tmp_path}", code=1)
    assert err.splitlines()[-1].startswith("qwen3vl batch: ")
    assert "config.json" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("in.parquet", "in.parquet/out", *PROMPT), "inside of the input"),
        (("nothing", "out", *PROMPT), "no file or folder"),
        (("in.parquet", "out", "--task", "nothing"), "UNKNOWN_TASK"),
        (("in.parquet", "out", *PROMPT, "--path-column", "id"), "not paths"),
        (("in.parquet", "out", *PROMPT, "--set", "port=1"), "no port"),
        (("in.parquet", "out", *PROMPT, "--set", "max_image_pixels=x"), "--max-image-pixels"),
        (("in.parquet", "out"), "--prompt or --task"),
    ],
)
@pytest.mark.slow
def test_wrong_use(tmp_path: Path, words: Sequence[str], text: str) -> None:
    write_parquet(tmp_path / "in.parquet", [drawing(0)])
    places = [str(tmp_path / word) for word in words[:2]]
    done = CliRunner().invoke(app, ["batch", *places, *words[2:]])
    assert done.exit_code in (1, 2)
    assert text in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.long
def test_more_gpus_than_there_are(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", [drawing(0)])
    err = batch(tmp_path / "in.parquet", tmp_path / "out", *PROMPT, "--gpus", "1000", code=1)
    assert "1 actors with 1000 GPU each need 1000, and Ray has" in err


def actors(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of engines below a run."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "ShardActor" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.long
def test_killed_at_any_moment_no_row_is_lost_or_doubled(tmp_path: Path) -> None:
    """SIGKILL of the whole run, many times at moments of chance, then a run to the end."""
    count, chance = 400, random.Random(21)
    write_parquet(
        tmp_path / "in.parquet", [drawing(n) if n % 20 else b"x" for n in range(count)], 50
    )
    words = (
        tmp_path / "in.parquet",
        tmp_path / "out",
        "--task",
        "image-analysis",
        "--shard-rows",
        16,
    )
    for _ in range(6):
        process = begin(*words)
        known = len(parts(tmp_path / "out"))
        wait_until(lambda known=known: len(parts(tmp_path / "out")) > known, process)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 2))
        process.kill()
        process.communicate()
    assert len(parts(tmp_path / "out")) < count // 16
    batch(*words)
    rows = rows_in(tmp_path / "out")
    assert Counter(row["id"] for row in rows) == Counter(range(count))
    assert {row["id"] for row in rows if row["error_reason"]} == set(range(0, count, 20))
    assert not list((tmp_path / "out").glob(".part*"))


@pytest.mark.long
def test_the_process_of_an_engine_is_started_again(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in.parquet", [drawing(number) for number in range(100)])
    process = begin(
        tmp_path / "in.parquet", tmp_path / "out", "--task", "image-analysis", "--shard-rows", 10
    )
    wait_until(lambda: parts(tmp_path / "out"), process)
    (engine,) = actors(process)
    engine.kill()
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    rows = rows_in(tmp_path / "out")
    assert Counter(row["id"] for row in rows) == Counter(range(100))


DIES = """
import os, sys

class Dies:
    def find_spec(self, name, path=None, target=None):
        if name == "service.engines.reference.model":
            os._exit(9)

sys.meta_path.insert(0, Dies())
"""
"""Ends a process that loads the weights of the reference engine, as a defect in a library would."""


@pytest.mark.long
def test_an_engine_that_always_dies_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DIES)
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    write_parquet(tmp_path / "in.parquet", [drawing(0)])
    process = begin(
        tmp_path / "in.parquet",
        tmp_path / "out",
        "--task",
        "image-analysis",
        env={**os.environ, "PYTHONPATH": path},
    )
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, err
    assert "engines were started more than 4 times and no shard was finished" in err


@pytest.mark.long
def test_a_pipeline_of_somebody_else(tmp_path: Path) -> None:
    """The program of docs/batch.md."""
    from tests.pages import blocks

    (program,) = blocks((ROOT / "docs/batch.md").read_text(), "python")
    write_parquet(tmp_path / "images.parquet", [drawing(0), b"x"])
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=LIMIT_S, env={
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    })  # fmt: skip
    (first, second) = sorted(rows_in(tmp_path / "answers"), key=lambda row: row["id"])
    assert first["json"]
    assert second["error_reason"] == "IMAGE_FORMAT_UNSUPPORTED"
    assert pa.types.is_int32(
        pq.read_schema(next((tmp_path / "answers").iterdir())).field("output_tokens").type
    )
