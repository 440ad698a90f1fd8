"""auto, require and off on the real LMDeploy module, which loads on a driver without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_ext.deepstack import DeepStackUnavailable, Mode, modes
from lmdeploy_ext.deepstack.modes import VARIABLE
from lmdeploy_ext.deepstack.state import STATE, Status, status
from tests.host_runtime.runner import environment, run

ROOT = Path(__file__).parents[3]


def test_argument_comes_before_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert modes.chosen(None) is Mode.AUTO
    monkeypatch.setenv(VARIABLE, " Require ")
    assert modes.chosen(None) is Mode.REQUIRE
    assert modes.chosen("off") is Mode.OFF
    monkeypatch.setenv(VARIABLE, "")
    assert modes.chosen(None) is Mode.AUTO


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "maybe")
    with pytest.raises(DeepStackUnavailable, match="'maybe' is not one of auto, require, off"):
        modes.chosen(None)


def test_off_is_never_shown_as_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(STATE, "status", Status())
    found = modes.enter(Mode.OFF)
    assert found == status() == Status(Mode.OFF, False, f"switched off ({VARIABLE}=off)")
    assert "DeepStack is off" in caplog.text
    assert not modes.fell_back()
    modes.check_unchanged(Mode.OFF)
    for other in (Mode.AUTO, Mode.REQUIRE):
        with pytest.raises(DeepStackUnavailable, match=f"asked for as '{other.value}'.* 'off'"):
            modes.check_unchanged(other)
    modes.leave()
    assert status() == Status()


@pytest.mark.parametrize(
    ("found", "fits"),
    [
        (Status(Mode.AUTO, True, ""), {Mode.AUTO, Mode.REQUIRE}),
        (Status(Mode.REQUIRE, True, ""), {Mode.AUTO, Mode.REQUIRE}),
        (Status(Mode.AUTO, False, "no compiler"), {Mode.AUTO, Mode.OFF}),
    ],
)
def test_another_mode_fits_where_its_effect_is_the_same(
    monkeypatch: pytest.MonkeyPatch, found: Status, fits: set[Mode]
) -> None:
    monkeypatch.setattr(STATE, "status", found)
    assert modes.fell_back() is (found.mode is Mode.AUTO and not found.active)
    for wanted in Mode:
        if wanted in fits:
            modes.check_unchanged(wanted)
        else:
            with pytest.raises(DeepStackUnavailable, match="already installed"):
                modes.check_unchanged(wanted)


# What follows needs the real LMDeploy: each function without a test's name runs in a child.


def _state() -> dict[str, Any]:
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS

    import lmdeploy_ext
    from lmdeploy_ext.deepstack import status
    from lmdeploy_ext.patch import applied

    return {
        "active": status().active, "mode": status().mode.value if status().mode else None,
        "reason": status().reason, "offered": "Qwen3VLForConditionalGeneration" in SUPPORTED_ARCHS,
        "installed": lmdeploy_ext.is_installed(), "records": len(applied()),
    }  # fmt: skip


def _bind_and_back(mode: str) -> list[Any]:
    import lmdeploy.turbomind  # before install: the order does not matter

    import lmdeploy_ext
    from lmdeploy_ext.deepstack.binding import hook

    assert lmdeploy.turbomind.is_available()
    seen: list[Any] = []
    lmdeploy_ext.install(mode)
    seen.append([_state(), hook().bound()])
    lmdeploy_ext.install()
    lmdeploy_ext.install("auto")
    seen.append([_state(), hook().bound()])
    lmdeploy_ext.uninstall()
    seen.append([_state(), hook().bound()])
    lmdeploy_ext.install(mode)
    seen.append([_state(), hook().bound()])
    return seen


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize("mode", ["auto", "require"])
@pytest.mark.parametrize("bind_now", ["", "1"])
def test_the_calls_of_the_stock_wheel_are_taken_over(mode: str, bind_now: str) -> None:
    installed, twice, removed, again = run(
        _bind_and_back, mode, mode="driver", extra={"LD_BIND_NOW": bind_now}
    )
    state, bound = installed
    assert bound == 4, "each of the four functions is called through one slot"
    assert state["active"]
    assert state["mode"] == mode
    assert state["offered"]
    assert twice == installed
    assert removed[1] == 0
    assert removed[0]["mode"] is None
    assert not removed[0]["offered"]
    assert again == installed


def _install_without_a_library(mode: str) -> dict[str, Any]:
    import lmdeploy_ext

    error = ""
    try:
        lmdeploy_ext.install(mode)
        lmdeploy_ext.install()
    except lmdeploy_ext.deepstack.DeepStackUnavailable as raised:
        error = str(raised)
    state = _state()
    lmdeploy_ext.uninstall()
    return {**state, "error": error, "after": _state()["records"]}


def _without_a_library(mode: str, folder: Path) -> dict[str, Any]:
    extra = {"CC": "no-such-compiler", "XDG_CACHE_HOME": str(folder)}
    found: dict[str, Any] = run(_install_without_a_library, mode, mode="driver", extra=extra)
    return found


@pytest.mark.slow
@pytest.mark.host
def test_auto_falls_back_to_the_pytorch_engine(tmp_path: Path) -> None:
    state = _without_a_library("auto", tmp_path)
    assert not state["error"]
    assert not state["active"]
    assert not state["offered"], "LMDeploy then takes its PyTorch engine"
    assert not state["installed"]
    assert state["records"] > 0, "refusals of what is not text are still in force"
    assert "no-such-compiler" in state["reason"]
    assert state["after"] == 0


@pytest.mark.slow
@pytest.mark.host
def test_require_raises_if_deepstack_is_unavailable(tmp_path: Path) -> None:
    state = _without_a_library("require", tmp_path)
    assert "no-such-compiler" in state["error"]
    assert f"{VARIABLE}=auto" in state["error"]
    assert not state["offered"]
    assert state["records"] == 0


@pytest.mark.slow
@pytest.mark.host
def test_off_runs_turbomind_without_deepstack(tmp_path: Path) -> None:
    state = _without_a_library("off", tmp_path)
    assert not state["error"]
    assert not state["active"]
    assert state["offered"]
    assert state["reason"] == f"switched off ({VARIABLE}=off)"


def _install_on_another_module(folder: str, what: str) -> list[str]:
    """The stock module seems to be another build: what each mode says of it."""
    import lmdeploy.turbomind

    import lmdeploy_ext
    from lmdeploy_ext.deepstack import library
    from lmdeploy_ext.deepstack.binding import Hook

    module = lmdeploy.turbomind._tm.__file__
    other = Path(folder) / "other.so"
    if what == "taken over":
        library.build(other)
        assert Hook(other).attach(module) is None
    else:  # a function with one parameter more, which is another symbol
        source = Path(folder) / "hook.c"
        text = library.SOURCE.read_text()
        source.write_text(
            text.replace("MropeSegmentEiiP11CUstream_st", "MropeSegmentEiiiP11CUstream_st")
        )
        library.SOURCE = source
    found = []
    for mode in ("require", "auto"):
        try:
            lmdeploy_ext.install(mode)
        except lmdeploy_ext.deepstack.DeepStackUnavailable as error:
            found.append(str(error))
        else:
            found.append(status().reason)
            assert not status().active
        lmdeploy_ext.uninstall()
    return [text.replace(module, "MODULE").replace(folder, "FOLDER") for text in found]


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("renamed", "it has no function _ZN9turbomind22invokeMropePositionIdsEPiPKNS_12MropeSegmentEiii"
                    "P11CUstream_st"),
        ("taken over", "_ZN9turbomind22invokeMropePositionIdsEPiPKNS_12MropeSegmentEiiP11CUstream_st "
                       "is already taken over by FOLDER/other.so"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_hooked(
    what: str, problem: str, tmp_path: Path, compiler: str
) -> None:
    extra = {"XDG_CACHE_HOME": str(tmp_path)}
    required, auto = run(_install_on_another_module, tmp_path, what, mode="driver", extra=extra)
    assert auto == f"LMDeploy's module MODULE does not fit: {problem}"
    assert required == (
        f"TurboMind cannot be given DeepStack: {auto}. {VARIABLE}=auto takes LMDeploy's PyTorch "
        "engine instead, and off takes TurboMind without DeepStack."
    )


def _other_mode() -> list[str]:
    import lmdeploy_ext

    errors = []
    for first, second in (("off", "require"), ("require", "off")):
        lmdeploy_ext.install(first)
        try:
            lmdeploy_ext.install(second)
        except lmdeploy_ext.deepstack.DeepStackUnavailable as raised:
            errors.append(str(raised))
        lmdeploy_ext.uninstall()
    return errors


@pytest.mark.slow
@pytest.mark.host
def test_a_second_mode_is_refused() -> None:
    one, other = run(_other_mode, mode="driver")
    assert "asked for as 'require', but the extension is already installed with 'off'" in one
    assert "asked for as 'off', but the extension is already installed with 'require'" in other


@pytest.mark.slow
@pytest.mark.host
def test_the_log_explains_the_mode(tmp_path: Path) -> None:
    code = "import lmdeploy_ext; lmdeploy_ext.install()"
    said = {}
    for mode in ("auto", "off"):
        extra = {"CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path), VARIABLE: mode}
        variables = environment("driver", extra=extra)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **variables}, cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        said[mode] = done.stderr
    assert "serves Qwen3-VL with its PyTorch engine instead" in said["auto"]
    assert "no-such-compiler" in said["auto"]
    assert "DeepStack is off, as asked for" in said["off"]
