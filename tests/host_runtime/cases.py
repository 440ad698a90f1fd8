"""Requests for parity tests, small enough to travel to a child as JSON, and what transformers answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tests.host_runtime.parity import Expected

PATCH_VALUES = 2 * 3 * 16 * 16
MERGE = 2


@dataclass(frozen=True)
class Case:
    """One request.

    tokens: the prompt; image tokens stand at ``spans``.
    grids: (1, h, w) in patches of each image, whose pixels follow from ``seed``.
    image_seeds: of each image's pixels, where they are not to follow from ``seed``.
    video: the engine gets the images as frames of a video.
    pixel_dtype: of the pixels that the engine gets.
    options: fields of LMDeploy's ``GenerationConfig`` besides those of greedy decoding.
    """

    tokens: list[int]
    spans: list[tuple[int, int]] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    seed: int = 0
    max_new_tokens: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    image_seeds: list[int] = field(default_factory=list)
    video: bool = False
    pixel_dtype: str = "bfloat16"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Case:
        return Case(**values)

    def patches(self) -> list[torch.Tensor]:
        """uint8 (patches, PATCH_VALUES) of each image."""
        result = []
        for index, (t, h, w) in enumerate(self.grids):
            seed = self.image_seeds[index] if self.image_seeds else self.seed * 100 + index
            source = torch.Generator().manual_seed(seed)
            # Noise alone looks the same everywhere: images and patches have a brightness of their own.
            values = torch.rand((t * h * w, PATCH_VALUES), generator=source) - 0.5
            values += torch.rand((t * h * w, 1), generator=source) - 0.5
            values += torch.rand((1,), generator=source) - 0.5
            result.append(((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return result

    def pixels(self) -> list[torch.Tensor]:
        """The same, normalised as the checkpoints ask for it: float32, between -1 and 1."""
        return [patches / 127.5 - 1 for patches in self.patches()]

    def images(self) -> list[dict[str, Any]]:
        """The images as LMDeploy's front end passes them to the engine."""
        from lmdeploy.vl.constants import Modality

        kind, pixels_name, grid_name = Modality.IMAGE, "pixel_values", "image_grid_thw"
        if self.video:
            kind, pixels_name, grid_name = Modality.VIDEO, "pixel_values_videos", "video_grid_thw"
        return [
            {
                "modality": kind,
                pixels_name: pixels.to(getattr(torch, self.pixel_dtype)),
                grid_name: torch.tensor([grid]),
                "offset": tuple(span),
            }
            for pixels, grid, span in zip(self.pixels(), self.grids, self.spans, strict=True)
        ]


def make_case(
    seed: int,
    grids: Sequence[tuple[int, int]],
    words: Sequence[int],
    image_token: int,
    **fields: Any,
) -> Case:
    """A prompt of random words and images in turn.

    Args:
        grids: (h, w) in patches of each image, even numbers.
        words: number of random tokens before each image and behind the last; 0 makes neighbours.
    """
    assert len(words) == len(grids) + 1
    source = random.Random(seed)
    tokens: list[int] = []
    spans = []
    for index, count in enumerate(words):
        tokens += [source.randrange(10, 300) for _ in range(count)]
        if index < len(grids):
            h, w = grids[index]
            size = h * w // MERGE**2
            spans.append((len(tokens), len(tokens) + size))
            tokens += [image_token] * size
    return Case(tokens, spans, [(1, h, w) for h, w in grids], seed, **fields)


@lru_cache(maxsize=4)
def _model(checkpoint: Path, vision: bool, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return kind.from_pretrained(checkpoint, dtype=dtype).eval()


def expected(
    checkpoint: Path, case: Case, vision: bool = True, dtype: torch.dtype = torch.float32
) -> Expected:
    """Greedy tokens of transformers, end tokens ignored, and their leads."""
    model = _model(checkpoint, vision, dtype)
    if not case.grids:
        return expected_of(model, case.tokens, None, None, case.max_new_tokens)
    pixels, grids = torch.cat(case.pixels()), torch.tensor(case.grids)
    return expected_of(model, case.tokens, pixels, grids, case.max_new_tokens)


@torch.inference_mode()
def expected_of(
    model: Any,
    tokens: list[int],
    pixels: torch.Tensor | None,
    grids: torch.Tensor | None,
    count: int,
) -> Expected:
    """The same for any prompt, with (patches, values) pixels and (images, 3) grids where it has images."""
    ids = torch.tensor([tokens])
    values: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pixels is not None:
        values["pixel_values"] = pixels.to(model.dtype)
        values["image_grid_thw"] = grids
        values["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    out = model.generate(
        **values, max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(out.logits).float().topk(2, dim=-1).values
    return Expected(out.sequences[0, len(tokens) :].tolist(), (best[:, 0] - best[:, 1]).tolist())
