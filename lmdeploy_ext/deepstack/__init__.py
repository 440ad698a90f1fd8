"""DeepStack for TurboMind on the stock wheel: adds features of vision blocks after the first
decoder layers.

TurboMind has Qwen3-VL's vision tower but not its DeepStack (arXiv 2406.04334). Without DeepStack
the model writes fluent text but reads images badly. A small C library intercepts four functions of
LMDeploy's module that run before and after vision blocks and decoder layers (`hook.c`, `binding`).
Python computes the features on TurboMind's CUDA stream and adds them to the rows of the image
tokens (`features`).

    mode      if the functions cannot be intercepted, or the self-test fails
    auto      a warning, and LMDeploy serves Qwen3-VL with its PyTorch engine, which has DeepStack
    require   an error
    off       no DeepStack, by choice: worse reading and locating, said in the log

A self-test, run once on each machine, checks the results: see `selftest`. The mode is an argument
of `lmdeploy_ext.install`, or the variable ``LMDEPLOY_QWEN3VL_DEEPSTACK``. A model with vision on
several GPUs is refused: see `engine.start`.
"""

from __future__ import annotations

from lmdeploy_ext.deepstack.modes import VARIABLE, DeepStackUnavailable
from lmdeploy_ext.deepstack.state import Mode, Status, status

__all__ = ["NAMES", "VARIABLE", "DeepStackUnavailable", "Mode", "Status", "status"]

NAMES: dict[str, str | None] = {
    "lmdeploy.turbomind.builders._base:_CPP_TO_TORCH": None,
    "lmdeploy.archs:get_model_arch": "(model_path, trust_remote_code=False)",
}
"""Names of LMDeploy that this package uses, in addition to the targets of its records; see
`lmdeploy_ext.host`."""
