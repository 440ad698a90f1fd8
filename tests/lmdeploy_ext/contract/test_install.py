"""Installing the extension into the real LMDeploy, and every way in which LMDeploy may have drifted."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_ext import host
from lmdeploy_ext.media.records import VIDEO
from lmdeploy_ext.patch import Entry, Patch
from lmdeploy_ext.patches import PATCHES
from lmdeploy_ext.promises import PROMISES
from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape

ROOT = Path(__file__).parents[3]


def imported_names() -> set[str]:
    """``module:name`` for everything that our code imports from LMDeploy, the command line apart."""
    found = set()
    for path in (ROOT / "lmdeploy_ext").rglob("*.py"):
        if path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmdeploy."):
                found.update(f"{node.module}:{alias.name}" for alias in node.names)
    return found


def test_host_lists_every_name_that_is_imported() -> None:
    listed = {*host.NAMES, *(record.target for record in PATCHES)}
    known = listed | {name.rpartition(".")[0] for name in listed}  # a class by one of its members
    imported = imported_names()
    assert "lmdeploy.turbomind.models.qwen3:Qwen3TextModel" in imported
    assert imported <= known, f"add to lmdeploy_ext.host.NAMES: {sorted(imported - known)}"


def test_records_say_what_they_are_for() -> None:
    for record in PATCHES:
        assert len(record.why) > 20, record.name
        assert len(record.remove_when) > 10, record.name
        assert isinstance(record, Patch | Entry)


# What follows needs the real LMDeploy: each function without a test's name runs in a child.


def _install_and_back() -> dict[str, Any]:
    import lmdeploy_ext
    from lmdeploy_ext.patch import applied
    from tests.lmdeploy_ext.contract.listing import listing

    seen: dict[str, Any] = {"problems": host.problems(), "before": listing()}
    lmdeploy_ext.install()
    seen |= {"installed": listing(), "names": applied(), "is": lmdeploy_ext.is_installed()}
    lmdeploy_ext.install()
    seen |= {"twice": listing(), "names twice": applied()}
    lmdeploy_ext.uninstall()
    seen |= {"after": listing(), "is after": lmdeploy_ext.is_installed()}
    lmdeploy_ext.uninstall()
    seen["after twice"] = listing()
    return json.loads(json.dumps(seen))


@pytest.mark.slow
@pytest.mark.host
def test_install_and_uninstall() -> None:
    seen = run(_install_and_back, mode="driver")
    assert seen["problems"] == [], "every name of host.py exists and has its signature"
    assert seen["is"] is True
    assert seen["is after"] is False
    refused = {record.name for record in VIDEO.records}  # where the switch is off
    assert seen["names"] == [record.name for record in PATCHES if record.name not in refused]
    before, installed = seen["before"], seen["installed"]
    added = [pair for pair in installed["archs"] if pair not in before["archs"]]
    assert added == [[name, "qwen3_vl"] for name in host.ARCHITECTURES]
    assert [name for name, _ in installed["models"]] == [
        *[name for name, _ in before["models"]],
        "qwen3_vl",
    ]
    assert installed["vision"] == before["vision"]
    assert installed[host.NATIVE_VISION] != before[host.NATIVE_VISION]
    assert seen["twice"] == installed
    assert seen["names twice"] == seen["names"]
    assert seen["after"] == before
    assert seen["after twice"] == before


def _native_vision() -> dict[str, list[bool]]:
    from lmdeploy.vl.model.builder import VISION_MODELS

    import lmdeploy_ext

    def flags() -> dict[str, bool]:
        return {
            # As LMDeploy asks: on an object, which here need not be a working one.
            name: object.__new__(kind)._turbomind_native_vision
            for name, kind in VISION_MODELS.module_dict.items()
        }

    before = flags()
    lmdeploy_ext.install()
    after = flags()
    return {name: [before[name], after[name]] for name in before}


def _switched() -> dict[str, Any]:
    """What is applied with each switch off, and what LMDeploy's log says."""
    import logging
    import os

    import lmdeploy_ext
    from lmdeploy_ext.patch import ExtensionError, applied
    from lmdeploy_ext.promises import PROMISES
    from tests.lmdeploy_ext.contract.listing import listing

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lmdeploy").addHandler(handler)
    before = listing()
    found: dict[str, Any] = {}
    for promise in PROMISES:
        for value in ("on", "off", "perhaps"):
            said.clear()
            os.environ[promise.variable] = value
            try:
                lmdeploy_ext.install()
            except ExtensionError as error:
                found[f"{promise.variable}={value}"] = [str(error), [], [], False]
            else:
                line = next(one for one in said if "is active" in one)
                names = [record.name for record in promise.records]
                there = sorted({*names} & {*applied()})
                found[f"{promise.variable}={value}"] = [
                    line, names, there, lmdeploy_ext.is_installed()
                ]  # fmt: skip
            lmdeploy_ext.uninstall()
            assert listing() == before
        del os.environ[promise.variable]
    return found


@pytest.mark.slow
@pytest.mark.host
def test_each_promise_can_be_switched_off() -> None:
    found = run(_switched, mode="driver")
    for promise in PROMISES:
        for value, shown in (("on", promise.on), ("off", promise.off)):
            line, names, there, installed = found[f"{promise.variable}={value}"]
            assert f"{shown}" in line
            assert there == (sorted(names) if (value == "on") is promise.applied_when else [])
            assert installed
        message = found[f"{promise.variable}=perhaps"][0]
        assert message.startswith(f"{promise.variable}='perhaps' is not understood. 1, true, on")


@pytest.mark.slow
@pytest.mark.host
def test_only_qwen3_vl_gets_native_vision() -> None:
    flags = run(_native_vision, mode="driver")
    assert flags.pop("Qwen3VLModel") == [False, True]
    assert flags["Qwen3_5Model"] == [True, True]
    assert flags["InternS1ProVisionModel"] == [False, False], "it inherits from Qwen3VLModel"
    assert all(before == after for before, after in flags.values())


def _backends(*checkpoints: str) -> list[list[str]]:
    from lmdeploy.archs import autoget_backend

    import lmdeploy_ext

    seen = []
    for change in (None, lmdeploy_ext.install, lmdeploy_ext.uninstall):
        if change is not None:
            change()
        seen.append([autoget_backend(checkpoint) for checkpoint in checkpoints])
    return seen


@pytest.mark.slow
@pytest.mark.host
def test_turbomind_is_chosen_only_when_installed(
    engine_checkpoint: Callable[[EngineShape], Path],
) -> None:
    shapes = (EngineShape(), EngineShape(moe=True, tied=False))
    checkpoints = [str(engine_checkpoint(shape)) for shape in shapes]
    assert run(_backends, *checkpoints, mode="driver") == [
        ["pytorch", "pytorch"],
        ["turbomind", "turbomind"],
        ["pytorch", "pytorch"],
    ]


@pytest.mark.slow
@pytest.mark.host
def test_without_a_driver_the_error_names_it() -> None:
    """No ImportError's traceback: what is missing and what to do."""
    code = (
        "import ctypes, sys\n"
        "try:\n    ctypes.CDLL('libcuda.so.1')\n"
        "except OSError:\n    pass\n"
        "else:\n    sys.exit(3)\n"
        "import lmdeploy_ext; from lmdeploy_ext.host import HostUnavailable\n"
        "try:\n    lmdeploy_ext.install()\n"
        "except HostUnavailable as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        pytest.skip("this machine has the NVIDIA driver")
    assert done.returncode == 0, done.stderr
    assert "libcuda.so.1" in done.stdout
    assert "NVIDIA driver" in done.stdout
