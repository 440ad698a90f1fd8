"""Reads the vision tower's tensors from a safetensors checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PREFIXES = ("model.visual.", "visual.")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAPPED_BYTES = 8 << 20


class CheckpointError(ValueError):
    """The checkpoint's vision tensors do not match its configuration."""


def visual_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Tensor name without prefix -> its file and its key in the file."""
    index = folder / _INDEX
    if index.is_file():
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    elif (folder / _SINGLE).is_file():
        with safe_open(folder / _SINGLE, framework="pt") as file:
            weight_map = dict.fromkeys(file.keys(), _SINGLE)
    else:
        raise FileNotFoundError(f"the checkpoint has neither {_INDEX} nor {_SINGLE}")
    found = {}
    for key, filename in weight_map.items():
        for prefix in PREFIXES:
            if key.startswith(prefix):
                found[key.removeprefix(prefix)] = (folder / filename, key)
    return found


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise one `CheckpointError` that names every missing, unexpected and wrongly shaped
    tensor."""
    problems = []
    for title, names in (
        ("missing", expected.keys() - found.keys()),
        ("unexpected", found.keys() - expected.keys()),
    ):
        if names:
            problems.append(f"{title}: {', '.join(sorted(names))}")
    wrong = [
        f"{name} has {list(found[name])} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name] != shape
    ]
    if wrong:
        problems.append(f"wrong shape: {', '.join(wrong)}")
    if problems:
        raise CheckpointError("vision tower does not fit its configuration; " + "; ".join(problems))


def read_visual(
    folder: Path, expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Check all shapes, then yield (name, tensor on the CPU) one by one.

    A tensor may be a view into the mapped file: copy it before requesting the next one.
    """
    files: dict[Path, list[tuple[str, str]]] = {}
    for name, (path, key) in visual_files(folder).items():
        files.setdefault(path, []).append((name, key))
    shapes = {}
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            for name, key in names:
                if key in stored:  # an index may list a tensor that its shard lacks
                    shapes[name] = tuple(file.get_slice(key).get_shape())
    check_tensors(expected, shapes)
    for path, names in files.items():
        while names:
            mapped = 0
            # Mapped pages count as memory of the process: reopen the file from time to time.
            with safe_open(path, framework="pt") as file:
                while names and mapped < _MAPPED_BYTES:
                    name, key = names.pop()
                    tensor = _checked(name, file.get_tensor(key))
                    mapped += tensor.nbytes
                    yield name, tensor


def _checked(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"vision tensor {name} has unsupported type {tensor.dtype}")
    return tensor
