"""Checkpoints for the tests of the host runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 checkpoint without vision."""
    from tests.host_runtime.checkpoints import write_text_checkpoint

    return write_text_checkpoint(tmp_path_factory.mktemp("text-checkpoint"))


@pytest.fixture(scope="session")
def vision_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny random Qwen3-VL checkpoints by the fields of their `EngineShape`, each written once."""
    from tests.host_runtime.checkpoints import write_vision_checkpoint
    from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape

    folder = tmp_path_factory.mktemp("vision-checkpoints")

    def write(**fields: Any) -> Path:
        shape = EngineShape(**fields)
        path = folder / shape.name
        return path if path.exists() else write_vision_checkpoint(path, shape)

    return write
