"""Shape of a Qwen3-VL vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """``vision_config`` of a checkpoint's config.json, with the file's own names and defaults."""

    depth: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_heads} heads must give a head "
                "dimension in multiples of 4"
            )
        if self.grid_side**2 != self.num_position_embeddings:
            raise ValueError(
                f"num_position_embeddings {self.num_position_embeddings} is not a square"
            )
        taps = self.deepstack_visual_indexes
        if list(taps) != sorted(set(taps)) or any(not 0 <= tap < self.depth for tap in taps):
            raise ValueError(f"deepstack_visual_indexes {taps} must rise in 0..{self.depth - 1}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> VisionConfig:
        """Read ``config["vision_config"]``; missing keys get transformers' defaults.

        Raises:
            ValueError: the encoder does not support the tower.
        """
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in settings.items() if key in known}
        if "deepstack_visual_indexes" in values:
            values["deepstack_visual_indexes"] = tuple(values["deepstack_visual_indexes"])
        rope = settings.get("rope_parameters") or {}
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            raise ValueError(f"vision rope_type {rope['rope_type']!r} is not supported")
        if "rope_theta" in rope:
            values["rope_theta"] = float(rope["rope_theta"])
        return cls(**values)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Side length of the learned position grid."""
        return int(self.num_position_embeddings**0.5)

    @property
    def merged_size(self) -> int:
        """Number of values in one merge block, which is the input of the mergers for one token."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def frame_values(self) -> int:
        """Number of pixel values in one frame of one patch."""
        return self.in_channels * self.patch_size**2
