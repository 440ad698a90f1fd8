"""What the test commands and CI run: every test in some ring, and nothing too long for CI in it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from _pytest.mark.expression import Expression
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import multiply_examples

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
CI = ("test", "test-host")
MARKERS = [
    set(),
    {"slow"},
    {"slow", "host"},
    {"slow", "host", "parity"},
    {"slow", "hypothesis"},
    {"hypothesis"},
]
"""Markers that tests without ``long`` and ``gpu`` have together."""


def expressions(target: str) -> list[Expression]:
    """The ``-m`` of every pytest command of a target."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found is not None
    return [Expression.compile(text) for text in re.findall(r'-m "?([^"\n]+)"?', found[1])]


def runs(target: str, markers: set[str]) -> bool:
    return any(one.evaluate(lambda name, **_: name in markers) for one in expressions(target))


@pytest.mark.parametrize(
    "markers", MARKERS, ids=lambda markers: ", ".join(sorted(markers)) or "none"
)
def test_ci_runs_every_test_once_unless_it_is_long(markers: set[str]) -> None:
    assert [runs(target, markers) for target in CI].count(True) == 1
    rings = [*CI, "test-fast"]
    assert not any(runs(target, {*markers, "long"}) for target in rings)
    assert runs("test-slow", {*markers, "long"})


def test_ci_runs_the_fast_and_the_host_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = script.read_text().splitlines()
    assert [f"make {target}" in lines for target in ("lint", *CI)] == [True] * 3


def test_property_tests_try_more_examples() -> None:
    tried = []

    @settings(max_examples=10, database=None)
    @given(st.integers())
    def prop(number: int) -> None:
        tried.append(number)

    multiply_examples(prop, 20)
    prop()
    assert len(tried) == 200


@pytest.mark.slow
def test_the_option_reaches_property_tests(tmp_path: Path) -> None:
    """Through pytest, with the conftest of this project; a test of several cases is multiplied once."""
    (tmp_path / "test_one.py").write_text(
        "import pytest\nfrom hypothesis import given, settings, strategies as st\n"
        "tried = []\n"
        "@pytest.mark.parametrize('case', [1, 2])\n"
        "@settings(max_examples=7, database=None)\n"
        "@given(number=st.integers())\n"
        "def test_one(case, number):\n    tried.append(number)\n"
        "def test_two():\n    assert len(tried) == 2 * 3 * 7\n"
    )
    options = [
        "-p",
        "tests.conftest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *options,
            "--examples-times",
            "3",
            tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# GitHub


def workflow() -> dict[str, Any]:
    return yaml.load((ROOT / ".github" / "workflows" / "ci.yml").read_text(), yaml.BaseLoader)


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def pythons(job: dict[str, Any]) -> list[str]:
    (step,) = (one for one in job["steps"] if "setup-python" in one.get("uses", ""))
    assert step["with"]["cache"] == "pip"
    version = step["with"]["python-version"]
    return job["strategy"]["matrix"]["python"] if "matrix" in version else [version]


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = workflow()["jobs"]
    assert commands(jobs["full"]) == [".ci/run"]
    assert commands(jobs["fast"]) == ["make setup", "make test-fast"]
    assert {job["runs-on"] for job in jobs.values()} == {"ubuntu-latest"}
    assert jobs["full"]["timeout-minutes"] == "90"
    assert {"push", "pull_request"} <= workflow()["on"].keys()


def test_the_workflow_runs_the_oldest_and_the_newest_python() -> None:
    (lowest, above) = re.findall(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )[0]
    jobs = workflow()["jobs"]
    assert pythons(jobs["full"]) == ["3.11"]
    assert pythons(jobs["fast"]) == [f"3.{lowest}", f"3.{int(above) - 1}"]
