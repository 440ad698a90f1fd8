"""The state of DeepStack in this process: the mode in force, and the engine that listens to the hook.

All of it is here; other modules read and change it through `STATE`. Imports neither torch nor LMDeploy.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy_ext.deepstack.features import Features


class Mode(Enum):
    """See `lmdeploy_ext.deepstack`."""

    AUTO = "auto"
    REQUIRE = "require"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Status:
    """DeepStack in this process.

    Attributes:
        mode: what was asked for; None before `lmdeploy_ext.install`.
        active: whether models with vision get it on TurboMind.
        reason: why it is not active, for people; empty when it is.
    """

    mode: Mode | None = None
    active: bool = False
    reason: str = "the extension is not installed"


@dataclass(slots=True)
class State:
    """What changes while the process runs.

    Attributes:
        status: set by `lmdeploy_ext.deepstack.modes`.
        owner: lives as long as the engine that listens; set by `lmdeploy_ext.deepstack.engine`.
        features: computes for that engine.
    """

    status: Status = Status()
    owner: weakref.ref[Any] | None = None
    features: Features | None = None

    @property
    def running(self) -> bool:
        """Whether an engine with DeepStack runs in this process."""
        return self.owner is not None and self.owner() is not None


STATE = State()


def status() -> Status:
    """The mode in force."""
    return STATE.status


def running() -> bool:
    """Whether an engine with DeepStack runs in this process."""
    return STATE.running


def forwards() -> int:
    """Number of forwards with images of the running engine so far."""
    return 0 if STATE.features is None else STATE.features.forwards
