"""The vision tower of Qwen3-VL as a TurboMind source model, based on LMDeploy's Qwen3.5 tower.

Both towers have a learned position grid, pre-LayerNorm blocks with packed qkv and GELU(tanh), and a
merger of 2×2 patches. TurboMind's tower has no DeepStack mergers: see `lmdeploy_ext.deepstack`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmdeploy.turbomind.models.qwen3_5 import _VIT_HEAD_DIM_PADDED, Qwen3_5VisionModel
from lmdeploy.vl.constants import Modality

from lmdeploy_ext.mrope import merged_grids
from lmdeploy_ext.turbomind.names import TOWER

_FIELDS = {
    Modality.IMAGE: ("pixel_values", "image_grid_thw"),
    Modality.VIDEO: ("pixel_values_videos", "video_grid_thw"),
}
"""Modality of an item -> the keys of its pixels and its grid."""


class Qwen3VLVisionModel(Qwen3_5VisionModel):
    """The vision tower without DeepStack.

    Args:
        cfg: transformers' vision configuration of Qwen3-VL.
        resolver: LMDeploy's plain weight format; a tower with quantised weights is refused.

    Raises:
        ValueError: TurboMind has no kernel for the activation or the head size.
    """

    def __init__(self, cfg: Any, *, resolver: Any) -> None:
        if cfg.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"vision hidden_act {cfg.hidden_act!r} is not gelu_pytorch_tanh")
        head, rest = divmod(cfg.hidden_size, cfg.num_heads)
        if rest or head not in _VIT_HEAD_DIM_PADDED:
            raise ValueError(
                f"vision head size {cfg.hidden_size}/{cfg.num_heads} is none of "
                f"{sorted(_VIT_HEAD_DIM_PADDED)}"
            )
        super().__init__(cfg, resolver=resolver)

    def model(self, pfx: Any) -> None:
        """Build the vision tree from the checkpoint.

        Raises:
            ValueError: the tower's weights are quantised. TurboMind would load them without an
            error and compute noise.
        """
        names = [name for name in pfx.ckpt.keys() if name.startswith(TOWER + ".")]  # noqa: SIM118
        quantised = [name for name in names if not name.endswith((".weight", ".bias"))]
        if quantised:
            raise ValueError(
                f"the vision tower is quantised ({quantised[0]}, {len(quantised)} such tensors); "
                "TurboMind needs it in 16 or 32 bits"
            )
        super().model(pfx)

    def to_turbomind_multimodal(self, multimodal: Sequence[Mapping[str, Any]]) -> Any:
        """Convert the images and video frames of one request for TurboMind.

        TurboMind computes the mRoPE positions from spans and grids. It identifies an image in the
        prefix cache by its fingerprint, a hash of modality, grid and the tower's input pixels.

        Args:
            multimodal: items of LMDeploy's front end, in any order, each with ``modality``,
                ``offset`` (the span ``[begin, end)`` of its placeholder tokens), pixels (patches,
                values of a patch) and a grid (1, h, w) in patches: ``pixel_values`` and
                ``image_grid_thw``, or ``pixel_values_videos`` and ``video_grid_thw``. A video has
                one item for each of its frame groups, as its prompt has a timestamp between them.

        Raises:
            ValueError: an item is invalid for Qwen3-VL; the message names the item.
        """
        items = [dict(item) for item in multimodal]
        items.sort(key=lambda item: self._offset_pair(item["offset"]))
        spans, grids = [], []
        for index, item in enumerate(items):
            modality = item.get("modality")
            if modality not in _FIELDS:
                raise ValueError(f"item {index}: Qwen3-VL takes no {modality!r}")
            pixels, grid = _FIELDS[Modality(modality)]
            spans.append(self._offset_pair(item["offset"]))
            grids.append(self._grid_thw(item[grid]))
            item[pixels] = self._patches(index, item[pixels], grids[-1])
        end = spans[-1][1] if spans else 0
        merged_grids(end, spans, grids, self._vis_spatial_merge)
        return super().to_turbomind_multimodal(items)

    def _patches(self, index: int, pixels: Any, grid: tuple[int, int, int]) -> torch.Tensor:
        """The pixels in the dtype of the tower, checked against their grid."""
        if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"item {index}: pixels must be a floating tensor, got {kind}")
        t, h, w = grid
        expected = (t * h * w, self._patch_in_dim)
        if tuple(pixels.shape) != expected:
            raise ValueError(
                f"item {index}: pixels {tuple(pixels.shape)} do not fit grid {grid}: {expected}"
            )
        return pixels.to(self._ctx.dtype).contiguous()
