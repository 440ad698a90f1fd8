"""What a maintainer needs to know of a machine and of a failure."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.common import environment

PACKAGES = ("xgrammar", "triton", "tokenizers", "safetensors", "opencv-python-headless",
            "nvidia-cuda-runtime-cu12", "nvidia-cublas-cu12", "nvidia-cublas", "nvidia-nccl-cu13")  # fmt: skip
VARIABLES = ("LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "LMDEPLOY_QWEN3VL_SELFTEST",
             "HOST_RUNTIME_MODE", "TM_LOG_LEVEL")  # fmt: skip
LOG_SHOWN = 6000
"""Characters of the end of a log in a failure."""


def machine() -> dict[str, Any]:
    """Versions, processor, memory, GPU and driver; imports nothing heavy."""
    found = environment()
    for name in PACKAGES:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found | {
        "system": platform.platform(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": _nvidia_smi(),
        "compilers": {name: shutil.which(name) for name in ("cc", "gcc", "g++", "nvcc")},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "command": sys.argv,
    }


def gpu_name(dry: bool) -> str:
    """The first GPU's name, for the name of the folder of results."""
    if dry:
        return "dry-run"
    line = _nvidia_smi().splitlines()
    return line[0].split(",")[0].strip() if line and line[0] else "no GPU"


def _nvidia_smi() -> str:
    query = "--query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"\n(nvidia-smi: {error})"
    return done.stdout.strip() or f"\n(nvidia-smi: {done.stderr.strip()[:300]})"


def failure(error: BaseException) -> dict[str, Any]:
    """An exception with its stack, as JSON."""
    return {
        "type": type(error).__name__,
        "message": str(error)[:4000],
        "stack": "".join(traceback.format_exception(error))[-12_000:],
    }


def tail(log: Path, shown: int = LOG_SHOWN) -> str:
    """The end of a log."""
    try:
        text = log.read_text(errors="replace")
    except OSError as error:
        return f"({error})"
    return text[-shown:]
