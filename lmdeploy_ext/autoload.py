"""Installs the extension where a process imports LMDeploy and an environment variable asks for it.

The wheel puts `autoload.pth` into site-packages as ``qwen3vl_lmdeploy_ext.pth``. Python runs its
one line at every start, also in workers that LMDeploy spawns: they inherit the variable. Without
the variable the line costs one look-up in ``os.environ`` and imports nothing of ours.
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

VARIABLE = "LMDEPLOY_QWEN3VL"
ON = ("1", "true", "on", "yes")
OFF = ("0", "false", "off", "no")
HOST = "lmdeploy"


def arm() -> None:
    """Install the extension once `lmdeploy` is imported; at once if it is already.

    An error of the installation, or a value of the variable that is neither on nor off, ends the
    process when it imports LMDeploy: what was asked for is never replaced by the stock behaviour.
    Programs that do not import LMDeploy are left alone.
    """
    if _value() in ("", *OFF) or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if HOST in sys.modules:
        _check_value()
        _install()
    else:
        sys.meta_path.insert(0, _Finder())


def announce() -> None:
    """One line in LMDeploy's log: the extension is active, for what, and on which release."""
    from lmdeploy_ext import host

    logging.getLogger(HOST).info(
        "Qwen3-VL extension %s is active on LMDeploy %s: TurboMind serves %s",
        _own_version(),
        host.installed_version(),
        ", ".join(host.ARCHITECTURES),
    )


class _Finder:
    """Finds `lmdeploy` as the other finders do and has the extension installed after it."""

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
    """Loads `lmdeploy` with its own loader, which then stands in its place again."""

    def __init__(self, loader: Any, finder: Any) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # whoever only looks for the package asks for its files

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
            sys.meta_path.remove(self._finder)  # last: an import that fails may be tried again


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
    # Printed here: a thread that ends with SystemExit says nothing.
    print(f"Qwen3-VL extension of LMDeploy: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _value() -> str:
    return os.environ.get(VARIABLE, "").strip().lower()


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qwen3vl-grpc")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"
