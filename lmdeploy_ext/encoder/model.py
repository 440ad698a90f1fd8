"""Qwen3-VL's vision tower: computes image-token embeddings from uint8 patches of many images.

Images of all sizes and requests are concatenated along the rows, without padding. Linear layers
process all rows at once; attention processes each image (or frame pair) separately, images of equal
size in one call. The numbers equal those of transformers' ``Qwen3VLVisionModel``, with DeepStack
(arXiv 2406.04334).

Letters: R rows = patches of all images; D hidden size; d head dimension; M merged tokens;
O output size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmdeploy_ext.encoder.checkpoint import check_tensors, read_visual
from lmdeploy_ext.encoder.config import VisionConfig
from lmdeploy_ext.encoder.grids import grid_tables
from lmdeploy_ext.encoder.layers import Block, Merger, PatchEmbed
from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig
from lmdeploy_ext.encoder.weights import (
    ZERO_LEVEL,
    check_processor,
    checkpoint_shapes,
    fold_patch_embed,
    module_name,
    pair_up,
)
from lmdeploy_ext.packing import PackedImage


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """Features of a batch of images, in the order in which they were given.

    Attributes:
        embeddings: (M, O), replace the embeddings of the image placeholders.
        deepstack: one (M, O) for each entry of ``deepstack_visual_indexes``; entry k is added to
        the residual stream after decoder layer k, at the image tokens only. lengths: tokens of each
        image; they sum to M.
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...]
    lengths: tuple[int, ...]


class VisionEncoder(nn.Module):
    """The vision tower, for inference. Create it with `from_checkpoint` or `from_tensors`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config, norm_block=False)
        self.deepstack_merger_list = nn.ModuleList(
            Merger(config, norm_block=True) for _ in config.deepstack_visual_indexes
        )

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> VisionEncoder:
        """Load the tower of a Qwen3-VL checkpoint (dense or MoE), one tensor at a time.

        Reads config.json, the pre-processing file for mean and std, and the ``visual.*`` tensors of
        the safetensors files. Peak memory is the tower plus one tensor.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: tensors are missing, unexpected or have the wrong shape.
            ValueError: the encoder does not support the configuration.
        """
        folder = Path(folder)
        content = json.loads((folder / "config.json").read_text())
        if "vision_config" not in content:
            raise ValueError("config.json has no vision_config")
        config = VisionConfig.from_dict(content["vision_config"])
        processor = ImageProcessorConfig.from_checkpoint(folder)
        tensors = read_visual(folder, checkpoint_shapes(config))
        return cls._load(config, processor, tensors, dtype, torch.device(device), copy=True)

    @classmethod
    def from_tensors(
        cls,
        config: VisionConfig,
        tensors: Mapping[str, Tensor],
        processor: ImageProcessorConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> VisionEncoder:
        """Create the tower from tensors with the checkpoint's names, without prefix. It may share
        their memory.

        Raises:
            CheckpointError: tensors are missing, unexpected or have the wrong shape.
        """
        check_tensors(
            checkpoint_shapes(config), {name: tuple(t.shape) for name, t in tensors.items()}
        )
        processor = processor or ImageProcessorConfig()
        return cls._load(
            config, processor, tensors.items(), dtype, torch.device(device), copy=False
        )

    @classmethod
    def _load(
        cls,
        config: VisionConfig,
        processor: ImageProcessorConfig,
        tensors: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        copy: bool,
    ) -> VisionEncoder:
        check_processor(config, processor)
        with torch.device("meta"):
            encoder = cls(config)
        patch_tensors = {}
        for name, tensor in tensors:
            if name.startswith("patch_embed.proj."):
                patch_tensors[name.rpartition(".")[2]] = tensor.to(torch.float32, copy=True)
                continue
            if ".attn.qkv." in name:
                tensor = pair_up(tensor, config.num_heads)
            # Like transformers, sum the resampled grid in float32.
            target = torch.float32 if name == "pos_embed.weight" else dtype
            encoder._assign(module_name(name), tensor.to(device, target, copy=copy))
        for name, tensor in fold_patch_embed(**patch_tensors, processor=processor).items():
            encoder._assign(f"patch_embed.{name}", tensor.to(device, dtype))
        return encoder.eval()

    def _assign(self, name: str, tensor: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embed.still.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embed.still.weight.device

    @torch.inference_mode()
    def encode(self, images: Sequence[PackedImage]) -> VisionFeatures:
        """Compute the features of all images. The features of an image do not depend on the other
        images.

        Raises:
            ValueError: the patches do not fit the tower; the message has the number of the image.
        """
        for number, image in enumerate(images):
            self._check_image(number, image)
        lengths = tuple(image.num_tokens for image in images)
        # Sort the images by size, so that attention can use a plain view of images of equal size.
        order = sorted(range(len(images)), key=lambda i: images[i].patches.shape)
        if not order:
            nothing = torch.empty(
                0, self.config.out_hidden_size, dtype=self.dtype, device=self.device
            )
            return VisionFeatures(nothing, (nothing,) * len(self.deepstack_merger_list), ())
        merged, deepstack = self._run([images[i] for i in order])
        back = np.argsort(order)

        def restore(rows: Tensor) -> Tensor:
            parts = torch.split(rows, [lengths[i] for i in order])
            return rows if len(parts) == 1 else torch.cat([parts[i] for i in back])

        return VisionFeatures(restore(merged), tuple(map(restore, deepstack)), lengths)

    def _run(self, images: Sequence[PackedImage]) -> tuple[Tensor, list[Tensor]]:
        """Merged features (M, O), and DeepStack features, of images sorted by size."""
        x, rotary = self._embed(images)
        groups = [
            (len(list(same)), length) for length, same in groupby(len(i.patches) for i in images)
        ]
        deepstack = []
        mergers = iter(self.deepstack_merger_list)
        for number, block in enumerate(self.blocks):
            x = block(x, rotary, groups)
            if number in self.config.deepstack_visual_indexes:
                deepstack.append(next(mergers)(x))
        return self.merger(x), deepstack

    def _embed(self, images: Sequence[PackedImage]) -> tuple[Tensor, Tensor]:
        """Patch embeddings plus position embeddings (R, D), and rotary factors complex64 (R,
        d/2)."""
        config = self.config
        rows, rotary = [], []
        for _, same in groupby(images, key=lambda image: image.patches.shape[1]):
            run = list(same)
            pixels = torch.cat([torch.from_numpy(image.patches) for image in run]).to(self.device)
            rows.append(self.patch_embed(pixels.to(self.dtype) - ZERO_LEVEL))
        x = rows[0] if len(rows) == 1 else torch.cat(rows)
        start = 0
        for image in images:
            _, h, w = image.grid
            tables = grid_tables(
                h, w, config.spatial_merge_size, config.grid_side, config.head_dim,
                config.rope_theta, self.device,
            )  # fmt: skip
            x[start : start + h * w] += F.embedding_bag(
                tables.taps, self.pos_embed.weight, per_sample_weights=tables.weights, mode="sum"
            ).to(self.dtype)
            rotary.append(tables.rotary)
            start += h * w
        return x, torch.cat(rotary)

    def _check_image(self, number: int, image: PackedImage) -> None:
        config = self.config
        columns = image.patches.shape[1]
        if columns not in (config.frame_values, config.frame_values * config.temporal_patch_size):
            raise ValueError(
                f"image {number}: patches of {columns} values; this tower takes "
                f"{config.frame_values} (still) or "
                f"{config.frame_values * config.temporal_patch_size} (frame pair)"
            )
        if image.merge_size != config.spatial_merge_size:
            raise ValueError(
                f"image {number}: merge size {image.merge_size}, the tower has "
                f"{config.spatial_merge_size}"
            )
