"""Tensor names of Qwen3-VL checkpoints that need special handling. Imports no heavy packages."""

from __future__ import annotations

import re

TOWER = "model.visual"

DEEPSTACK = re.compile(
    rf"{re.escape(TOWER)}\.deepstack_merger_list\.\d+\.(norm|linear_fc1|linear_fc2)\.(weight|bias)"
)
"""Tensors that TurboMind's model does not have."""

UNREAD = re.compile(r".*\.(rotary_emb\.inv_freq|g_idx|weight_shape)")
"""Tensors that a checkpoint may contain and no model needs: constants, and metadata of
quantisers."""

_PACKED = re.compile(r"(\.mlp\.experts\.(?:gate_up|down)_proj)(?:_scale_inv)?$")


def map_packed_experts(name: str) -> str:
    """The name of packed experts with the suffix that LMDeploy's weight formats expect."""
    found = _PACKED.search(name)
    if found is None:
        return name
    suffix = ".weight_scale_inv" if name.endswith("_scale_inv") else ".weight"
    return name[: found.end(1)] + suffix
