"""Installing the extension into the real LMDeploy, and every way in which LMDeploy may have drifted."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, EnumMeta
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lmdeploy_ext import host
from lmdeploy_ext.patch import Entry, Patch
from lmdeploy_ext.patches import PATCHES
from tests.host_runtime.runner import environment, run
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


def _listing() -> dict[str, Any]:
    """Everything that the records touch, and the registries whole, as text."""
    from lmdeploy.turbomind.models.base import INPUT_MODELS
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS
    from lmdeploy.vl.model.builder import VISION_MODELS

    listing: dict[str, Any] = {
        "archs": list(SUPPORTED_ARCHS.items()),
        "models": [(name, repr(kind)) for name, kind in INPUT_MODELS.module_dict.items()],
        "vision": [(name, repr(kind)) for name, kind in VISION_MODELS.module_dict.items()],
    }
    for record in PATCHES:
        module, _, path = record.target.partition(":")
        *parents, name = path.split(".")
        owner: Any = import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        found = inspect.getattr_static(owner, name)
        value = "" if isinstance(record, Entry) else id(found)
        listing[record.target] = [name in vars(owner), list(vars(owner)), value]
    return listing


def _unordered(listing: dict[str, Any]) -> dict[str, Any]:
    """Without the order of attributes, which changes when one is taken away and put back."""
    targets = {key: value for key, value in listing.items() if ":" in key}
    return {key: [own, sorted(names), value] for key, (own, names, value) in targets.items()}


def _install_and_back() -> dict[str, Any]:
    import lmdeploy_ext
    from lmdeploy_ext.patch import applied

    seen: dict[str, Any] = {"problems": host.problems(), "before": _listing()}
    lmdeploy_ext.install()
    seen |= {"installed": _listing(), "names": applied(), "is": lmdeploy_ext.is_installed()}
    lmdeploy_ext.install()
    seen |= {"twice": _listing(), "names twice": applied()}
    lmdeploy_ext.uninstall()
    seen |= {"after": _listing(), "is after": lmdeploy_ext.is_installed()}
    lmdeploy_ext.uninstall()
    seen["after twice"] = _listing()
    return json.loads(json.dumps(seen))


@pytest.mark.slow
def test_install_and_uninstall() -> None:
    seen = run(_install_and_back, mode="driver")
    assert seen["problems"] == [], "every name of host.py exists and has its signature"
    assert seen["is"] is True
    assert seen["is after"] is False
    assert seen["names"] == [record.name for record in PATCHES]
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


@pytest.mark.slow
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


# Drift: each name that we touch is taken away, or given other parameters, one at a time.


def signatures() -> dict[str, str | None]:
    own = {record.target: getattr(record, "signature", None) for record in PATCHES}
    return {**host.NAMES, **own}


@contextmanager
def _changed(target: str, change: Callable[[Any, str], None]) -> Iterator[None]:
    """One attribute of LMDeploy changed where it is defined, and put back."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner: Any = import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    if isinstance(owner, EnumMeta):  # its members cannot be taken away: the enum without this one
        members = {key: value for key, value in owner.__members__.items() if key != name}
        with mock.patch.object(import_module(module), parents[0], Enum(parents[0], members)):
            yield
        return
    if isinstance(owner, type):
        owner = next(kind for kind in owner.__mro__ if name in vars(kind))
    original = vars(owner)[name]
    change(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _other_parameters(owner: Any, name: str) -> None:
    def changed(nobody: Any, expects: Any, this: Any) -> None:
        raise AssertionError("never called")

    setattr(owner, name, changed)


def _error_of_install() -> list[str]:
    """The problems that the one error of install names; nothing may be changed after it."""
    import lmdeploy_ext
    from lmdeploy_ext.patch import HostDrift, applied

    try:
        lmdeploy_ext.install()
    except HostDrift as error:
        found = error
    else:
        lmdeploy_ext.uninstall()
        return []
    assert applied() == ()
    assert host.REMEDY in str(found)
    return list(found.problems)


def _drifts() -> dict[str, dict[str, list[str]]]:
    assert _error_of_install() == []
    before = _unordered(_listing())
    seen: dict[str, dict[str, list[str]]] = {}
    for target, signature in signatures().items():
        with _changed(target, delattr):
            seen[target] = {"gone": _error_of_install()}
        if signature is not None:
            with _changed(target, _other_parameters):
                seen[target]["other"] = _error_of_install()
    assert _unordered(_listing()) == before
    assert _error_of_install() == []
    return seen


@pytest.mark.slow
def test_every_drift_makes_exactly_one_clear_error() -> None:
    seen = run(_drifts, mode="driver", timeout_s=280)
    assert seen.keys() == signatures().keys()
    assert len(seen) >= 40
    for target, errors in seen.items():
        # Names below a class are reported with the class, so that one change is one problem.
        assert len(errors["gone"]) == 1, (target, errors)
        # Without an __init__ of its own a class has the one of its base, with other parameters.
        gone = "takes" if target.endswith(".__init__") else "does not exist"
        assert errors["gone"][0].startswith(f"{target} {gone}"), target
        if "other" in errors:
            first = errors["other"][0]
            assert first.startswith(f"{target} takes (nobody, expects, this), not ("), target


@pytest.fixture
def copied_lmdeploy(tmp_path: Path) -> Path:
    """A copy of LMDeploy's Python files, with links to its libraries."""
    source = Path(sys.prefix).glob("lib/python*/site-packages/lmdeploy")
    found = next(source, None)
    if found is None:
        pytest.skip("LMDeploy is not installed as a folder in site-packages")

    def copy(here: str, there: str) -> None:
        if here.endswith(".so") or ".so." in here:
            os.symlink(here, there)
        else:
            shutil.copyfile(here, there)

    folder = tmp_path / "lmdeploy"
    shutil.copytree(
        found, folder, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__", "pytorch")
    )
    # Nobody changes the PyTorch engine; its files are many.
    os.symlink(found / "pytorch", folder / "pytorch")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (
            "turbomind/models/qwen3_5.py",
            "class Qwen3_5VisionModel(",
            "class Qwen3_5VisionTower(",
            "lmdeploy.turbomind.models.qwen3_5:Qwen3_5VisionModel does not exist",
        ),
        (
            "turbomind/models/qwen3.py",
            "def ffn(self, pfx, is_expert=False, *, tp)",
            "def ffn(self, pfx, *, tp, is_expert=False)",
            "Qwen3TextModel.ffn takes (self, pfx, *, tp, is_expert=False), not",
        ),
    ],
)
def test_a_renamed_name_in_a_copy_of_lmdeploy(
    copied_lmdeploy: Path, file: str, old: str, new: str, problem: str
) -> None:
    path = copied_lmdeploy / file
    text = path.read_text()
    assert old in text
    for other in copied_lmdeploy.rglob("turbomind/models/*.py"):  # a consistent renaming
        name = re.sub(r"^class |\($", "", old)
        if old.startswith("class ") and name in other.read_text():
            other.write_text(other.read_text().replace(name, re.sub(r"^class |\($", "", new)))
    path.write_text(path.read_text().replace(old, new))
    variables = environment("driver", extra={"PYTHONDONTWRITEBYTECODE": "1"})
    variables["PYTHONPATH"] = f"{copied_lmdeploy.parent}:{variables['PYTHONPATH']}"
    code = (
        "import lmdeploy, lmdeploy_ext; from lmdeploy_ext.patch import HostDrift\n"
        "print(lmdeploy.__file__)\n"
        "try:\n    lmdeploy_ext.install()\n"
        "except HostDrift as error:\n    print(len(error.problems)); print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [str(copied_lmdeploy / "__init__.py"), "1"]
    assert problem in done.stdout
    assert "nothing was changed" in done.stdout
    assert "pip install 'lmdeploy>=0.18.0,<0.19'" in done.stdout


@pytest.mark.slow
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
