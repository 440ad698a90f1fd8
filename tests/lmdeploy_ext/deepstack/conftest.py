"""Checkpoints and a compiler for the tests of DeepStack."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_ext.deepstack import library


@pytest.fixture(scope="session")
def compiler() -> str:
    """A C compiler; skips what needs one where there is none."""
    try:
        return library.find_compiler()
    except library.LibraryUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Random checkpoints by their dtype and the fields of their `EngineShape`, each written once."""
    import torch

    from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape
    from tests.lmdeploy_ext.deepstack.checkpoints import write_loud_checkpoint

    root = tmp_path_factory.mktemp("loud")

    def write(dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
        shape = EngineShape(**fields)
        path = root / f"{shape.name}-{dtype}"
        return path if path.exists() else write_loud_checkpoint(path, shape, dtype=dtype)

    return write
