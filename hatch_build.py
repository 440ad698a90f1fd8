"""Adds the hook libraries of `lmdeploy_ext` to the wheel if ``QWEN3VL_BUILD_HOOK=1`` is set.

Without the variable, the wheel is the same for every platform, and the libraries are compiled on first
use, which needs a C compiler on the machine. With the variable, the wheel only works on the
platform of the build machine.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "QWEN3VL_BUILD_HOOK"
PACKAGE = "lmdeploy_ext/deepstack"
SOURCES = (f"{PACKAGE}/hook.c", "lmdeploy_ext/lengths/lengths.c")


class HookLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard" or os.environ.get(VARIABLE) != "1":
            return
        library = _load(Path(self.root) / PACKAGE / "library.py")
        folder = Path(self.directory) / "hook"
        folder.mkdir(parents=True, exist_ok=True)
        for source in (Path(self.root) / name for name in SOURCES):
            target = folder / library.file_name(source)
            library.build(target, source)
            inside = source.parent.relative_to(self.root)
            build_data["force_include"][str(target)] = f"{inside}/{target.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"


def _load(path: Path) -> Any:
    """Load the module without its package, whose dependencies may be missing."""
    spec = importlib.util.spec_from_file_location("library", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
