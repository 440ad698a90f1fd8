"""The GGUF files are made without torch, which whoever tries llama.cpp may not have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.random_model import write_random_model
from service.wiring import BUNDLED_MODEL
from tests.model_servers.gguf_files import read_weights
from tests.model_servers.processes import Missing, gguf_files

pytestmark = pytest.mark.slow


def test_weights_are_those_that_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    path = BUNDLED_MODEL / "model.safetensors"
    expected = load_file(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    found = read_weights(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(found[name]), tensor.float()), name


def test_random_weights_become_files_of_llama_cpp(tmp_path: Path) -> None:
    checkpoint = write_random_model(tmp_path / "random", BUNDLED_MODEL, size="tiny")
    try:
        folder = gguf_files(tmp_path / "gguf", checkpoint)
    except Missing as missing:
        pytest.skip(str(missing))
    weights = (checkpoint / "model.safetensors").stat().st_size
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert written > 1.9 * weights  # float32 instead of bfloat16
