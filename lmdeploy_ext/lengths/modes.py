"""Decides whether TurboMind counts lengths of strings in this process. Importing this module imports
neither torch nor LMDeploy.

    mode      if the functions of TurboMind's xgrammar cannot be intercepted
    auto      a warning; the grammar counts lengths up to 64, longer ones are checked after generation
    require   an error
    off       the same as where it is not possible, by choice
"""

from __future__ import annotations

import logging

from lmdeploy_ext import host
from lmdeploy_ext.deepstack.library import attach_to_turbomind
from lmdeploy_ext.deepstack.state import Mode
from lmdeploy_ext.lengths.binding import Library, native
from lmdeploy_ext.patch import ExtensionError, HostDrift

INSTEAD = "the grammar counts lengths of strings up to 64, longer ones are checked after generation"
logger = logging.getLogger("lmdeploy_ext")


class LengthsUnavailable(ExtensionError):
    """Limits of lengths are required and not available; the message says why."""


def enter(mode: Mode) -> Library | None:
    """Intercept the functions of TurboMind's xgrammar. LMDeploy's module must be loaded.

    Returns None where TurboMind does not count lengths. Raises LengthsUnavailable where the mode is
    ``require``.
    """
    if mode is Mode.OFF:
        logger.info("TurboMind does not count lengths of strings, as asked for: %s.", INSTEAD)
        return None
    problem = _attach()
    if problem is None:
        return native()
    give_up(mode, problem)
    return None


def give_up(mode: Mode, problem: str) -> None:
    """Say why TurboMind does not count lengths; raises LengthsUnavailable where the mode is
    ``require``."""
    if mode is Mode.REQUIRE:
        raise LengthsUnavailable(
            f"TurboMind cannot be given limits of lengths: {problem}. With auto, {INSTEAD}."
        )
    logger.warning("TurboMind cannot be given limits of lengths: %s. So %s.", problem, INSTEAD)


def _attach() -> str | None:
    """Attach the library. Returns None if every call leads to it, otherwise the problem."""
    try:
        host.check_release()
    except HostDrift as error:
        return "; ".join(error.problems)
    return attach_to_turbomind(native)
