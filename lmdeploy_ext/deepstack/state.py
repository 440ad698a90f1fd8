"""The state of DeepStack in this process: its mode, and the engine that receives the hook's events.

All other modules read and change this state through `STATE`. Imports neither torch nor LMDeploy.
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
    """The status of DeepStack in this process.

    Attributes:
        mode: the requested mode; None before `lmdeploy_ext.install`.
        active: whether models with vision have DeepStack on TurboMind.
        reason: text that explains why DeepStack is not active; empty if it is.
    """

    mode: Mode | None = None
    active: bool = False
    reason: str = "the extension is not installed"


@dataclass(slots=True)
class State:
    """The mutable state.

    Attributes:
        status: set by `lmdeploy_ext.deepstack.modes`.
        owner: an object that lives as long as the engine with DeepStack; set by
            `lmdeploy_ext.deepstack.engine`.
        features: the listener of that engine.
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
    """The current status."""
    return STATE.status


def running() -> bool:
    """Whether an engine with DeepStack runs in this process."""
    return STATE.running


def forwards() -> int:
    """Number of forwards with images of the running engine so far."""
    return 0 if STATE.features is None else STATE.features.forwards
