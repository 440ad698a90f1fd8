"""Qwen3-VL for LMDeploy's TurboMind: position packing, split vision encoder, model registration.

Importing this package changes nothing; `install` does.
"""

from __future__ import annotations


def install() -> None:
    """Register Qwen3-VL with the installed LMDeploy, in this process. A second call does nothing.

    Raises:
        lmdeploy_ext.host.HostUnavailable: LMDeploy is missing or its native module does not load.
        lmdeploy_ext.patch.HostDrift: LMDeploy is not the one that the extension was written for.
            Both are `lmdeploy_ext.patch.ExtensionError`, say what to do, and leave LMDeploy as
            it was.
    """
    from lmdeploy_ext import host
    from lmdeploy_ext.autoload import announce
    from lmdeploy_ext.patch import apply_all
    from lmdeploy_ext.patches import PATCHES

    if not is_installed():
        host.check()
        apply_all(PATCHES, host.REMEDY, host.problems())
        announce()


def uninstall() -> None:
    """Give LMDeploy back as it was before `install`. Engines that already run stay as they are."""
    from lmdeploy_ext.patch import revert_all

    revert_all()


def is_installed() -> bool:
    """Whether every record of `lmdeploy_ext.patches.PATCHES` is in force."""
    from lmdeploy_ext.patch import applied
    from lmdeploy_ext.patches import PATCHES

    return {record.name for record in PATCHES} <= set(applied())
