"""The bundled model on the stock engine: what it says of drawings is what transformers says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from tests.host_runtime.cases import expected_of
from tests.host_runtime.parity import difference, same
from tests.host_runtime.runner import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

MODEL = ROOT / "service" / "bundled" / "drawings"
DRAWINGS = sorted((ROOT / "examples" / "drawings" / "samples").glob("*.png"))[:3]
QUESTION = "Describe the picture."
TOKENS = 24


def prompt(drawing: Path) -> dict[str, Any]:
    """Tokens, pixels and grid of a question about a drawing, by transformers' own processing."""
    from PIL import Image

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with Image.open(drawing) as image:
        values = AutoImageProcessor.from_pretrained(MODEL)(
            images=[image.convert("RGB")], return_tensors="pt"
        )
    grid = values["image_grid_thw"]
    pads = "<|image_pad|>" * (int(grid.prod()) // 4)
    text = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text)["input_ids"]
    return {"tokens": tokens, "pixels": values["pixel_values"].bfloat16(), "grid": grid}


async def _answers(drawings: list[str]) -> list[list[int]]:
    import json

    import lmdeploy_ext

    lmdeploy_ext.install()
    from lmdeploy.vl.constants import Modality

    from tests.host_runtime import engines

    engine = engines.turbomind(str(MODEL), max_prefill_token_num=128)
    pad = json.loads((MODEL / "config.json").read_text())["image_token_id"]
    found = []
    for drawing in drawings:
        parts = prompt(Path(drawing))
        begin = parts["tokens"].index(pad)
        item = {
            "modality": Modality.IMAGE, "pixel_values": parts["pixels"],
            "image_grid_thw": parts["grid"], "offset": (begin, begin + parts["tokens"].count(pad)),
        }  # fmt: skip
        answer = await engines.ask(
            engine, parts["tokens"], images=[item], max_new_tokens=TOKENS, ignore_eos=True
        )
        found.append(answer.tokens)
    return found


def test_answers_about_drawings_are_those_of_transformers() -> None:
    assert len(DRAWINGS) == 3
    found = run(_answers, [str(drawing) for drawing in DRAWINGS], mode="numbers")
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    wanted = []
    for drawing in DRAWINGS:
        parts = prompt(drawing)
        tokens, pixels, grid = parts["tokens"], parts["pixels"], parts["grid"]
        wanted.append(expected_of(model, tokens, pixels, grid, TOKENS))
    assert [difference(*pair) for pair in zip(found, wanted, strict=True)] == [None] * 3
    assert same(found, wanted) >= 2, "where a tie decides early, the rest is not compared"
    assert len({tuple(tokens) for tokens in found}) == 3, "each drawing has an answer of its own"
