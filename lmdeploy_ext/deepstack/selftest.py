"""The self-test: checks once on each machine that TurboMind with DeepStack computes correct
results.

A function that can be intercepted may still be called at other points of the forward than when the
hook was written. So before the first model with images runs on a machine, `trial` runs a tiny
random model in a separate process and compares its answers with transformers. A success is recorded
in the user's cache folder, in a file whose name is a hash of everything that the result depends on.
A failure is not recorded: the next start repeats the test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from lmdeploy_ext.deepstack import library, modes
from lmdeploy_ext.deepstack.state import Mode, running, status

logger = logging.getLogger("lmdeploy_ext")

VARIABLE = "LMDEPLOY_QWEN3VL_SELFTEST"
"""``off`` skips the test, ``force`` repeats a test that has passed."""
TIMEOUT_S = 300
_OUTPUT_SHOWN = 400
_DRIVER = Path("/proc/driver/nvidia/version")
_TRIAL = "lmdeploy_ext.deepstack.trial"
_SOURCES = ("binding.py", "features.py", "memory.py", "mergers.py", "plan.py", "trial.py")
_passed: set[str] = set()


def verify() -> str | None:
    """Run `check` for the current mode. If the test fails, DeepStack is turned off.

    Returns:
        The reason why DeepStack is not available; None if it is available or switched off.
    """
    found = status()
    if found.active and not running():
        problem = check()
        if problem is not None:
            modes.reject(problem)
        found = status()
    return None if found.active or found.mode in (Mode.OFF, None) else found.reason


def check() -> str | None:
    """The problem of TurboMind with DeepStack on the first GPU; None if it works.

    Takes some seconds if this machine has not passed the test yet. Without a GPU nothing is tested.
    """
    import torch

    choice = os.environ.get(VARIABLE, "").strip().lower()
    if choice == "off" or not torch.cuda.is_available():
        return None
    key = _key()
    if choice != "force" and (key in _passed or _noted(key)):
        return None
    begun = time.monotonic()
    logger.info("DeepStack: comparing a random model with transformers, once on this machine")
    problem = run()
    if problem is None:
        logger.info("DeepStack: the self-test passed in %.0f s", time.monotonic() - begun)
        _passed.add(key)
        _note(key)
    return problem


def run() -> str | None:
    """Run the test in a separate process. Returns None, or the problem."""
    with tempfile.TemporaryDirectory(prefix="lmdeploy-ext-") as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        variables = {**os.environ, VARIABLE: "off", "LMDEPLOY_QWEN3VL": "0"}
        command = [sys.executable, "-m", _TRIAL, str(result)]
        with log.open("wb") as sink:
            try:
                done = subprocess.run(
                    command, env=variables, stdin=subprocess.DEVNULL, stdout=sink,
                    stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"the self-test did not end within {TIMEOUT_S} s"
        if done.returncode == 0 and result.exists():
            found: str | None = json.loads(result.read_text())["problem"]
            return None if found is None else f"the self-test failed: {found}"
        text = log.read_text(errors="replace").strip()
    logger.error("the self-test of DeepStack ended with %d:\n%s", done.returncode, text[-8000:])
    end = text.splitlines()[-1][-_OUTPUT_SHOWN:] if text else "without a word"
    return f"the self-test ended with {done.returncode}: {end}"


def _key() -> str:
    """A hash of everything that the result of the test depends on."""
    import torch

    parts = [
        version("lmdeploy"),
        torch.__version__,
        torch.cuda.get_device_name(0),
        str(torch.cuda.get_device_capability(0)),
        _driver(),
        library.file_name(),
        *(Path(__file__).with_name(name).read_text() for name in _SOURCES),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _driver() -> str:
    """The version text of NVIDIA's kernel driver; empty if it is not visible."""
    try:
        return _DRIVER.read_text()
    except OSError:
        return ""


def _path(key: str) -> Path | None:
    folder = library.cache_folder()
    return None if folder is None else folder / f"selftest-{key}"


def _noted(key: str) -> bool:
    path = _path(key)
    return path is not None and path.is_file()


def _note(key: str) -> None:
    path = _path(key)
    if path is not None:
        with contextlib.suppress(OSError):  # the next start repeats the test
            path.touch()
