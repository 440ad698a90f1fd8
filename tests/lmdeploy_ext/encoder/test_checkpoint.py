"""Loading the tower alone from safetensors: what is read, what is refused, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lmdeploy_ext.encoder import VisionConfig, VisionEncoder
from lmdeploy_ext.encoder.checkpoint import CheckpointError
from lmdeploy_ext.encoder.weights import checkpoint_shapes
from tests.lmdeploy_ext.encoder.towers import TINY, oracle, ours, random_image

MEMORY_FACTOR = 1.2  # peak over the tower's own weights


def write_checkpoint(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    vision_config: dict,
    prefix: str = "model.visual.",
    shards: int = 1,
    others: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A checkpoint folder with one file, or several and an index."""
    stored = {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    stored |= others or {"model.language_model.norm.weight": torch.zeros(3)}
    (folder / "config.json").write_text(json.dumps({"vision_config": vision_config}))
    (folder / "preprocessor_config.json").write_text("{}")
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    names = [f"model-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)]
    weight_map = {key: names[k % shards] for k, key in enumerate(stored)}
    for name in names:
        save_file({k: v for k, v in stored.items() if weight_map[k] == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
@pytest.mark.parametrize("shards", [1, 3])
def test_same_features_as_from_tensors(tmp_path: Path, prefix: str, shards: int) -> None:
    model = oracle()
    write_checkpoint(tmp_path, model.state_dict(), TINY, prefix, shards)
    images = [random_image(np.random.default_rng(0), 4, 6)]
    expected = ours(model).encode(images)
    loaded = VisionEncoder.from_checkpoint(tmp_path).encode(images)
    torch.testing.assert_close(loaded.embeddings, expected.embeddings, rtol=0, atol=0)
    for have, want in zip(loaded.deepstack, expected.deepstack, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


def test_converts_the_stored_type(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in oracle().state_dict().items()}
    write_checkpoint(tmp_path, tensors, TINY)
    for dtype in (torch.float32, torch.bfloat16):
        encoder = VisionEncoder.from_checkpoint(tmp_path, dtype)
        assert encoder.dtype == dtype
        assert (
            encoder.encode([random_image(np.random.default_rng(0), 2, 2)]).embeddings.dtype == dtype
        )
        assert not any(parameter.is_meta for parameter in encoder.parameters())


def test_the_encoder_does_not_reference_the_mapped_file(tmp_path: Path) -> None:
    """A checkpoint that is overwritten later must not change a loaded tower."""
    model = oracle()
    write_checkpoint(tmp_path, model.state_dict(), TINY)
    encoder = VisionEncoder.from_checkpoint(tmp_path)
    image = random_image(np.random.default_rng(0), 2, 4)
    before = encoder.encode([image]).embeddings.clone()
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(bytes(file.stat().st_size // 2))
    torch.testing.assert_close(encoder.encode([image]).embeddings, before, rtol=0, atol=0)


@pytest.mark.parametrize("shards", [1, 2])
def test_one_error_names_all_problems(tmp_path: Path, shards: int) -> None:
    tensors = dict(oracle().state_dict())
    del tensors["blocks.2.norm1.bias"]
    tensors["blocks.9.norm1.bias"] = torch.zeros(128)
    tensors["merger.linear_fc2.weight"] = torch.zeros(5, 512)
    write_checkpoint(tmp_path, tensors, TINY, shards=shards)
    with pytest.raises(CheckpointError) as caught:
        VisionEncoder.from_checkpoint(tmp_path)
    message = str(caught.value)
    assert "missing: blocks.2.norm1.bias;" in message
    assert "unexpected: blocks.9.norm1.bias;" in message
    assert "merger.linear_fc2.weight has [5, 512] instead of [96, 512]" in message


def test_a_tensor_of_the_index_that_its_shard_lacks_is_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, oracle().state_dict(), TINY, shards=2)
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"nothing": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="missing: "):
        VisionEncoder.from_checkpoint(tmp_path)


def test_refuses_quantised_tensors(tmp_path: Path) -> None:
    tensors = dict(oracle().state_dict())
    key = "blocks.0.mlp.linear_fc1.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    write_checkpoint(tmp_path, tensors, TINY)
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight has unsupported type"):
        VisionEncoder.from_checkpoint(tmp_path)


def test_missing_files_and_mismatched_processor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, oracle().state_dict(), TINY)
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 14}')
    with pytest.raises(ValueError, match="patch_size is 16 in vision_config but 14"):
        VisionEncoder.from_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        VisionEncoder.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no vision_config"):
        VisionEncoder.from_checkpoint(tmp_path)


MEASURE = """
import sys, torch
import lmdeploy_ext.encoder.model as model

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

torch.ones(64, 64) @ torch.ones(64, 64)
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
encoder = model.VisionEncoder.from_checkpoint(sys.argv[1], getattr(torch, sys.argv[2]))
weights = sum(parameter.nbytes for parameter in encoder.parameters())
print((status("VmHWM") - before) / weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.slow  # writes and loads a tower of the 2B model's shape
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory(tmp_path: Path, dtype: str) -> None:
    """Resident memory while loading a 230 MB tower, out of a file with as much of other weights."""
    shape = {
        "depth": 4,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [2],
    }
    shapes = checkpoint_shapes(VisionConfig.from_dict(shape))
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    others = {"model.language_model.weight": torch.ones(110 << 20, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path, tensors, shape, others=others)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=False,
    )
    (tmp_path / "model.safetensors").unlink()
    assert done.returncode == 0, done.stderr
    assert 0.9 <= float(done.stdout) <= MEMORY_FACTOR
