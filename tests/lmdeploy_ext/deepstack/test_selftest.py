"""The self-test before the first engine: what it finds, what it remembers, what follows. On the host runtime."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_ext.deepstack import library, modes, selftest
from lmdeploy_ext.deepstack.selftest import VARIABLE
from lmdeploy_ext.deepstack.state import STATE, Mode, Status, status
from tests.host_runtime.runner import run

# ---- what is remembered: no LMDeploy ----------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a GPU, on which tests are counted and pass unless told otherwise."""
    import torch

    state: dict[str, Any] = {
        "name": "GPU A",
        "problem": None,
        "runs": 0,
        "driver": tmp_path / "driver",
    }

    def test() -> str | None:
        state["runs"] += 1
        problem: str | None = state["problem"]
        return problem

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: state["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(selftest, "run", test)
    monkeypatch.setattr(selftest, "version", lambda name: state.get("release", "0.18.0"))
    monkeypatch.setattr(selftest, "_DRIVER", state["driver"])
    monkeypatch.setattr(selftest, "_passed", set())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return state


def test_the_self_test_runs_once_per_machine(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [selftest.check(), selftest.check()] == [None, None]
    monkeypatch.setattr(selftest, "_passed", set())  # as in another process
    assert selftest.check() is None
    assert machine["runs"] == 1


@pytest.mark.parametrize("change", ["name", "driver", "release", "hook"])
def test_a_changed_dependency_repeats_the_self_test(
    machine: dict[str, Any], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    selftest.check()
    if change == "driver":
        machine["driver"].write_text("NVRM version: another")
    elif change == "hook":
        monkeypatch.setattr(library, "file_name", lambda: "hook-another.so")
    else:
        machine[change] = "another"
    selftest.check()
    assert machine["runs"] == 2


def test_a_failed_self_test_is_repeated_at_the_next_start(machine: dict[str, Any]) -> None:
    machine["problem"] = "wrong"
    assert [selftest.check(), selftest.check()] == ["wrong", "wrong"]
    machine["problem"] = None
    assert selftest.check() is None
    assert machine["runs"] == 3


def test_the_variable_skips_or_forces_the_self_test(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert selftest.check() is None
    assert machine["runs"] == 0
    monkeypatch.setenv(VARIABLE, "force")
    selftest.check()
    selftest.check()
    assert machine["runs"] == 2


def test_a_crash_of_the_self_test_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def dies(command: list[str], *, stdout: Any, **rest: Any) -> subprocess.CompletedProcess[str]:
        assert rest["env"][VARIABLE] == "off"
        stdout.write(b"loading\nout of memory\n")
        stdout.flush()
        return subprocess.CompletedProcess(command, -6)

    monkeypatch.setattr(subprocess, "run", dies)
    with caplog.at_level(logging.ERROR, "lmdeploy_ext"):
        assert selftest.run() == "the self-test ended with -6: out of memory"
    assert "loading" in caplog.text


def test_a_failed_self_test_turns_deepstack_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, wanted in ((Mode.AUTO, "wrong"), (Mode.REQUIRE, "wrong")):
        monkeypatch.setattr(STATE, "status", Status(mode, True, ""))
        monkeypatch.setattr(selftest, "check", lambda: "wrong")
        monkeypatch.setattr(selftest, "running", lambda: False)
        monkeypatch.setattr(
            modes, "hook", lambda: type("Hook", (), {"detach": lambda self: None})()
        )
        assert selftest.verify() == wanted
        assert status() == Status(mode, False, "wrong")
        assert selftest.verify() == wanted, "and stays so"
    monkeypatch.setattr(STATE, "status", Status(Mode.OFF, False, "switched off"))
    assert selftest.verify() is None


# ---- on the stock module ---------------------------------------------------------------------------


def _sound(checkpoint: str) -> dict[str, Any]:
    """Choose an engine for a checkpoint as LMDeploy does, and start TurboMind."""
    import lmdeploy_ext

    lmdeploy_ext.install("auto")
    from lmdeploy.archs import autoget_backend

    seen: dict[str, Any] = {"backend": autoget_backend(checkpoint)}
    selftest._passed.clear()  # as in another process

    def run_again() -> str:
        raise AssertionError("it has passed")

    selftest.run = run_again  # type: ignore[assignment]
    from tests.host_runtime import engines

    engines.turbomind(checkpoint)
    return {**seen, "active": status().active}


@pytest.mark.slow
@pytest.mark.host
def test_a_sound_machine_passes_once(loud: Callable[..., Path], tmp_path: Path) -> None:
    extra = {VARIABLE: "", "XDG_CACHE_HOME": str(tmp_path)}
    assert run(_sound, loud(), mode="numbers", extra=extra) == {
        "backend": "turbomind",
        "active": True,
    }
    assert len(list((tmp_path / "qwen3vl-lmdeploy-ext").glob("selftest-*"))) == 1


def _broken(checkpoint: str) -> list[dict[str, Any]]:
    """The same on a build where features reach the hook and not the model, in two modes."""
    import lmdeploy_ext
    from tests.host_runtime import engines

    selftest._TRIAL = "tests.lmdeploy_ext.deepstack.broken_trial"
    found = []
    for mode in ("auto", "require"):
        lmdeploy_ext.install(mode)
        from lmdeploy.archs import autoget_backend

        seen: dict[str, Any] = {"backend": autoget_backend(checkpoint)}
        try:
            engines.turbomind(checkpoint)
        except Exception as error:
            seen["error"] = str(error)
        found.append({**seen, "active": status().active, "reason": status().reason})
        lmdeploy_ext.uninstall()
    return found


@pytest.mark.slow
@pytest.mark.host
def test_a_broken_hook_is_caught(loud: Callable[..., Path], tmp_path: Path) -> None:
    extra = {VARIABLE: "", "XDG_CACHE_HOME": str(tmp_path)}
    auto, require = run(_broken, loud(), mode="numbers", extra=extra)
    for found in (auto, require):
        assert not found["active"]
        assert "of 8 answers of a random model are not those of transformers" in found["reason"]
        assert "cannot be given DeepStack" in found["error"]
        assert "--backend pytorch" in found["error"]
    assert auto["backend"] == "pytorch"
    assert require["backend"] == "turbomind", "never another engine without a word"
    assert not list((tmp_path / "qwen3vl-lmdeploy-ext").glob("selftest-*")), "it is tried again"


def _with_faults(folder: str, faults: list[str]) -> dict[str, str | None]:
    from lmdeploy_ext.deepstack import features, trial
    from tests.host_runtime import engines
    from tests.lmdeploy_ext.deepstack.faults import FAULTS

    trial.write_model(Path(folder))
    asked = trial.prompts()
    found = {}
    for fault in faults:
        with FAULTS[fault](features, features.Features._add):
            given = trial.answers(Path(folder), asked)
        found[fault] = trial.compare(Path(folder), asked, given)
        engines._alive.append(trial._alive[-1])
        asyncio.run(engines.stop(trial._alive.pop()))
    return found


@pytest.mark.slow
@pytest.mark.host
def test_subtle_faults_are_caught(tmp_path: Path) -> None:
    from tests.lmdeploy_ext.deepstack.faults import FAULTS

    found = run(_with_faults, tmp_path, list(FAULTS), mode="numbers", timeout_s=280)
    assert len(found) == len(FAULTS)
    assert {fault for fault, problem in found.items() if problem is None} == set()
