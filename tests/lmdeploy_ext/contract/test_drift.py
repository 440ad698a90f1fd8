"""Every way in which LMDeploy may have drifted makes exactly one clear error, and changes nothing."""

from __future__ import annotations

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
from lmdeploy_ext.media import VIDEO_VARIABLE
from lmdeploy_ext.patches import PATCHES
from tests.host_runtime.runner import environment, run

ROOT = Path(__file__).parents[3]


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
    """Each name that we touch taken away, then given other parameters, one at a time."""
    from tests.lmdeploy_ext.contract.listing import listing, unordered

    os.environ[VIDEO_VARIABLE] = "off"  # so that every record is applied
    assert _error_of_install() == []
    before = unordered(listing())
    seen: dict[str, dict[str, list[str]]] = {}
    for target, signature in signatures().items():
        with _changed(target, delattr):
            seen[target] = {"gone": _error_of_install()}
        if signature is not None:
            with _changed(target, _other_parameters):
                seen[target]["other"] = _error_of_install()
    assert unordered(listing()) == before
    assert _error_of_install() == []
    return seen


@pytest.mark.slow
@pytest.mark.host
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
@pytest.mark.host
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
        (
            "vl/media/image.py",
            "def load_bytes(self, data",
            "def load_bytes(self, content",
            "LMDEPLOY_QWEN3VL_IMAGES=off runs LMDeploy without these changes.",
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
