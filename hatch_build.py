"""Adds the hook library of `lmdeploy_ext.deepstack` to the wheel if ``QWEN3VL_BUILD_HOOK=1`` is
set.

Without the variable, the wheel is the same for every platform, and the library is compiled on first
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


class HookLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard" or os.environ.get(VARIABLE) != "1":
            return
        library = _load(Path(self.root) / PACKAGE / "library.py")
        folder = Path(self.directory) / "hook"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / library.file_name()
        library.build(target)
        build_data["force_include"][str(target)] = f"{PACKAGE}/{target.name}"
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
