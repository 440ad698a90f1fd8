"""Installs the extension when a process imports LMDeploy and an environment variable is set.

The wheel puts `autoload.pth` into site-packages as ``qwen3vl_lmdeploy_ext.pth``. Python runs the
single line of this file at every start, also in workers of LMDeploy, which inherit the variable.
Without the variable, the line looks up one key in ``os.environ`` and imports nothing of this
package.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from lmdeploy_ext.switches import OFF, ON

VARIABLE = "LMDEPLOY_QWEN3VL"
HOST = "lmdeploy"


def arm() -> None:
    """Install the extension when `lmdeploy` is imported, or at once if it is already imported.

    If the installation fails, or the value of the variable is invalid, the process ends when it
    imports LMDeploy, so that it never runs stock LMDeploy by mistake. Programs that do not import
    LMDeploy are not affected.
    """
    if _value() in ("", *OFF) or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if HOST in sys.modules:
        _check_value()
        _install()
    else:
        sys.meta_path.insert(0, _Finder())


def announce(promises: Sequence[str], *, serves: bool) -> None:
    """Log one line through LMDeploy's logger: the active extension, LMDeploy's release, and what
    LMDeploy does with the extension.

    Args:
        promises: one phrase for each promise, see `lmdeploy_ext.promises`.
        serves: whether TurboMind serves the models of the extension.
    """
    from lmdeploy_ext import host

    logging.getLogger(HOST).info(
        "Qwen3-VL extension %s is active on LMDeploy %s: %s; TurboMind %s %s",
        _own_version(),
        host.installed_version(),
        ", ".join(promises),
        "serves" if serves else "does not serve",
        ", ".join(host.ARCHITECTURES),
    )


class _Finder:
    """An import finder: finds `lmdeploy` with the other finders, and installs the extension after
    its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != HOST:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Loads `lmdeploy` with its original loader, which it then restores in the module's spec."""

    def __init__(self, loader: Any, finder: Any) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        # Code that only looks up the package asks its loader for files.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        _check_value()
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _install()
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)  # last, because a failed import may be repeated


def _check_value() -> None:
    if _value() not in ON:
        _end(
            f"{VARIABLE}={os.environ.get(VARIABLE)!r} is not understood. {', '.join(ON)} switch it "
            f"on; {', '.join(OFF)} or no variable run LMDeploy without it."
        )


def _install() -> None:
    import lmdeploy_ext
    from lmdeploy_ext.patch import ExtensionError

    try:
        lmdeploy_ext.install()
    except ExtensionError as error:
        _end(str(error))
    except Exception:
        traceback.print_exc()
        _end(f"the installation failed as above. Without {VARIABLE} LMDeploy runs as it is.")


def _end(message: str) -> NoReturn:
    # Print here: a thread that ends with SystemExit prints nothing.
    print(f"Qwen3-VL extension of LMDeploy: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _value() -> str:
    return os.environ.get(VARIABLE, "").strip().lower()


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qwen3vl-grpc")
    except PackageNotFoundError:  # from a source tree that is not installed
        return "(not installed)"
