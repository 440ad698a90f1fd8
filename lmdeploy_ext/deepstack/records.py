"""The one change of LMDeploy's Python that DeepStack needs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lmdeploy_ext.patch import Patch, Record


def _close(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def replacement(self: Any) -> None:
        original(self)
        from lmdeploy_ext.deepstack import engine

        engine.stop(getattr(self, "source_model", None))

    return replacement


RECORDS: tuple[Record, ...] = (
    Patch(
        name="DeepStack: close",
        target="lmdeploy.turbomind.turbomind:TurboMind.close",
        signature="(self)",
        why="The next engine of the process can have DeepStack only once this one is gone.",
        remove_when="LMDeploy has DeepStack on TurboMind",
        replace=_close,
    ),
)
