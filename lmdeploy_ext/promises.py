"""Every promise that plain LMDeploy keeps with the extension, in the order in which the log shows
them."""

from __future__ import annotations

from lmdeploy_ext.grammars.records import GRAMMARS
from lmdeploy_ext.media.records import IMAGES, VIDEO
from lmdeploy_ext.promise import Promise

PROMISES: tuple[Promise, ...] = (GRAMMARS, IMAGES, VIDEO)
