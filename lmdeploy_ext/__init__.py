"""Qwen3-VL for LMDeploy's TurboMind: position packing, split vision encoder, model registration.

Importing this package changes nothing; `install` does.
"""

from __future__ import annotations


def install(deepstack: str | None = None) -> None:
    """Register Qwen3-VL with the installed LMDeploy, in this process. A second call does nothing.

    Args:
        deepstack: ``auto``, ``require`` or ``off``; see `lmdeploy_ext.deepstack`. None: as the
            variable ``LMDEPLOY_QWEN3VL_DEEPSTACK`` says, else ``auto``. Where ``auto`` finds that
            TurboMind cannot be given DeepStack, a warning says so and TurboMind is not offered for
            Qwen3-VL: LMDeploy takes its PyTorch engine.

    Raises:
        lmdeploy_ext.host.HostUnavailable: LMDeploy is missing or its native module does not load.
        lmdeploy_ext.patch.HostDrift: LMDeploy is not the one that the extension was written for.
        lmdeploy_ext.deepstack.DeepStackUnavailable: it is required and cannot be had, or the
            extension is installed with another mode.
            All are `lmdeploy_ext.patch.ExtensionError`, say what to do, and leave LMDeploy as
            it was.
    """
    from lmdeploy_ext import host
    from lmdeploy_ext.autoload import announce
    from lmdeploy_ext.deepstack import Mode, modes
    from lmdeploy_ext.patch import apply_all
    from lmdeploy_ext.patches import PATCHES, WITHOUT_TURBOMIND

    mode = modes.chosen(deepstack)
    if is_installed() or modes.fell_back():
        if deepstack is not None:
            modes.check_unchanged(mode)
        return
    host.check()
    found = modes.enter(mode)
    serves = found.active or mode is Mode.OFF
    try:
        apply_all(PATCHES if serves else WITHOUT_TURBOMIND, host.REMEDY, host.problems())
    except BaseException:
        modes.leave()
        raise
    if serves:
        announce()


def uninstall() -> None:
    """Give LMDeploy back as it was before `install`. Engines that already run stay as they are."""
    from lmdeploy_ext.deepstack import modes
    from lmdeploy_ext.patch import revert_all

    revert_all()
    modes.leave()


def is_installed() -> bool:
    """Whether every record of `lmdeploy_ext.patches.PATCHES` is in force: TurboMind serves Qwen3-VL."""
    from lmdeploy_ext.patch import applied
    from lmdeploy_ext.patches import PATCHES

    return {record.name for record in PATCHES} <= set(applied())
