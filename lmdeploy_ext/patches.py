"""Every change to LMDeploy, in the order of application."""

from __future__ import annotations

from lmdeploy_ext.deepstack.records import RECORDS as DEEPSTACK
from lmdeploy_ext.patch import Record
from lmdeploy_ext.promise import Promise
from lmdeploy_ext.promises import PROMISES
from lmdeploy_ext.turbomind.records import RECORDS as TURBOMIND
from lmdeploy_ext.vision_off.records import RECORDS as VISION_OFF

SERVING: tuple[Record, ...] = (*TURBOMIND, *DEEPSTACK)
"""The changes with which TurboMind serves Qwen3-VL."""

PATCHES: tuple[Record, ...] = (
    *SERVING,
    *VISION_OFF,
    *(record for promise in PROMISES for record in promise.records),
)
"""Every change that there is."""


def chosen(promises: tuple[Promise, ...], *, serves: bool) -> tuple[Record, ...]:
    """The changes with some of the promises, and with or without TurboMind for Qwen3-VL."""
    left_out = {
        record.name for one in PROMISES if one not in promises for record in one.records
    } | {record.name for record in SERVING if not serves}
    return tuple(record for record in PATCHES if record.name not in left_out)
