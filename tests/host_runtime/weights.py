"""Reads back every weight that LMDeploy's builders commit to the C++ engine. For code in a child.

The builders reach a parameter's memory only through ``_tm.Module.param(name)``: that method is
wrapped and notes (module, name). The engine knows a module's path once it is attached to its parent,
and after the export it re-packs some weights, so paths and memory are read just between the two:
where ``TurboMind`` would go on with ``_process_weights``.
"""

from __future__ import annotations

import ctypes
from typing import Any
from unittest import mock

import torch
from lmdeploy.turbomind import TurboMind, _tm

from tests.host_runtime.engines import settings

_address = ctypes.pythonapi.PyCapsule_GetPointer  # the binding wraps addresses in nameless capsules
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
TYPES = {
    _tm.DataType.TYPE_FP32: torch.float32,
    _tm.DataType.TYPE_FP16: torch.float16,
    _tm.DataType.TYPE_BF16: torch.bfloat16,
    _tm.DataType.TYPE_INT32: torch.int32,
    _tm.DataType.TYPE_INT64: torch.int64,
    _tm.DataType.TYPE_INT8: torch.int8,
    _tm.DataType.TYPE_UINT8: torch.uint8,
}


def exported(checkpoint: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Export a checkpoint through LMDeploy's own builders; the engine itself is not started.

    Args:
        changes: engine settings that differ from `tests.host_runtime.engines.SMALL`.

    Returns:
        Path of the parameter in the engine's module tree -> a copy of its memory, in the shape and
        type of the slot. Types that torch lacks (4-bit, FP8) come as flat uint8.

    Raises:
        AssertionError: a committed module is not in the tree, so that its weights would go unused.
    """
    slots: dict[int, tuple[Any, set[str]]] = {}
    read: dict[str, torch.Tensor] = {}
    param = _tm.Module.param

    def note(module: Any, name: str) -> Any:
        slots.setdefault(id(module), (module, set()))[1].add(name)
        return param(module, name)

    def read_all(_: TurboMind) -> None:
        for module, names in slots.values():
            path = module.full_path()
            for name in sorted(names):
                full = f"{path}.{name}"
                assert full not in read, f"{full} was committed twice"
                read[full] = tensor(param(module, name).get())

    with (
        mock.patch.object(_tm.Module, "param", note),
        mock.patch.object(TurboMind, "_process_weights", read_all),
        mock.patch.object(TurboMind, "_create_engine"),
    ):
        TurboMind.from_pretrained(checkpoint, engine_config=settings(**changes))
    return read


def tensor(slot: Any) -> torch.Tensor:
    """A copy of a tensor of the engine, whose device memory is host memory."""
    address = _address(slot.data, None)
    content = ctypes.string_at(address, slot.byte_size)
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    dtype = TYPES.get(slot.type)
    return values if dtype is None else values.view(dtype).reshape(list(slot.shape))
