"""transformers as the oracle, and the reference engine's model driven step by step beside it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from lmdeploy_ext.encoder.preprocess import ImageProcessorConfig, normalise
from lmdeploy_ext.packing import PackedRequest
from service.engines.common.loops import LoopGuard
from service.engines.reference.model import Model, load_model
from service.engines.reference.options import Options
from service.engines.reference.sequence import Event, Sequence
from service.types import Chunk, GenerateRequest, Image, Sampling

NO_GUARD = LoopGuard(window=0)


@lru_cache(maxsize=16)
def oracle(folder: Path) -> Any:
    """transformers' model of a checkpoint, in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def inputs(folder: Path, packed: PackedRequest) -> dict[str, torch.Tensor]:
    """A packed prompt in transformers' form."""
    model = oracle(folder)
    ids = torch.from_numpy(packed.token_ids.astype(np.int64))[None]
    result = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if packed.images:
        config = ImageProcessorConfig.from_checkpoint(folder)
        pixels = [torch.from_numpy(normalise(image.patches, config)) for image in packed.images]
        result["pixel_values"] = torch.cat(pixels)
        result["image_grid_thw"] = torch.tensor([image.grid for image in packed.images])
        result["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return result


@torch.inference_mode()
def oracle_logits(folder: Path, packed: PackedRequest, answer: list[int]) -> torch.Tensor:
    """Logits (1 + len(answer), V) behind the prompt and behind each token of the answer."""
    model, values = oracle(folder), inputs(folder, packed)
    tail = torch.tensor([answer], dtype=torch.int64)
    values["input_ids"] = torch.cat([values["input_ids"], tail], 1)
    values["attention_mask"] = torch.ones_like(values["input_ids"])
    if "mm_token_type_ids" in values:
        kinds = values["mm_token_type_ids"]
        values["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(tail).int()], 1)
    logits: torch.Tensor = model(**values).logits[0, -1 - len(answer) :].float()
    return logits


@torch.inference_mode()
def oracle_greedy(
    folder: Path, packed: PackedRequest, count: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of ``generate``, end token excluded, and the logits (N, V) that chose them."""
    model, values = oracle(folder), inputs(folder, packed)
    out = model.generate(
        **values, max_new_tokens=count, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    ends = set(model.generation_config.eos_token_id)
    chosen = out.sequences[0, values["input_ids"].shape[1] :].tolist()
    return [token for token in chosen if token not in ends], torch.cat(out.logits).float()


@lru_cache(maxsize=16)
def loaded(folder: Path, **options: Any) -> Model:
    """The reference engine's model of a checkpoint."""
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": 1}
    return load_model(folder, Options(folder, **{**defaults, **options}), lambda message: None)


def prompt_of(model: Model, request: GenerateRequest) -> PackedRequest:
    """The packed prompt of a request, with its images."""
    with ThreadPoolExecutor(1) as executor:
        return asyncio.run(model.prompts.pack(request, executor))


def new_sequence(
    model: Model,
    packed: PackedRequest,
    sampling: Sampling = Sampling(max_tokens=64),
    events: list[Event] | None = None,
) -> Sequence:
    """A sequence with memory, ready for prefill."""
    features = model.vision.features(packed.images) if model.vision and packed.images else ()
    sequence = model.sequence(
        packed, features, sampling, None, max_tokens=sampling.max_tokens or 64,
        emit=(events if events is not None else []).append, received=0.0, guard=NO_GUARD,
    )  # fmt: skip
    run = model.cache.runs.reserve(sequence.reserved)
    assert run is not None
    sequence.admit(run)
    return sequence


@torch.inference_mode()
def engine_logits(model: Model, packed: PackedRequest, answer: list[int]) -> torch.Tensor:
    """The same as `oracle_logits`, with prefill in pieces and one decode step for each token."""
    sequence = new_sequence(model, packed)
    try:
        rows = []
        while not rows:
            logits = model.runner.prefill(sequence)
            rows = [] if logits is None else [logits]
        for token in answer:
            sequence.answer.append(token)
            rows += model.runner.decode([sequence])
        return torch.cat(rows)
    finally:
        assert sequence.run is not None
        model.cache.runs.release(sequence.run)


def engine_greedy(model: Model, packed: PackedRequest, count: int) -> list[int]:
    """Greedy tokens, end token excluded."""
    events: list[Event] = []
    with torch.inference_mode():
        sequence = new_sequence(model, packed, Sampling(max_tokens=count), events)
        while not sequence.finished:
            if sequence.computed < sequence.prompt_length:
                logits = model.runner.prefill(sequence)
                if logits is not None:
                    sequence.extend(logits)
            else:
                sequence.extend(model.runner.decode([sequence])[0])
    assert sequence.run is not None
    model.cache.runs.release(sequence.run)
    last = events[-1]
    assert isinstance(last, Chunk)
    assert last.usage.output_tokens == len(sequence.answer)
    return sequence.answer


def random_image(seed: int, width: int, height: int) -> Image:
    """Smooth colours with noise, so that neighbouring tokens differ."""
    random = np.random.default_rng(seed)
    return Image(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def request(
    user: str, *images: Image, system: str = "", sampling: Sampling = Sampling(max_tokens=64)
) -> GenerateRequest:
    return GenerateRequest("test", user, system, images, sampling=sampling)
