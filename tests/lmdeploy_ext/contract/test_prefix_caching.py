"""Prefix caching with images: on for Qwen3-VL, and an image is found again by what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape

pytestmark = [pytest.mark.slow, pytest.mark.host]
BEFORE, TOKENS, BEHIND = 64, 144, 80
"""Text, image (24×24 patches) and text of a prompt; the cache keeps blocks of 64 tokens."""


async def _ask(checkpoint: str) -> list[int]:
    import lmdeploy_ext
    from tests.host_runtime import engines

    lmdeploy_ext.install()
    engine = engines.turbomind(checkpoint, enable_prefix_caching=True)
    image_id = json.loads((Path(checkpoint) / "config.json").read_text())["image_token_id"]
    prompt = [*range(10, 10 + BEFORE), *[image_id] * TOKENS, *range(100, 100 + BEHIND)]

    async def cached(pixels: torch.Tensor, ids: list[int]) -> int:
        item = {"modality": "image", "pixel_values": pixels, "offset": (BEFORE, BEFORE + TOKENS),
                "image_grid_thw": torch.tensor([1, 24, 24])}  # fmt: skip
        answer = await engines.ask(engine, ids, images=[item], max_new_tokens=2, ignore_eos=True)
        await engines.idle(engine)
        assert answer.status == "FINISH"
        assert answer.cached_tokens is not None
        return answer.cached_tokens

    image = torch.rand(576, 1536)
    other = image.clone()
    other[-1, -1] += 0.5
    return [
        await cached(image, prompt),
        await cached(image, prompt),
        await cached(image.bfloat16(), prompt[:-30] + [7] * 30),
        await cached(other, prompt),
        await cached(other, prompt),
    ]


def test_images_are_cached_by_their_pixels(
    engine_checkpoint: Callable[[EngineShape], Path],
) -> None:
    first, again, other_end, other_image, other_again = run(_ask, engine_checkpoint(EngineShape()))
    total = BEFORE + TOKENS + BEHIND
    assert first == 0
    assert again > BEFORE + TOKENS, "text, image and some of the text behind it"
    assert again == other_again == (total - 1) // 64 * 64
    assert BEFORE + TOKENS < other_end < total - 30
    assert other_image == BEFORE, "one other value in the last patch is another image"


def _pipeline(checkpoint: str) -> dict[str, Any]:
    from PIL import Image

    import lmdeploy_ext
    from tests.host_runtime import engines

    lmdeploy_ext.install()
    pipe = engines.pipeline(checkpoint, enable_prefix_caching=True)
    engine = pipe.async_engine
    question = [("describe the picture", Image.new("RGB", (200, 160), "red"))] * 2
    from lmdeploy import GenerationConfig

    answers = pipe(question, gen_config=GenerationConfig(max_new_tokens=3, ignore_eos=True))
    return {
        "kind": type(engine).__name__,
        "backend": engine.backend,
        "caching": engine.backend_config.enable_prefix_caching,
        "tower in Python": hasattr(engine.vl_encoder.model, "vl_model"),
        "answers": [[one.finish_reason, one.input_token_len] for one in answers],
    }


def test_the_pipeline_keeps_prefix_caching_and_builds_no_tower_in_python(
    engine_checkpoint: Callable[[EngineShape], Path],
) -> None:
    found = run(_pipeline, engine_checkpoint(EngineShape()))
    assert found["kind"] == "VLAsyncEngine"
    assert found["backend"] == "turbomind"
    assert found["caching"] is True
    assert found["tower in Python"] is False
    (reason, length), second = found["answers"]
    assert [reason, length] == second
    assert reason == "length"
    assert length > 192 // 32 * (160 // 32), "the image's tokens are part of the prompt"
