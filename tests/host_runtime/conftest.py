"""Checkpoints for the tests of the host runtime."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 checkpoint without vision."""
    from tests.host_runtime.checkpoints import write_text_checkpoint

    return write_text_checkpoint(tmp_path_factory.mktemp("text-checkpoint"))
