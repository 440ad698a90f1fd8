"""The plain `lmdeploy` command and its workers, with and without the environment variable."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lmdeploy_ext import host
from lmdeploy_ext.autoload import VARIABLE
from tests.host_runtime.runner import environment

pytestmark = [pytest.mark.slow, pytest.mark.host]  # imports lmdeploy in processes of their own

LMDEPLOY = (str(Path(sys.executable).with_name("lmdeploy")),)
PLAIN = f"import sys; sys.path.append({sysconfig.get_path('purelib')!r}); "
"""Start of a program for ``python -S``, which reads no ``.pth`` file: as if this project were not there."""
LISTING = """
import sys
import lmdeploy.archs, lmdeploy.cli.chat, lmdeploy.serve.openai.api_server  # some names are functions, too
from lmdeploy.cli.utils import ArgumentHelper
from lmdeploy.model import MODELS
from lmdeploy.pipeline import Pipeline
from lmdeploy.serve.core import AsyncEngine
from lmdeploy.turbomind import TurboMind
from lmdeploy.turbomind.models.base import INPUT_MODELS
from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS
from lmdeploy.vl.model.base import VISION_MODELS
from lmdeploy.vl.model.qwen3 import Qwen3VLModel

def listing():
    for registry in (INPUT_MODELS.module_dict, VISION_MODELS.module_dict, MODELS.module_dict, SUPPORTED_ARCHS):
        yield from (f"{key} {value}" for key, value in registry.items())
    modules = [sys.modules[f"lmdeploy.{name}"] for name in ("archs", "cli.chat", "serve.openai.api_server")]
    for owner in (*modules, ArgumentHelper, Pipeline, AsyncEngine, TurboMind, Qwen3VLModel):
        for name, value in sorted(vars(owner).items()):
            code = getattr(getattr(value, "__func__", value), "__code__", None)
            yield f"{owner.__name__}.{name} {code.co_filename if code else type(value)}"
"""
"""A program's beginning: every registry, and where every function that might be replaced comes from."""


def ask(*words: str, value: str | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command on a machine with a driver and no device."""
    variables = {
        k: v for k, v in environment("driver").items() if k not in (VARIABLE, "PYTHONPATH")
    }
    variables |= {VARIABLE: value} if value is not None else {}
    done = subprocess.run(
        words, env=variables, cwd="/", capture_output=True, text=True, timeout=180
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_without_the_variable_check_env_is_stock() -> None:
    plain = [sys.executable, "-S", "-c", f"{PLAIN}from lmdeploy.cli import run; run()"]
    stock = ask(*plain, "check_env").stdout
    assert "LMDeploy: 0.18.0" in stock
    assert ask(*LMDEPLOY, "check_env").stdout == stock
    armed = ask(sys.executable, "-m", "lmdeploy", "check_env", value="1").stdout
    line, _, rest = armed.partition("\n")
    assert "Qwen3-VL extension" in line
    assert rest == stock


def test_the_registries_have_qwen3_vl() -> None:
    show = f"{LISTING}\nprint(*listing(), sep='\\n')"
    stock = ask(sys.executable, "-S", "-c", PLAIN + show).stdout.splitlines()
    assert len(stock) > 100
    assert ask(sys.executable, "-c", show).stdout.splitlines() == stock
    undo = "\nimport lmdeploy_ext; lmdeploy_ext.uninstall(); print('--', *listing(), sep='\\n')"
    armed = ask(sys.executable, "-c", show + undo, value="1").stdout.splitlines()
    end = armed.index("--")
    assert armed[end + 1 :] == stock
    added = "\n".join(set(armed[:end]) - set(stock))
    assert all(name in added for name in host.ARCHITECTURES)
    assert "Pipeline._request_generator" in added


def test_an_invalid_value_of_the_variable_ends_the_command() -> None:
    done = ask(*LMDEPLOY, "check_env", value="maybe", code=1)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"{VARIABLE}='maybe' is not understood" in line


def test_the_module_is_the_command_with_the_extension() -> None:
    shown = ask(sys.executable, "-m", "lmdeploy_ext", "serve", "api_server", "--help").stdout
    assert "Qwen3-VL extension" in shown.splitlines()[0]
    _, _, usage = shown.partition("usage: ")
    assert usage.startswith("lmdeploy serve api_server")
    said = " ".join(usage.split())
    names = "--disable-vision, --disable-vision-encoder"
    assert f"{names} Leave the vision tower out and refuse images" in said


# Workers

LOOK = """(__import__('lmdeploy'), __import__('lmdeploy_ext').is_installed(), __import__('os').getpid())[1:]"""
SPAWN = f"""
import multiprocessing
with multiprocessing.get_context("spawn").Pool(1) as pool:
    here, worker = {LOOK}, pool.apply(eval, ({LOOK!r},))
print(here[0], worker[0], here[1] != worker[1])
"""


@pytest.mark.parametrize(("value", "expected"), [("1", "True"), ("0", "False")])
def test_spawned_workers_inherit(value: str, expected: str) -> None:
    done = ask(sys.executable, "-c", SPAWN, value=value)
    assert done.stdout.splitlines()[-1] == f"{expected} {expected} True"
