"""Finds a hook library, or compiles it from its source with the system's C compiler.

There are two: that of DeepStack, from `hook.c`, and that of `lmdeploy_ext.lengths`. A library is searched
next to its source, where platform-specific wheels have it, and in the user's cache folder. Its name
contains a hash of the source, so that a library of another version is never used.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "hook.c"
HEADER = HERE / "call_slots.h"
FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra")
TIMEOUT_S = 120


class LibraryUnavailable(Exception):
    """The hook library was not found and cannot be compiled; the message says why and what to
    do."""


class Hooking(Protocol):
    """A loaded hook library."""

    def attach(self, module: str) -> str | None:
        """Intercept the functions of a loaded module, given its path. Returns the problem, or None."""
        ...

    def bound(self) -> int:
        """Number of functions whose calls lead to the library; 0 if one of them does not."""
        ...


def attach_to_turbomind(load: Callable[[], Hooking]) -> str | None:
    """Attach a hook library to TurboMind. Returns None if every call leads to it, otherwise the
    problem."""
    module = importlib.import_module("lmdeploy.turbomind")._tm.__file__
    try:
        library = load()
    except LibraryUnavailable as error:
        return f"there is no hook library: {error}"
    problem = library.attach(module)
    if problem is None and not library.bound():
        problem = "the calls do not lead to the hook"
    return None if problem is None else f"LMDeploy's module {module} does not fit: {problem}"


def find(source: Path | None = None) -> Path:
    """The path of a hook library for this machine; that of DeepStack unless another source is given.
    Compiles the library if needed, in less than a second.

    Raises:
        LibraryUnavailable: the system is not Linux, or there is neither a library nor a compiler.
    """
    if sys.platform != "linux":
        raise LibraryUnavailable(f"it needs Linux; this is {sys.platform}")
    source = source or SOURCE
    name = file_name(source)
    if (source.parent / name).is_file():
        return source.parent / name
    folder = cache_folder()
    if folder is None:  # a temporary folder for this process
        folder = Path(tempfile.mkdtemp(prefix="lmdeploy-ext-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / name
    if not target.is_file():
        build(target, source)
    return target


def file_name(source: Path | None = None) -> str:
    """``<source>-<processor>-<hash>.so``."""
    source = source or SOURCE
    parts = source.read_bytes(), HEADER.read_bytes(), " ".join(FLAGS).encode()
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    return f"{source.stem}-{platform.machine()}-{digest}.so"


def build(target: Path, source: Path | None = None) -> None:
    """Compile a library to a path, atomically.

    Raises:
        LibraryUnavailable: there is no compiler, or the compilation fails.
    """
    compiler = find_compiler()
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    include = f"-I{HEADER.parent}"
    command = [compiler, *FLAGS, include, str(source or SOURCE), "-o", str(partial), "-ldl"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode != 0:
            raise LibraryUnavailable(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        partial.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LibraryUnavailable(f"{compiler} failed: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def find_compiler() -> str:
    """Raises LibraryUnavailable when there is none."""
    chosen = os.environ.get("CC")
    for name in [chosen] if chosen else ["cc", "gcc", "clang"]:
        found = shutil.which(name)
        if found is not None:
            return found
    wanted = f"CC={chosen}, which does not exist" if chosen else "no cc, gcc or clang on the PATH"
    raise LibraryUnavailable(
        f"the package has no library for {platform.machine()} and there is no C compiler to build "
        f"one ({wanted}). Install one (apt-get install gcc libc6-dev), or a wheel that was built "
        "with QWEN3VL_BUILD_HOOK=1"
    )


def cache_folder() -> Path | None:
    """A cache folder that only this user can write to; None if there is none.

    Libraries in the folder are loaded into the process, so no other user may write to it.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "qwen3vl-lmdeploy-ext"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and os.access(folder, os.W_OK) else None
