from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import Shape, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Path]:
    """Writes each tiny checkpoint once in a session."""
    written: dict[Shape, Path] = {}

    def get(shape: Shape = Shape()) -> Path:
        if shape not in written:
            written[shape] = write_checkpoint(tmp_path_factory.mktemp("ckpt") / shape.name, shape)
        return written[shape]

    return get
