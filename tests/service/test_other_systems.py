"""The reference engine where LMDeploy and Linux's own interfaces are missing, as on a Mac."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = "examples/drawings/samples/night-desert.png"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QWEN3VL_")}
    folder = Path(__file__).parent / "other_system"
    environment |= {"PYTHONPATH": f"{folder}:{ROOT}", "QWEN3VL_PORT": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_system_lacks_what_it_should() -> None:
    code = "import importlib.util, os; print(importlib.util.find_spec('lmdeploy'), hasattr(os, 'sched_getaffinity'))"
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("None False\n", "")


@pytest.mark.slow
def test_lmdeploy_is_refused_with_the_way_out() -> None:
    done = python("-m", "service", "check", "--engine", "lmdeploy", "--model", "some/checkpoint")
    assert done.returncode == 1
    assert "engine    FAILED: --engine (QWEN3VL_ENGINE): LMDeploy is not installed." in done.stderr
    assert "Use --engine reference" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["serve", "verify"])
def test_the_extension_says_that_lmdeploy_is_missing(command: str) -> None:
    done = python("-m", "lmdeploy_ext", command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("LMDeploy ")
    assert len(done.stderr.splitlines()) == 1


def test_a_worker_without_a_limit_of_its_address_space_ends_above_the_bound() -> None:
    code = (
        "import time; from service.structured_output import worker; worker.MEMORY_BYTES = 1 << 20; "
        "worker._limit_memory(); time.sleep(30)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (1, "grammar worker: takes too much memory and ends\n")


@pytest.mark.slow
def test_the_reference_engine_runs_and_is_checked() -> None:
    done = python("-m", "service", "check")
    assert done.returncode == 0, done.stderr
    assert "drawings on the reference engine" in done.stdout
    assert "constrained tokens about an image" in done.stdout


@pytest.mark.slow
def test_an_answer_fits_its_schema() -> None:
    schema = ROOT / "examples/schemas/objects.json"
    prompt = "List every object with its position, shape, color and size."
    run = ("run", "--local", "--schema", str(schema), "--prompt", prompt, SAMPLE)
    done = python("-m", "service", *run)
    assert done.returncode == 0, done.stderr
    assert [one["shape"] for one in json.loads(done.stdout)["objects"]] == [
        "star",
        "cross",
        "triangle",
    ]
