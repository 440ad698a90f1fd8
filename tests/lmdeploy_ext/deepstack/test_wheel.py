"""The hook library in a wheel that is built with it, and only there."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from lmdeploy_ext.deepstack import library

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow  # builds wheels


@pytest.mark.parametrize("asked", [True, False])
def test_the_library_in_the_wheel(
    asked: bool, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3VL_BUILD_HOOK", "1" if asked else "")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as content:
        names = content.namelist()
    folder = "lmdeploy_ext/deepstack"
    assert f"{folder}/hook.c" in names
    assert (f"{folder}/{library.file_name()}" in names) is asked
    assert Path(built).name.endswith("-none-any.whl") is not asked
