"""Decides whether TurboMind has DeepStack in this process. Importing this module imports neither
torch nor LMDeploy."""

from __future__ import annotations

import logging
import os

from lmdeploy_ext.deepstack.binding import hook
from lmdeploy_ext.deepstack.library import attach_to_turbomind
from lmdeploy_ext.deepstack.state import STATE, Mode, Status, status
from lmdeploy_ext.patch import ExtensionError

VARIABLE = "LMDEPLOY_QWEN3VL_DEEPSTACK"
logger = logging.getLogger("lmdeploy_ext")


class DeepStackUnavailable(ExtensionError):
    """DeepStack is required and not available; the message says why and what to do."""


def fell_back() -> bool:
    """Whether the mode ``auto`` has installed the extension without TurboMind."""
    return status().mode is Mode.AUTO and not status().active


def chosen(argument: str | Mode | None) -> Mode:
    """The mode: from the argument, else from the environment, else ``auto``.

    Raises:
        DeepStackUnavailable: the mode does not exist.
    """
    if isinstance(argument, Mode):
        return argument
    value = argument if argument is not None else os.environ.get(VARIABLE, "").strip().lower()
    known = [mode.value for mode in Mode]
    if value not in (*known, ""):
        raise DeepStackUnavailable(f"{VARIABLE}={value!r} is not one of {', '.join(known)}")
    return Mode(value or "auto")


def enter(mode: Mode) -> Status:
    """Intercept TurboMind's functions, unless the mode is ``off``. LMDeploy's module must be
    loaded.

    Raises:
        DeepStackUnavailable: the mode is ``require`` and the functions cannot be intercepted.
    """
    if mode is Mode.OFF:
        logger.warning(
            "DeepStack is off, as asked for: TurboMind will read and locate worse than the "
            "model can."
        )
        STATE.status = Status(mode, False, f"switched off ({VARIABLE}=off)")
        return STATE.status
    problem = attach_to_turbomind(hook)
    if problem is None:
        STATE.status = Status(mode, True, "")
    elif mode is Mode.REQUIRE:
        raise DeepStackUnavailable(
            f"TurboMind cannot be given DeepStack: {problem}. {VARIABLE}=auto takes LMDeploy's "
            "PyTorch engine instead, and off takes TurboMind without DeepStack."
        )
    else:
        logger.warning(
            "TurboMind cannot be given DeepStack: %s. LMDeploy serves Qwen3-VL with its PyTorch "
            "engine instead, which has it and is slower. %s=off takes TurboMind without DeepStack.",
            problem,
            VARIABLE,
        )
        STATE.status = Status(mode, False, problem)
    return STATE.status


def reject(problem: str) -> None:
    """Turn DeepStack off in this process, because its results are wrong."""
    logger.warning("TurboMind cannot be given DeepStack: %s", problem)
    hook().detach()
    STATE.status = Status(STATE.status.mode, False, problem)


def leave() -> None:
    """Restore the original functions, unless a running engine needs the hook."""
    if STATE.status.active:
        if STATE.running:
            logger.warning("An engine with DeepStack still runs: its hook stays in place.")
        else:
            hook().detach()
    STATE.status = Status()


def check_unchanged(wanted: Mode) -> None:
    """Refuse a different mode for an extension that is already installed.

    Raises:
        DeepStackUnavailable: the current mode has another effect.
    """
    found = status()
    same = not found.active if wanted is Mode.OFF else found.active or wanted is found.mode
    if not same:
        raise DeepStackUnavailable(
            f"DeepStack was asked for as {wanted.value!r}, but the extension is already installed "
            f"with {found.mode.value if found.mode else 'none'!r}: call lmdeploy_ext.uninstall() "
            f"first, or set {VARIABLE}={wanted.value}"
        )
