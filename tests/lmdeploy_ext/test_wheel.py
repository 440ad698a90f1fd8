"""The line that arms the extension gets into every kind of installation."""

from __future__ import annotations

import os
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from lmdeploy_ext import autoload
from lmdeploy_ext.__main__ import LINE

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # builds wheels and environments


@pytest.fixture(params=["standard", "editable"])
def wheel(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=[request.param])
    return Path(built)


def test_the_line_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        assert content.read(LINE) == Path(autoload.__file__).with_suffix(".pth").read_bytes()
        lines = sorted(name for name in content.namelist() if name.endswith(".pth"))
    # Python runs them in this order; hatch's own makes an editable installation importable.
    assert lines[-1] == LINE
    assert len(lines) == (2 if "_editable_impl_qwen3vl_grpc.pth" in lines else 1)


def test_a_fresh_environment_runs_it(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(packages)
    code = "import sys; print('lmdeploy_ext.autoload' in sys.modules)"
    for value, expected in ((None, "False"), ("1", "True")):
        environment = {k: v for k, v in os.environ.items() if k != autoload.VARIABLE}
        environment |= {autoload.VARIABLE: value} if value else {}
        done = subprocess.run(
            [tmp_path / "env" / "bin" / "python", "-c", code], env=environment, cwd=tmp_path,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (done.stdout.strip(), done.stderr) == (expected, "")
