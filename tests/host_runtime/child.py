"""The child's side of `tests.host_runtime.runner.run`: reads a call, makes it, writes its result."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import inspect
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> None:
    end_with_parent()
    make(json.load(sys.stdin), Path(sys.argv[1]))


def end_with_parent() -> None:
    """A test that is interrupted leaves nothing running."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def make(call: Mapping[str, Any], target: Path) -> None:
    """Make a call of `runner.run`, write its result, and end the process."""
    function = getattr(_load(Path(call["file"])), call["function"])
    result = function(*call["arguments"], **call["keywords"])
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    target.write_text(json.dumps(result, default=str))
    sys.stdout.flush()
    sys.stderr.flush()
    # An engine's threads wait for requests for ever, and its clean-up is not what a test is about.
    os._exit(0)


def _load(path: Path) -> ModuleType:
    """Import the file of the test under a name of its own: pytest has no part in the child."""
    spec = importlib.util.spec_from_file_location(f"_child_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
