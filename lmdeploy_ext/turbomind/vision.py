"""The vision tower of Qwen3-VL as a TurboMind source model: Qwen3.5's, which is the same tower.

Both have a learned position grid, pre-LayerNorm blocks with packed qkv and GELU(tanh), and a 2×2
merger. Qwen3-VL's DeepStack mergers have no place in TurboMind's tree; `DEEPSTACK` names them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from lmdeploy.turbomind.models.qwen3_5 import _VIT_HEAD_DIM_PADDED, Qwen3_5VisionModel

logger = logging.getLogger("lmdeploy_ext")

DEEPSTACK = re.compile(
    r"model\.visual\.deepstack_merger_list\.\d+\.(?:norm|linear_fc1|linear_fc2)\.(?:weight|bias)"
)
"""Checkpoint tensors that TurboMind's tree cannot hold."""


class Qwen3VLVisionModel(Qwen3_5VisionModel):
    """Vision tower without DeepStack.

    Args:
        cfg: transformers' vision configuration of Qwen3-VL.
        resolver: LMDeploy's plain weight format; the tower is never quantised.

    Raises:
        ValueError: an activation or a head size that TurboMind has no kernel for.
    """

    def __init__(self, cfg: Any, *, resolver: Any) -> None:
        if cfg.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"vision hidden_act {cfg.hidden_act!r} is not gelu_pytorch_tanh")
        head = cfg.hidden_size // cfg.num_heads
        if head not in _VIT_HEAD_DIM_PADDED:
            raise ValueError(f"vision head size {head} is none of {sorted(_VIT_HEAD_DIM_PADDED)}")
        super().__init__(cfg, resolver=resolver)

    def to_turbomind_multimodal(self, multimodal: Sequence[dict[str, Any]]) -> Any:
        """Images and video frames of one request as TurboMind takes them."""
        return super().to_turbomind_multimodal(list(multimodal))
