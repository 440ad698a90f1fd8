"""The soak: how the trend of memory is found, and a short soak of the real server."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.__main__ import MEMORY, summary
from benchmarks.soak.kinds import KINDS
from benchmarks.soak.load import Material, World, once
from benchmarks.soak.samples import growth_percent, last_line, minutes, plot

ROOT = Path(__file__).parents[2]
COUNTED = ("descriptors", "threads", "workers", "tasks", "calls", "slots", "queued", "metric_lines")


def samples(memory: Any, count: int = 360) -> list[dict[str, float]]:
    """One every 5 s; memory: a function of the minute."""
    found = []
    for number in range(count):
        minute = number / 12
        value = memory(minute)
        row = {"minute": minute, **dict.fromkeys(MEMORY, value)}
        found.append({**row, **dict.fromkeys(COUNTED, 1.0)})
    return found


@pytest.mark.parametrize(("per_minute", "wanted"), [(0.0, 0.0), (1.0, 3.0), (-0.5, -1.5)])
def test_growth_is_the_trend_in_percent(per_minute: float, wanted: float) -> None:
    rows = samples(lambda minute: 1000 + per_minute * (minute - 5.5))
    points = minutes(rows, "pss_mib", 5)
    assert len(points) == 25
    assert growth_percent(points, 30) == pytest.approx(wanted, abs=0.01)


def test_growth_does_not_follow_a_few_large_images() -> None:
    rng = random.Random(1)
    rows = samples(lambda minute: 1000 + (500 if int(minute) in (9, 27) else rng.random()))
    assert growth_percent(minutes(rows, "pss_mib", 5), 30) == pytest.approx(0, abs=0.1)


def test_a_short_run_has_no_trend() -> None:
    assert growth_percent(minutes(samples(lambda _: 1.0, 12 * 7), "pss_mib", 5), 30) is None


@pytest.mark.parametrize(("per_minute", "problems"), [(0.2, 0), (0.5, 1)])
def test_growth_above_one_percent_is_a_problem(per_minute: float, problems: int) -> None:
    _, found = summary(samples(lambda minute: 1000 + per_minute * minute), 5)
    assert len(found) == problems


@pytest.mark.slow
def test_the_plot_is_an_image(tmp_path: Path) -> None:
    plot(samples(lambda minute: 1000 + minute), tmp_path / "soak.svg", "A title")
    text = (tmp_path / "soak.svg").read_text()
    assert "<svg" in text


def test_a_half_written_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "probe"
    path.write_text('{"tasks": 1}\n{"tasks": 2}\n{"tas')
    assert last_line(path) == {"tasks": 2}


@pytest.fixture(scope="module")
def material() -> Material:
    return Material([b""], [b""], {"text": b"x"}, ["{}"])


@pytest.mark.parametrize(
    ("end", "ok", "failures"),
    [
        (None, True, 0),
        (None, False, 1),
        (ValueError("not JSON"), True, 1),
        (TimeoutError(), True, 1),
    ],
)
async def test_an_end_that_a_kind_does_not_allow_is_a_failure(
    end: Exception | None, ok: bool, failures: int, material: Material
) -> None:
    async def something(_: World) -> None:
        if end is not None:
            raise end

    nothing: Any = None
    world = World(
        "127.0.0.1:1", 1, "key", Path(), nothing, material, random.Random(1), nothing
    )  # fmt: skip
    await once(world, type(KINDS[0])(something, 1, ok=ok))
    assert len(world.failures) == failures
    assert world.counts["something"].total() == 1


@pytest.mark.long
def test_a_short_soak(tmp_path: Path) -> None:
    """All kinds of calls, killed workers and replaced keys on the real command."""
    words = ["--minutes", "1", "--kill-every-s", "7", "--rotate-every-s", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *words, "--results", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "soak.json").read_text())["rows"]}
    assert rows["problems"]["value"] == "none"
    names = {f"calls: {kind.run.__name__.replace('_', ' ')}" for kind in KINDS}
    assert sorted(names - set(rows)) == []
    assert (tmp_path / "soak.svg").exists()
