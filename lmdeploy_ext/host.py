"""The LMDeploy that the extension is written for: its versions and every name of it that we touch.

`NAMES` lists what our modules import or replace. A name that is missing in the installed LMDeploy
is drift, and `check` says so in one error before anything is changed.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lmdeploy_ext.patch import ExtensionError, HostDrift

FIRST, BEFORE = (0, 18, 0), (0, 19)
"""Verified releases: from FIRST on, before BEFORE."""

ARCHITECTURES = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")

REMEDY = (
    "Install a verified release (pip install 'lmdeploy>=0.18.0,<0.19'), use a newer release of "
    "this package, or run LMDeploy without the extension: it then serves Qwen3-VL with its "
    "PyTorch engine (--backend pytorch)."
)

SUPPORTED_ARCHS = "lmdeploy.turbomind.supported_models:SUPPORTED_ARCHS"
INPUT_MODELS = "lmdeploy.turbomind.models.base:INPUT_MODELS"
NATIVE_VISION = "lmdeploy.vl.model.qwen3:Qwen3VLModel._turbomind_native_vision"

NAMES = (
    SUPPORTED_ARCHS,
    INPUT_MODELS,
    NATIVE_VISION,
)


class HostUnavailable(ExtensionError):
    """LMDeploy is not there, or its TurboMind module cannot be loaded on this machine."""


def installed_version() -> str:
    """The release of the installed LMDeploy, as its distribution says.

    Raises:
        HostUnavailable: there is none.
    """
    try:
        return version("lmdeploy")
    except PackageNotFoundError:
        raise HostUnavailable(
            "LMDeploy is not installed: pip install 'lmdeploy>=0.18.0,<0.19'"
        ) from None


def check() -> None:
    """Refuse an LMDeploy that the extension is not written for. Imports LMDeploy, changes nothing.

    Raises:
        HostUnavailable: LMDeploy is missing, or its native module does not load.
        HostDrift: another release, Qwen3-VL is already supported, or a name is missing.
    """
    found = installed_version()
    if not FIRST <= _release(found) < BEFORE:
        raise HostDrift([f"LMDeploy {found} is not verified"], REMEDY)
    _check_native_module()
    present = [name for name in ARCHITECTURES if name in _resolve(SUPPORTED_ARCHS)]
    if present:
        raise HostDrift(
            [f"LMDeploy {found} itself supports {', '.join(present)} on TurboMind"],
            "The extension is no longer needed: use this LMDeploy without it, or the extension "
            "with lmdeploy>=0.18.0,<0.19.",
        )
    problems = [problem for name in NAMES if (problem := missing(name))]
    if problems:
        raise HostDrift(problems, REMEDY)


def missing(name: str) -> str | None:
    """One sentence if ``module:attribute`` does not exist in the installed LMDeploy, else None."""
    try:
        _resolve(name)
    except (ImportError, AttributeError) as error:
        return f"{name} does not exist ({error})"
    return None


def _check_native_module() -> None:
    try:
        turbomind = importlib.import_module("lmdeploy.turbomind")
    except ImportError as error:
        raise HostUnavailable(f"LMDeploy cannot be imported: {error}") from error
    if turbomind.is_available():
        return
    cause = turbomind._import_error
    advice = "Reinstall LMDeploy with its CUDA libraries."
    if "libcuda.so.1" in str(cause):
        advice = (
            "libcuda.so.1 belongs to the NVIDIA driver: run on a machine with a GPU and its driver "
            "(in Docker with --gpus all)."
        )
    raise HostUnavailable(f"LMDeploy's TurboMind module cannot be loaded: {cause}. {advice}")


def _resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    return found


def _release(text: str) -> tuple[int, ...]:
    """``"0.18.1rc1+cu12"`` -> ``(0, 18, 1)``."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
