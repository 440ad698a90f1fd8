"""Qwen3-VL for LMDeploy's TurboMind: position packing, split vision encoder, model registration.

Importing this package does not change LMDeploy; calling `install` does.
"""

from __future__ import annotations


def install(deepstack: str | None = None) -> None:
    """Register Qwen3-VL with the installed LMDeploy, in this process. A second call does nothing.

    Args:
        deepstack: ``auto``, ``require`` or ``off``; see `lmdeploy_ext.deepstack`. None uses the
        variable ``LMDEPLOY_QWEN3VL_DEEPSTACK``, else ``auto``. If ``auto`` cannot add DeepStack to
        TurboMind, it logs a warning and does not register TurboMind for Qwen3-VL: LMDeploy then
        uses its PyTorch engine.

    Raises:
        lmdeploy_ext.host.HostUnavailable: LMDeploy is missing or its native module does not load.
        lmdeploy_ext.patch.HostDrift: LMDeploy is not the one that the extension was written for.
        lmdeploy_ext.deepstack.DeepStackUnavailable: DeepStack is required and not available, or the
        extension is already installed with another mode.
            All are `lmdeploy_ext.patch.ExtensionError`. Their messages say what to do, and LMDeploy
            is unchanged.
    """
    from lmdeploy_ext import host
    from lmdeploy_ext.autoload import announce
    from lmdeploy_ext.deepstack import Mode, modes
    from lmdeploy_ext.patch import apply_all
    from lmdeploy_ext.patches import chosen
    from lmdeploy_ext.promises import PROMISES

    mode = modes.chosen(deepstack)
    if is_installed() or modes.fell_back():
        if deepstack is not None:
            modes.check_unchanged(mode)
        return
    promises = tuple(promise for promise in PROMISES if promise.applies)
    shown = [promise.shown for promise in PROMISES]
    host.check()
    found = modes.enter(mode)
    serves = found.active or mode is Mode.OFF
    try:
        apply_all(chosen(promises, serves=serves), host.remedy(promises), host.problems(promises))
    except BaseException:
        modes.leave()
        raise
    announce(shown, serves=serves)


def uninstall() -> None:
    """Undo `install`. Running engines are not affected."""
    from lmdeploy_ext.deepstack import modes
    from lmdeploy_ext.patch import revert_all

    revert_all()
    modes.leave()


def is_installed() -> bool:
    """Whether every record of `lmdeploy_ext.patches.SERVING` is applied, so that TurboMind serves
    Qwen3-VL."""
    from lmdeploy_ext.patch import applied
    from lmdeploy_ext.patches import SERVING

    return {record.name for record in SERVING} <= set(applied())
