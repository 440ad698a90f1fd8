"""What export writes is a checkpoint that transformers and the reference engine load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.drawings.architecture import config, initial_model
from examples.drawings.export import export, token_ids
from examples.drawings.scenes import HELD_OUT_SEED, draw, scene
from examples.drawings.tokenizer import SPECIAL, load, save, train
from service.engines.reference import ReferenceEngine
from service.types import FinishReason, GenerateRequest, Image, Sampling
from service.wiring import BUNDLED_MODEL

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and the model that it was written from."""
    folder = tmp_path_factory.mktemp("exported")
    for name in TOKENIZER:
        shutil.copy(BUNDLED_MODEL / name, folder / name)
    model = initial_model(config(token_ids(folder)), seed=3)
    export(model, folder)
    return folder, model


def test_weights_are_bfloat16_and_small(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    file = folder / "model.safetensors"
    assert file.stat().st_size <= MAX_BYTES
    expected = {name for name in model.state_dict() if name != "lm_head.weight"}
    with safe_open(file, "pt") as weights:
        assert set(weights.keys()) == expected
        for name in weights.keys():  # noqa: SIM118 - safe_open has no iterator
            value = weights.get_tensor(name)
            assert value.dtype == torch.bfloat16, name
            assert torch.equal(value, model.state_dict()[name].bfloat16()), name


def test_transformers_loads_it(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float()), name
    assert type(loaded).__name__ == "Qwen3VLForConditionalGeneration"
    assert loaded.config.text_config.rope_parameters["mrope_interleaved"] is True


def test_the_processor_reads_images_and_chat(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    processor = AutoProcessor.from_pretrained(folder)
    image = draw(scene(1), 1, (300, 200))
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    values = processor(images=[image], text=[text], return_tensors="pt")
    _, rows, columns = values["image_grid_thw"][0].tolist()
    image = token_ids(folder)["<|image_pad|>"]
    assert int((values["input_ids"] == image).sum()) == rows * columns // 4
    assert 40 <= rows * columns // 4 <= 64


@pytest.mark.slow
async def test_the_reference_engine_answers_from_it(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    engine = ReferenceEngine(folder)
    await engine.start()
    try:
        pixels = np.asarray(draw(scene(HELD_OUT_SEED), HELD_OUT_SEED, (256, 192)))
        request = GenerateRequest(
            request_id="1", user="What?", images=(Image(pixels),), sampling=Sampling(max_tokens=4)
        )
        chunks = [chunk async for chunk in engine.generate(request)]
    finally:
        await engine.close()
    assert chunks[-1].finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert 40 <= chunks[-1].usage.image_tokens <= 66


def test_the_bundled_folder_is_such_an_export(exported: tuple[Path, Any]) -> None:
    """Same files, same settings, same names and shapes; only the weights' values are its own."""
    folder, _ = exported
    assert {path.name for path in folder.iterdir()} <= {
        path.name for path in BUNDLED_MODEL.iterdir()
    }
    for path in folder.glob("*.json"):
        mine, theirs = (json.loads((at / path.name).read_text()) for at in (folder, BUNDLED_MODEL))
        if path.name in ("config.json", "generation_config.json"):
            mine.pop("transformers_version", None)
            theirs.pop("transformers_version", None)
        assert mine == theirs, path.name
    shapes = []
    for at in (folder, BUNDLED_MODEL):
        assert (at / "model.safetensors").stat().st_size <= MAX_BYTES
        with safe_open(at / "model.safetensors", "pt") as weights:
            names = sorted(weights.keys())
            shapes.append([(n, weights.get_slice(n).get_shape()) for n in names])
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_the_tokenizer_is_reproducible(tmp_path: Path) -> None:
    save(train(), tmp_path)
    for name in TOKENIZER:
        assert (tmp_path / name).read_text() == (BUNDLED_MODEL / name).read_text(), name


def test_special_tokens_have_ids_of_their_own() -> None:
    words: Any = load(BUNDLED_MODEL)
    for token in SPECIAL:
        assert words(token, add_special_tokens=False)["input_ids"] == [
            token_ids(BUNDLED_MODEL)[token]
        ]
    assert len(set(token_ids(BUNDLED_MODEL).values())) == len(SPECIAL)
