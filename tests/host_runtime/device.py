"""Makes torch agree with the host runtime: one CUDA device whose memory is host memory.

Only LMDeploy's own calls are served; tensors stay on the CPU, which is where TurboMind's
memory is. Nothing here is imported in the process of the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NAME = "host runtime"


def patch_torch_when_imported() -> None:
    """Arm the patch; costs nothing in a process that never imports torch."""
    if os.environ.get("HOST_RUNTIME_MODE"):
        sys.meta_path.insert(0, _TorchFinder())


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Finds torch as ever and patches it after its first import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        load_libraries()
        self.loader.exec_module(module)
        patch_torch(module)


def load_libraries() -> None:
    """Load the stand-ins now, so that they are the ones in the process: some wheels open CUDA's own
    libraries by their full path, and whoever comes second gets what is already loaded."""
    folder = Path(os.environ["HOST_RUNTIME_LIBRARIES"])
    for name in ("libcuda.so.1", "libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def patch_torch(torch: Any) -> None:
    """Answer torch.cuda's questions about the device, and keep tensors where they are."""
    total = int(os.environ["HOST_RUNTIME_MEMORY_MIB"]) << 20
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=total, multi_processor_count=132, uuid="0",
        L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_properties": properties,
        "mem_get_info": (total, total),
        "is_bf16_supported": True,
        "set_device": None,
        "empty_cache": None,
        "synchronize": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _constant(value))
    torch.cuda.get_device_capability = _capability
    torch.cuda.device = contextlib.nullcontext
    torch.Tensor.cuda = lambda self, *_, **__: self


def _capability(*_: Any, **__: Any) -> tuple[int, int]:
    return divmod(int(os.environ.get("HOST_RUNTIME_CAPABILITY", "90")), 10)


def _constant(value: Any) -> Any:
    return lambda *_, **__: value
