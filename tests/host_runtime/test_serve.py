"""End to end without a GPU: ``lmdeploy serve`` with the extension, real HTTP, the OpenAI client, real numbers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.host_runtime.server import Server, serve

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]

MODEL = "tiny"
TOKENS = 6
"""With them both answers end with a whole character: LMDeploy keeps the bytes of others to itself."""


@pytest.fixture(scope="module")
def checkpoint(vision_checkpoint: Callable[..., Path]) -> Path:
    return vision_checkpoint(vision_head=64)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    # So slow that tokens do not come several at a time: a stream has pieces on any machine.
    variables = {"LMDEPLOY_QWEN3VL": "1", "HOST_RUNTIME_DELAY_US": "20000"}
    with serve(
        checkpoint, folder, "--model-name", MODEL, mode="numbers", extra=variables
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)


def random_image(width: int = 128, height: int = 96, seed: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


ONE = [random_image()]
SEVERAL = [random_image(131, 77, 4), random_image(64, 64, 5), random_image(33, 150, 6)]
"""Also of sizes that are no multiple of a patch."""


def messages(text: str, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for image in images:
        data = io.BytesIO()
        image.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@torch.inference_mode()
def transformers_answer(checkpoint: Path, text: str, images: Sequence[Image.Image]) -> str:
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    parts = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "text", "text": text}]
    prompt = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    values = processor(text=[prompt], images=list(images), return_tensors="pt")
    out = model.generate(
        **values, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None
    )
    answer = out[0, values["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.parametrize(
    ("text", "images"), [("What is left?", ONE), ("Compare them.", SEVERAL)], ids=["one", "several"]
)
def test_the_answer_about_images_is_that_of_transformers(
    client: openai.OpenAI, checkpoint: Path, text: str, images: list[Image.Image]
) -> None:
    options = {"top_k": 1, "ignore_eos": True}
    question: dict[str, Any] = {
        "model": MODEL, "messages": messages(text, images), "max_completion_tokens": TOKENS,
        "temperature": 0, "extra_body": options,
    }  # fmt: skip
    answer = client.chat.completions.create(**question)
    wanted = transformers_answer(checkpoint, text, images)
    assert len(wanted) >= 6
    assert not wanted.endswith("\ufffd")
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == TOKENS
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(stream=True, **question)
        if chunk.choices
    ]
    assert "".join(pieces) == wanted
    assert len([piece for piece in pieces if piece]) > 1


def test_an_answer_is_valid_against_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "shape": {"enum": ["circle", "square"]},
            "seen": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
        },
        "required": ["shape", "seen"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat.completions.create(
        model=MODEL, messages=messages("Describe.", ONE), response_format=form,
        max_completion_tokens=100, temperature=0,
    )  # fmt: skip
    content = json.loads(answer.choices[0].message.content or "")
    assert content["shape"] in ("circle", "square")
    assert [type(one) for one in content["seen"]] == [bool, bool]


def test_the_log_names_the_extension(server: Server, client: openai.OpenAI) -> None:
    client.models.list()
    log = server.log.read_text(errors="replace")
    assert "Qwen3-VL extension" in log
