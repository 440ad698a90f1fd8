"""The changes to LMDeploy's Python code that DeepStack needs."""

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


def _is_supported(original: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(original)
    def replacement(model_path: str, trust_remote_code: bool = False) -> bool:
        if not original(model_path, trust_remote_code):
            return False
        from lmdeploy.archs import get_model_arch

        from lmdeploy_ext import host
        from lmdeploy_ext.deepstack import Mode, selftest, status

        architecture, _ = get_model_arch(model_path, trust_remote_code=trust_remote_code)
        if status().mode is not Mode.AUTO or architecture not in host.ARCHITECTURES:
            return True
        return selftest.verify() is None

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
    Patch(
        name="DeepStack: self-test",
        target="lmdeploy.turbomind.supported_models:is_supported",
        signature="(model_path, trust_remote_code=False)",
        why="With `auto`, LMDeploy has to take its PyTorch engine where the self-test fails, and it "
        "asks here before it chooses.",
        remove_when="LMDeploy has DeepStack on TurboMind",
        replace=_is_supported,
    ),
)
