"""DeepStack on the stock wheel: features of vision blocks are added behind the first decoder layers.

TurboMind has Qwen3-VL's vision tower but not its DeepStack (arXiv 2406.04334), without which the
model talks fluently and reads badly. A small library takes over the four calls of LMDeploy's module
that bracket vision blocks and decoder layers (`hook.c`, `binding`), and Python computes the features
on TurboMind's own stream and adds them at the rows of the image tokens (`features`).

    mode      where the calls cannot be taken over, or the self-test fails
    auto      a warning, and LMDeploy serves Qwen3-VL with its PyTorch engine, which has DeepStack
    require   an error
    off       no DeepStack, by choice: worse reading and locating, said in the log

Whether the calls mean what they meant is found out by a test, once on a machine: see `selftest`.
The mode is an argument of `lmdeploy_ext.install`, or the variable ``LMDEPLOY_QWEN3VL_DEEPSTACK``.
A model with vision that is loaded on several GPUs is refused: see `engine.start`.
"""

from __future__ import annotations

from lmdeploy_ext.deepstack.modes import VARIABLE, DeepStackUnavailable
from lmdeploy_ext.deepstack.state import Mode, Status, status

__all__ = ["NAMES", "VARIABLE", "DeepStackUnavailable", "Mode", "Status", "status"]

NAMES: dict[str, str | None] = {
    "lmdeploy.turbomind.builders._base:_CPP_TO_TORCH": None,
    "lmdeploy.archs:get_model_arch": "(model_path, trust_remote_code=False)",
}
"""What this package uses of LMDeploy beside the targets of its records; see `lmdeploy_ext.host`."""
