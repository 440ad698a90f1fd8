"""Every intrusion into LMDeploy, in the order in which they are applied."""

from __future__ import annotations

from lmdeploy_ext.patch import Record
from lmdeploy_ext.turbomind.records import RECORDS as TURBOMIND

PATCHES: tuple[Record, ...] = (*TURBOMIND,)
