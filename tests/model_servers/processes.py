"""Starts model servers of other projects, each in a process of its own.

Their packages are not among the dependencies. ``MODEL_SERVERS_PYTHON`` names a Python that has them::

    python -m venv servers && servers/bin/pip install xllamacpp mistralrs gguf
    MODEL_SERVERS_PYTHON=servers/bin/python make test-slow
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO

from service.wiring import BUNDLED_MODEL
from tests.ports import free_port

VARIABLE = "MODEL_SERVERS_PYTHON"
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_LIMIT_S = 120.0


class Missing(Exception):
    """A package is not installed. The text says where it was looked for."""


def python() -> str:
    """The interpreter that has the packages."""
    return os.environ.get(VARIABLE) or sys.executable


@cache
def _has(interpreter: str, package: str) -> bool:
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([interpreter, "-c", found]).returncode == 0


def require(package: str) -> None:
    """Raise ``Missing`` unless the interpreter has a package."""
    if not _has(python(), package):
        raise Missing(f"{package} is not installed in {VARIABLE}, or in this environment")


def version(package: str) -> str:
    """The version of a package; empty where it is missing."""
    if not _has(python(), package):
        return ""
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.check_output([python(), "-c", code], text=True).strip()


def gguf_files(folder: Path, checkpoint: Path = BUNDLED_MODEL) -> Path:
    """A checkpoint as GGUF files, in a folder. Raises ``Missing``."""
    require("gguf")
    path = _site_packages("gguf")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    command = [
        sys.executable,
        "-m",
        "tests.model_servers.gguf_files",
        str(checkpoint),
        str(folder),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder


def _site_packages(package: str) -> str:
    """The folder in which the other interpreter finds a package of plain Python."""
    code = f"import importlib.util; print(importlib.util.find_spec({package!r}).origin)"
    origin = subprocess.check_output([python(), "-c", code], text=True).strip()
    return str(Path(origin).parents[1])


@contextmanager
def llama_cpp(folder: Path, *options: str) -> Iterator[str]:
    """llama.cpp on GGUF files; the URL. options: such as ``image_max_tokens=64``."""
    require("xllamacpp")
    with _process(HERE / "llama_cpp.py", str(folder), *options) as url:
        yield url


@contextmanager
def mistral_rs(checkpoint: Path = BUNDLED_MODEL) -> Iterator[str]:
    """mistral.rs on a checkpoint; the URL."""
    require("mistralrs")
    with _process(HERE / "mistral_rs.py", str(checkpoint)) as url:
        yield url


@contextmanager
def _process(script: Path, argument: str, *options: str) -> Iterator[str]:
    """Run a server on a free port. A server that dies is started again on the same port, as a
    supervisor does: some requests end llama.cpp."""
    port = free_port()
    words = [python(), str(script), argument, str(port), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ending = threading.Event()
    with tempfile.TemporaryFile() as log:

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(words, env=environment, stdout=log, stderr=log)

        running = [start()]

        def supervise() -> None:
            while running[0].wait() is not None and not ending.is_set():
                running[0] = start()

        try:
            _wait_until_ready(port, running[0], log)
            supervisor = threading.Thread(target=supervise, daemon=True)
            supervisor.start()
            yield f"http://127.0.0.1:{port}"
        finally:
            ending.set()
            running[0].kill()
            running[0].wait(60)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Until the server lists its models, which llama.cpp does after it has loaded them."""
    deadline = time.monotonic() + START_LIMIT_S
    url = f"http://127.0.0.1:{port}/v1/models"
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(
        f"the model server did not start:\n{log.read()[-4000:].decode(errors='replace')}"
    )
