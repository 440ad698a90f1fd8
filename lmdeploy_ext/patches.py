"""Every change to LMDeploy, in the order of application."""

from __future__ import annotations

from lmdeploy_ext.deepstack.records import RECORDS as DEEPSTACK
from lmdeploy_ext.patch import Record
from lmdeploy_ext.turbomind.records import RECORDS as TURBOMIND
from lmdeploy_ext.vision_off.records import RECORDS as VISION_OFF

PATCHES: tuple[Record, ...] = (*TURBOMIND, *DEEPSTACK, *VISION_OFF)

WITHOUT_TURBOMIND: tuple[Record, ...] = VISION_OFF
"""The changes that remain if TurboMind is not registered for Qwen3-VL."""
