"""The runner and the report of the benchmarks; what is measured is not tested here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as runner
from benchmarks.common import environment
from benchmarks.plot import PLOT, cases
from benchmarks.report import read_results, write_report
from benchmarks.targets import TARGETS, Target

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def sample(median: float, low: float, high: float) -> dict[str, float]:
    return {"median": median, "min": low, "max": high, "rounds": 3}


def mrope(ratio: float) -> dict[str, Any]:
    """Content of mrope.json with one case of the target's size."""
    seconds = {"transformers": sample(ratio, 0.9 * ratio, 2 * ratio), "ours": sample(1, 0.5, 2)}
    row = {"tokens": 16384, "images": 8, "times faster": ratio, "seconds": seconds}
    return {"benchmark": "mrope", "notes": "A note.", "environment": environment(), "rows": [row]}


def written(folder: Path, **results: dict[str, Any]) -> str:
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return write_report(folder).read_text()


def line(text: str, start: str) -> str:
    (found,) = [one for one in text.splitlines() if one.startswith(start)]
    return found


@pytest.mark.parametrize(("ratio", "met"), [(20.0, "yes"), (19.9, "**no**"), (400.0, "yes")])
def test_targets_with_lower_and_upper_bounds(ratio: float, met: str, tmp_path: Path) -> None:
    text = written(tmp_path, mrope=mrope(ratio))
    assert line(text, "| [mrope]").endswith(f"| ≥ 20× | {ratio:.3g}× | {met} |")


def test_benchmarks_without_results_are_reported_as_not_measured(tmp_path: Path) -> None:
    text = written(tmp_path, mrope=mrope(30.0))
    for target in TARGETS:
        if target.benchmark != "mrope":
            assert f"| {target.text} | {target.wanted()} | not measured | - |" in text


def test_the_report_shows_the_noise_of_each_benchmark(tmp_path: Path) -> None:
    assert "| 4.00× |" in line(written(tmp_path, mrope=mrope(30.0)), "| mrope |")


def test_the_worst_row_counts_unless_the_target_takes_the_best() -> None:
    rows = [{"x": 1.0}, {"x": 3.0}]
    bounds = {"bound": 2.0, "rows": lambda row: True, "value": lambda row: row["x"]}
    more = Target("b", "t", **bounds)
    less = Target("b", "t", **bounds, at_least=False)
    assert (more.measured(rows), less.measured(rows)) == (1.0, 3.0)
    assert (more.met(1.0), less.met(3.0)) == (False, False)
    best_more = Target("b", "t", **bounds, best=True)
    best_less = Target("b", "t", **bounds, best=True, at_least=False)
    assert (best_more.measured(rows), best_less.measured(rows)) == (3.0, 1.0)
    assert more.measured([]) is None


def test_a_target_without_a_bound_is_only_shown() -> None:
    shown = Target("b", "t", lambda row: True, lambda row: row["x"], None, unit="%")
    assert (shown.met(3.0), shown.wanted(), shown.shown(3.0)) == (None, "-", "3 %")


@pytest.mark.parametrize(("schemas", "met"), [(1057, "yes"), (1056, "**no**")])
def test_one_command_shows_the_targets_of_schemas(
    schemas: int, met: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    row = {
        "engine": "ours", "schemas": 1089, "exact": 1000, "accepts invalid": 0, "rejects valid": 85,
        "served": 1085, "OK answers invalid": 0,
        "enforced": schemas, "enforced by the grammar alone": 964, "enforced, yet accepts invalid": 0,
        "rightly unsatisfiable": 0, "refused": 4,
        "refused without reason and place": 0, "timeouts": 0, "crashes": 0,
        "compile p50 ms": 5.0, "compile p99 ms": 200.0, "compile max ms": 900.0,
    }  # fmt: skip
    stored = {"benchmark": "maskbench", "notes": "-", "environment": environment(), "rows": [row]}
    (tmp_path / "maskbench.json").write_text(json.dumps(stored))
    assert runner.main(["schemas", "--report", "--results", str(tmp_path)]) == 0
    text = capfd.readouterr().out
    enforced = line(text, "| [maskbench](#grammars-from-schemas) | schemas that are ENFORCED")
    assert enforced.endswith(f"| ≥ 97 % | {100 * schemas / 1089:.3g} % | {met} |")
    assert line(
        text, "| [maskbench](#grammars-from-schemas) | the same by the grammar alone"
    ).endswith("| - | 88.5 % | - |")
    of_schemas = [one for one in TARGETS if one.benchmark in runner.GROUPS["schemas"]]
    assert text.count("\n| ") == len(of_schemas) + 1
    assert "mrope" not in text


def test_the_same_results_give_the_same_plot(tmp_path: Path) -> None:
    written(tmp_path, mrope=mrope(30.0))
    first = (tmp_path / PLOT).read_bytes()
    assert ET.fromstring(first).tag.endswith("svg")
    assert b"16384 tokens, images: 8" in first
    written(tmp_path, mrope=mrope(30.0))
    assert (tmp_path / PLOT).read_bytes() == first


def test_without_results_there_is_a_report_and_no_plot(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert "not measured" in text
    assert PLOT not in text
    assert not (tmp_path / PLOT).exists()


def test_every_stored_comparison_is_in_the_plot() -> None:
    results = read_results(RESULTS)
    compared = {case.benchmark for case in cases(results)}
    alone = {
        "call_metrics", "cold_start", "deepstack_hook", "maskbench", "large_vocabulary", "schema_answers",
        "schema_answers_http", "remote_accuracy", "remote_validity", "remote_overhead", "ray_overhead",
        "batch", "batch_speed", "goodput", "lengths",
        "fuzzed_schemas", "attack", "soak", "lowering_features", "http_overhead",
    }  # fmt: skip
    assert compared == results.keys() - alone


def test_the_stored_report_is_that_of_the_stored_results(tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    assert write_report(tmp_path).read_text() == (RESULTS / "README.md").read_text()


def test_a_benchmark_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "BENCHMARKS", ("nothing", "common"))
    code = runner.main(["--quick", "--results", str(tmp_path)])
    out, err = capfd.readouterr()
    assert code == 1
    assert "== nothing: FAILED with exit code 1" in out
    assert "== common: done" in out
    assert err.endswith("Failed: nothing\n")


def test_an_unknown_name_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        runner.main(["mropes"])
    assert left.value.code == 2
    assert "no benchmark mropes; there are mrope, " in capfd.readouterr().err


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", runner.BENCHMARKS)
def test_every_benchmark_runs(name: str, tmp_path: Path) -> None:
    stored = RESULTS / f"{name}.json"
    before = stored.read_bytes() if stored.exists() else None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--results", str(tmp_path), name],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"== {name}: done" in done.stdout
    assert (tmp_path / "README.md").is_file()
    assert (stored.read_bytes() if stored.exists() else None) == before
