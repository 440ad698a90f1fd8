"""Quantised decoders: FP8 blocks, AWQ, GPTQ and compressed-tensors, with the tower left plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape
from tests.lmdeploy_ext.contract.expected import Expected, GateUp
from tests.lmdeploy_ext.contract.quantised import dequantised, write_twins

pytestmark = [pytest.mark.slow, pytest.mark.host]
DENSE = EngineShape(intermediate=256)
MOE = EngineShape(moe=True, tied=False, intermediate=256)
OLD_AXES = EngineShape(moe=True, tied=False, intermediate=256, legacy=True)
CASES: dict[str, tuple[EngineShape, str, bool]] = {
    "dense-fp8": (DENSE, "fp8", False),
    "dense-awq": (DENSE, "awq", False),
    "dense-gptq": (DENSE, "gptq", False),
    "dense-compressed": (DENSE, "compressed-tensors", False),
    "moe-fp8-each-expert": (MOE, "fp8", False),
    "moe-fp8-packed": (MOE, "fp8", True),
    "moe-fp8-packed-old-axes": (OLD_AXES, "fp8", True),
    "moe-compressed": (MOE, "compressed-tensors", False),
}


def _export_all(checkpoints: dict[str, str], folder: str) -> dict[str, Any]:
    from tests.lmdeploy_ext.contract.exports import export

    return {
        name: export(checkpoint, f"{folder}/{name}.pt") for name, checkpoint in checkpoints.items()
    }


@pytest.fixture(scope="module")
def exported(
    engine_checkpoint: Callable[[EngineShape], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Expected, dict[str, Any], dict[str, torch.Tensor]]]:
    """For each case: what its plain twin demands, what was read, and the tensors of the engine."""
    folder = tmp_path_factory.mktemp("quantised")
    twins = {
        name: write_twins(engine_checkpoint(shape), folder / name, method, packed)
        for name, (shape, method, packed) in CASES.items()
    }
    checkpoints = {name: str(quantised) for name, (quantised, _) in twins.items()}
    seen = run(_export_all, checkpoints, folder, timeout_s=280)
    return {
        name: (Expected(plain), seen[name], torch.load(folder / f"{name}.pt"))
        for name, (_, plain) in twins.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_the_engine_has_the_dequantised_values_of_the_file(name: str, exported: Any) -> None:
    expected, seen, held = exported[name]
    values = dequantised(held, seen["configs"])
    assert values.keys() == expected.tensors.keys()
    quantised = {path.rpartition(".")[0] for path in held if path.endswith(".scales")}
    assert "text_model.layers.0.attention.w_qkv" in quantised
    assert not any(path.startswith("vision_model") for path in quantised)
    assert "text_model.output" not in quantised
    for path, wanted in expected.tensors.items():
        found = values[path].float()
        if isinstance(wanted, GateUp):
            assert len(GateUp(wanted.gate.float(), wanted.up.float()).blocks(found)) == 1, path
        else:
            assert torch.equal(found, wanted.float()), path


@pytest.mark.parametrize("name", CASES)
def test_only_deepstack_and_quantiser_metadata_are_unread(name: str, exported: Any) -> None:
    from lmdeploy_ext.turbomind.names import DEEPSTACK, UNREAD

    _, seen, _ = exported[name]
    left = set(seen["all"]) - set(seen["read"])
    book_keeping = {key for key in left if UNREAD.fullmatch(key)}
    assert bool(book_keeping) == ("gptq" in name or "compressed" in name)
    assert all(DEEPSTACK.fullmatch(key) for key in left - book_keeping)
