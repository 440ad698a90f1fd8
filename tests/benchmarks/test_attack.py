"""The attacks: what counts as met, the health probe, and all cases in their short form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common
from benchmarks.attack.__main__ import attack, kept, main
from benchmarks.attack.case import CASES, Case, Value, share, true
from benchmarks.attack.probe import Health

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("value", "met"),
    [
        (Value("a", 2.0, "s", 2), True),
        (Value("a", 2.1, "s", 2), False),
        (Value("a", float("inf"), "s", 2), False),
        (Value("a", 2.0, "", 2, at_least=True), True),
        (Value("a", 1.9, "", 2, at_least=True), False),
        (Value("a", 99.0), True),
        (share("calls", 12, 12), True),
        (share("calls", 11, 12), False),
        (true("it holds", False), False),
    ],
)
def test_a_figure_meets_its_bound_or_not(value: Value, met: bool) -> None:
    assert value.met is met
    assert (value.row()["met"] == "**no**") is not met


def test_a_case_that_breaks_down_is_a_miss() -> None:
    def broken(short: bool) -> list[Value]:
        raise RuntimeError("no server")

    (row,) = attack(Case("broken", "nothing", "-", broken), True)
    assert row["met"] == "**no**"
    assert "RuntimeError" in row["what"]


def test_the_health_of_no_moment_is_left_out() -> None:
    health = Health([0.001] * 98 + [0.5] * 2)
    assert health.percentile_ms(50) == pytest.approx(1)
    assert health.percentile_ms(99) == pytest.approx(500)


@pytest.fixture
def one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registered case that takes no time, and a folder for results."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)

    def run(short: bool) -> list[Value]:
        return [Value("seconds", 3.0 if short else 1.0, "s", 2)]

    monkeypatch.setitem(CASES, "quick", Case("quick", "nothing", "-", run))
    return tmp_path


@pytest.mark.usefixtures("one_case")
def test_the_exit_code_tells_of_a_miss() -> None:
    assert main(["quick"]) == 0
    assert main(["quick", "--short"]) == 1


def test_cases_that_are_not_run_keep_their_figures(one_case: Path) -> None:
    rows: list[dict[str, Any]] = [{"case": name, "what": "kept"} for name in ("unread", "quick")]
    rows.append({"case": "of the past", "what": "gone"})
    (one_case / "attack.json").write_text(json.dumps({"rows": rows}))
    assert [row["case"] for row in kept(["quick"])] == ["unread"]
    assert main(["quick"]) == 0
    found = json.loads((one_case / "attack.json").read_text())["rows"]
    assert [(row["case"], row["what"]) for row in found] == [
        ("unread", "kept"),
        ("quick", "seconds"),
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("ordinary-call", "no-attack")]
)
def test_an_attack_in_its_short_form(name: str, tmp_path: Path) -> None:
    """Without bounds on time and memory, which depend on the machine: only what holds on any."""
    words = [sys.executable, "-m", "benchmarks.attack", "--short", "--results", tmp_path, name]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    rows = json.loads((tmp_path / "attack.json").read_text())["rows"]
    certain = [row for row in rows if row["wanted"].split(" ")[-1] not in ("s", "ms", "MiB", "×")]
    assert certain, done.stderr
    assert [row for row in certain if row["met"] == "**no**"] == [], done.stderr
