"""The GGUF files are made without torch, which whoever tries llama.cpp may not have."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

from service.wiring import BUNDLED_MODEL
from tests.model_servers.gguf_files import read_weights

pytestmark = pytest.mark.slow


def test_weights_are_those_that_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    path = BUNDLED_MODEL / "model.safetensors"
    expected = load_file(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    found = read_weights(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(torch.from_numpy(found[name]), tensor.float()), name
