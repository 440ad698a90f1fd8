"""Every intrusion into LMDeploy, in the order in which they are applied."""

from __future__ import annotations

from lmdeploy_ext.patch import Record
from lmdeploy_ext.turbomind.records import RECORDS as TURBOMIND
from lmdeploy_ext.vision_off.records import RECORDS as VISION_OFF

PATCHES: tuple[Record, ...] = (*TURBOMIND, *VISION_OFF)
