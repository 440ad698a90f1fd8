"""TurboMind's device memory as torch tensors, without copies."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, ExitStack
from math import prod
from typing import Any

import torch
from torch import Tensor

_PLAIN = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_CODES = {1: "|u1", 2: "<i2", 4: "<i4"}


def view(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A writable tensor on memory that TurboMind owns.

    Args:
        address: address of contiguous memory on the device. The device "cpu" is for tests, in which
        TurboMind runs on a simulated GPU with host memory.
    """
    if device.type == "cpu":
        size = prod(shape) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    # The interface has no bfloat16: use integers of the same size.
    raw = _Raw(address, shape, _CODES[dtype.itemsize])
    found = torch.as_tensor(raw, device=device)
    assert found.dtype == _PLAIN[dtype.itemsize]
    return found.view(dtype)


def on_stream(stream: int, device: torch.device) -> AbstractContextManager[Any]:
    """Context manager: torch uses a CUDA stream of TurboMind."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode())
    if device.type != "cpu":
        stack.enter_context(torch.cuda.device(device))
        external = torch.cuda.ExternalStream(stream, device=device)  # type: ignore[no-untyped-call]
        stack.enter_context(torch.cuda.stream(external))
    return stack


class _Raw:
    """Implements the CUDA array interface, version 3, without a stream, so that torch does not
    synchronise."""

    def __init__(self, address: int, shape: tuple[int, ...], code: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": code,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
