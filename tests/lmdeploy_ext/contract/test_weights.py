"""Every weight and every configuration that TurboMind gets from a checkpoint, on the stock builders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape
from tests.lmdeploy_ext.contract.expected import Expected, GateUp, expected_configs

pytestmark = [pytest.mark.slow, pytest.mark.host]
DENSE_TIED = EngineShape()
SHAPES = (
    DENSE_TIED,
    EngineShape(tied=False, vision_head=72, legacy=True, intermediate=200),
    EngineShape(moe=True, tied=True, vision_head=72),
    EngineShape(moe=True, tied=False, legacy=True),
)


def _export(checkpoint: str, result: str, **changes: Any) -> dict[str, Any]:
    from tests.lmdeploy_ext.contract.exports import export

    return export(checkpoint, result, **changes)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def exported(
    request: pytest.FixtureRequest,
    engine_checkpoint: Callable[[EngineShape], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Expected, dict[str, Any], dict[str, torch.Tensor]]:
    """What the checkpoint demands, what was read and configured, and the tensors."""
    folder = engine_checkpoint(request.param)
    result = tmp_path_factory.mktemp("export") / "tensors.pt"
    seen = run(_export, folder, result=result)
    return Expected(folder), seen, torch.load(result)


def test_every_tensor_of_the_engine_is_exact(exported: Any) -> None:
    expected, _, held = exported
    assert held.keys() == expected.tensors.keys(), "none missing, none besides"
    widths = []
    for path, wanted in expected.tensors.items():
        tensor = held[path]
        if isinstance(wanted, GateUp):
            (width,) = wanted.blocks(tensor)
            widths.append((path.count("experts"), width))
        else:
            assert tensor.dtype == torch.bfloat16, path
            assert torch.equal(tensor, wanted), path
    assert len(set(widths)) == 1, "all MLPs go through one kernel"


def test_every_tensor_of_the_checkpoint_is_used(exported: Any) -> None:
    from lmdeploy_ext.turbomind.names import DEEPSTACK

    expected, seen, _ = exported
    read = {name.removesuffix(".weight") if _packed(name) else name for name in seen["read"]}
    deepstack = {name for name in expected.file if DEEPSTACK.fullmatch(name)}
    assert len(deepstack) == 2 * 6, "two mergers: norm and two matrices, weight and bias"
    assert expected.used == expected.file.keys() - deepstack
    assert expected.used <= read
    # The tree has no place for DeepStack: whoever adds it reads all of its tensors, or nobody does.
    assert read - expected.used in (deepstack, set())


def _packed(name: str) -> bool:
    return name.endswith(("experts.gate_up_proj.weight", "experts.down_proj.weight"))


def test_every_field_of_the_configurations(exported: Any) -> None:
    expected, seen, held = exported
    found = seen["configs"]
    matrices = {path: found.pop(path) for path in list(found) if _is_matrix(found[path])}
    wanted = expected_configs(expected.config)
    assert found.keys() == wanted.keys()
    for path, fields in wanted.items():
        if fields["module_type"] == "FfnWeight":
            # Whether SiLU is part of the product is the kernel's business: it says so here.
            fields = fields | {"fuse_silu": found[path]["fuse_silu"]}
        assert found[path] == fields, path
    assert {f"{path}.weight" for path in matrices} < held.keys()
    for path, fields in matrices.items():
        rows, columns = held[f"{path}.weight"].shape
        assert (fields["input_dim"], fields["output_dim"]) == (rows, columns), path
        assert fields["has_bias"] == (f"{path}.bias" in held), path
        assert fields["data_type"] == "DataType.TYPE_BF16"


def _is_matrix(fields: dict[str, Any]) -> bool:
    return bool(fields["module_type"] == "LinearWeight")
