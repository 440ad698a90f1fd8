"""Checkpoints for the contract tests, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape


@pytest.fixture(scope="session")
def engine_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[EngineShape], Path]:
    """Folder of a checkpoint of the given shape."""
    from tests.lmdeploy_ext.contract.engine_checkpoints import write_engine_checkpoint

    root = tmp_path_factory.mktemp("engine-checkpoints")

    def folder(shape: EngineShape) -> Path:
        path = root / shape.name
        return path if path.exists() else write_engine_checkpoint(path, shape)

    return folder
