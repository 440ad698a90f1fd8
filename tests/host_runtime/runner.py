"""Runs code of a test against the stock LMDeploy wheel on the host runtime, in a process of its own.

The environment, the preloaded libraries and the patched ``torch.cuda`` live in the child alone.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.host_runtime import forks
from tests.host_runtime.build import NotAvailable, build

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(__file__).resolve().parent / "site"
Mode = Literal["driver", "null", "numbers"]
MEMORY_MIB = 2048
OUTPUT_SHOWN = 12_000
"""Characters of the end of a failed child's output that the error shows."""


class ChildFailed(AssertionError):
    """A child ended with an error or did not end; the text has the end of its output."""


def environment(
    mode: Mode = "null",
    *,
    memory_mib: int = MEMORY_MIB,
    trace: Path | None = None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of a process on the host runtime; skips the test where it cannot be built.

    Args:
        mode: ``driver``: enough for ``import lmdeploy.turbomind``, configs and the grammar compiler.
            ``null``: the whole engine, kernels compute nothing. ``numbers``: kernels compute on the
            host, and one that is not implemented aborts with its name.
        memory_mib: device memory that the runtime reports and gives out.
        trace: a file that gets a line for each kernel launch.
        extra: variables to add, for example ``HOST_RUNTIME_NULL_TOKEN``.
    """
    if "HOST_RUNTIME_MODE" in os.environ:
        raise RuntimeError("a child starts no children")
    try:
        libraries = build()
    except NotAvailable as error:
        pytest.skip(str(error))
    values = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    folder = libraries / ("driver" if mode == "driver" else "runtime")
    values["LD_LIBRARY_PATH"] = _joined(folder, os.environ.get("LD_LIBRARY_PATH"))
    python_path = [ROOT] if mode == "driver" else [SITE, ROOT]
    values["PYTHONPATH"] = _joined(*python_path, os.environ.get("PYTHONPATH"))
    values |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    values |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    values["LMDEPLOY_QWEN3VL_SELFTEST"] = "off"  # it has tests of its own, and starts no quick one
    if mode != "driver":
        values |= {"HOST_RUNTIME_MODE": mode, "HOST_RUNTIME_MEMORY_MIB": str(memory_mib),
                   "HOST_RUNTIME_LIBRARIES": str(folder)}  # fmt: skip
    if trace is not None:
        values["HOST_RUNTIME_TRACE"] = str(trace)
    return values | dict(extra or {})


def _joined(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def run(
    function: Callable[..., Any],
    /,
    *arguments: Any,
    mode: Mode = "null",
    timeout_s: float = 180,
    memory_mib: int = MEMORY_MIB,
    trace: Path | None = None,
    extra: Mapping[str, str] | None = None,
    **keywords: Any,
) -> Any:
    """Call a function in a child on the host runtime and return its result.

    Args:
        function: a function at the top level of its file, plain or async. The child imports that
            file by its path. Arguments, keywords and the result travel as JSON; paths become strings.
        timeout_s: the child is ended after this time, with the stacks of its threads in the error.
        mode, memory_mib, trace, extra: see `environment`. Where ``extra`` has none but variables of
            the host runtime and the memory is as ever, the child is a fork of a process that has
            imported LMDeploy.

    Raises:
        ChildFailed: the function raised, the child crashed or did not end in time.
    """
    if function.__qualname__ != function.__name__:
        raise ValueError(f"{function.__qualname__} is not at the top level of its file")
    call = {
        "file": inspect.getfile(function), "function": function.__name__,
        "arguments": arguments, "keywords": keywords,
    }  # fmt: skip
    variables = environment(mode, memory_mib=memory_mib, trace=trace, extra=extra)
    usual = memory_mib == MEMORY_MIB and set(extra or {}) <= forks.OF_A_CALL
    make = _make_in_a_fork if usual else _make_afresh
    with tempfile.TemporaryDirectory(prefix="host-runtime-") as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        status = make(call, variables, result, log, timeout_s)
        if status is None:
            raise ChildFailed(f"no end after {timeout_s:g} s\n{tail(log)}")
        if status != 0 or not result.exists():
            raise ChildFailed(f"ended with {status}\n{tail(log)}")
        return json.loads(result.read_text())


Call = Mapping[str, Any]


def _make_in_a_fork(
    call: Call, variables: Mapping[str, str], result: Path, log: Path, timeout_s: float
) -> int | None:
    try:
        with forks.warm(variables) as process:
            return process.make(call, variables, result, log, timeout_s)
    except forks.Lost as error:
        raise ChildFailed(f"no process to fork from\n{error}") from None


def _make_afresh(
    call: Call, variables: Mapping[str, str], result: Path, log: Path, timeout_s: float
) -> int | None:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.host_runtime.child", str(result)]
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command, env=dict(variables), cwd=ROOT, stdin=subprocess.PIPE, stdout=sink,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        child.communicate(json.dumps(call, default=str).encode(), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end(child)
        return None
    return child.returncode


def end(child: subprocess.Popen[bytes]) -> None:
    """End a child and what it started: first so that it writes its stacks, then for good."""
    for number, patience_s in ((signal.SIGABRT, 5), (signal.SIGKILL, 10)):
        if child.poll() is None:
            os.killpg(child.pid, number)
            try:
                child.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
    if child.stdin is not None:
        child.stdin.close()


def tail(log: Path) -> str:
    text = log.read_text(errors="replace")
    return text if len(text) <= OUTPUT_SHOWN else f"…{text[-OUTPUT_SHOWN:]}"
