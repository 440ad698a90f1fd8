"""The mergers against those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy_ext.deepstack import mergers
from lmdeploy_ext.deepstack.mergers import NAMES, Merger

HIDDEN, OUT, PATCHES = 24, 40, 4 * 50


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    wide = 4 * HIDDEN
    shapes = [(wide,), (wide,), (wide, wide), (wide,), (OUT, wide), (OUT,)]
    return {name: torch.randn(shape) * 0.3 for name, shape in zip(NAMES, shapes, strict=True)}


def merger(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Merger:
    return Merger(lambda name: tensors[name].to(dtype), 4 * HIDDEN, OUT)


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_those_of_transformers(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

    config = Qwen3VLVisionConfig(hidden_size=HIDDEN, out_hidden_size=OUT)
    oracle = theirs.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True).to(dtype)
    oracle.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()})
    patches = (torch.randn(PATCHES, HIDDEN) * 3).to(dtype)
    out = torch.empty(PATCHES // 4, OUT, dtype=dtype)
    monkeypatch.setattr(mergers, "CHUNK", 16)  # several chunks, the last one shorter
    with torch.inference_mode():
        merger(tensors, dtype)(patches, [(0, PATCHES // 4)], out)
        wanted = oracle(patches)
    # GELU by tanh instead of erf would differ by 5e-4 of the largest, the norm before the shuffle by more.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (out - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_ranges_choose_tokens(tensors: dict[str, torch.Tensor]) -> None:
    patches = torch.randn(PATCHES, HIDDEN)
    whole = torch.empty(PATCHES // 4, OUT)
    merger(tensors)(patches, [(0, PATCHES // 4)], whole)
    some = torch.empty(14, OUT)
    merger(tensors)(patches, [(3, 10), (43, 50)], some)
    assert torch.allclose(some, torch.cat([whole[3:10], whole[43:50]]), atol=1e-5)


def test_a_tensor_of_another_shape_is_named(tensors: dict[str, torch.Tensor]) -> None:
    wrong = {**tensors, "linear_fc2.weight": torch.zeros(OUT, 8)}
    with pytest.raises(ValueError, match=r"linear_fc2.weight has \[40, 8\] instead of \[40, 96\]"):
        merger(wrong)


def test_the_names_are_those_of_checkpoints() -> None:
    from safetensors import safe_open

    folder = Path(__file__).parents[3] / "service" / "bundled" / "drawings"
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name for name in file.keys() if "deepstack" in name}  # noqa: SIM118
    assert stored == {
        f"model.visual.deepstack_merger_list.{k}.{name}" for k in range(3) for name in NAMES
    }
