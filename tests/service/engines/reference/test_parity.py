"""The reference engine computes what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.engines.reference.linear import row_invariant
from service.types import Sampling
from tests.checkpoints import Shape
from tests.service.engines.reference.oracle import (
    engine_greedy,
    engine_logits,
    loaded,
    new_sequence,
    oracle_greedy,
    oracle_logits,
    prompt_of,
    random_image,
    request,
)

pytestmark = pytest.mark.slow

Write = Callable[[Shape], Path]
SHAPES = [
    Shape(moe=moe, tied=tied, vision_head=head, kv_heads=2 if head == 72 else 1)
    for moe in (False, True)
    for tied in (False, True)
    for head in (64, 72)
]
LEGACY = [Shape(legacy=True), Shape(moe=True, legacy=True)]
ANSWER = [5, 300, 41, 77, 8, 200]
REQUESTS = {
    "text": request("Describe the large red circle."),
    "system": request("What is left?\n\n", system="\nAnswer with JSON."),
    "one": request("Which shape?", random_image(1, 96, 64)),
    "odd": request("", random_image(2, 131, 47)),
    "several": request(
        "Compare.", random_image(3, 64, 64), random_image(4, 40, 170), random_image(5, 200, 90)
    ),
}
TOLERANCE = 1e-4


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("shape", SHAPES + LEGACY, ids=lambda shape: shape.name)
def test_logits_are_transformers_logits(checkpoint: Write, shape: Shape) -> None:
    folder = checkpoint(shape)
    model = loaded(folder)
    for name in ("system", "several"):
        packed = prompt_of(model, REQUESTS[name])
        expected = oracle_logits(folder, packed, ANSWER)
        assert difference(engine_logits(model, packed, ANSWER), expected) < TOLERANCE, name
        assert expected.std() > 0.3, "logits too flat for a test of anything"


@pytest.mark.parametrize("piece", [1, 7, 16, 33])
@pytest.mark.parametrize("name", REQUESTS)
def test_a_prompt_in_pieces_gives_the_same_logits(checkpoint: Write, name: str, piece: int) -> None:
    folder = checkpoint(Shape(kv_heads=2, tied=False))
    packed = prompt_of(loaded(folder), REQUESTS[name])
    expected = oracle_logits(folder, packed, ANSWER)
    pieces = loaded(folder, prefill_piece=piece)
    assert difference(engine_logits(pieces, packed, ANSWER), expected) < TOLERANCE


@pytest.mark.parametrize(
    "fault", ["dropped", "swapped", "late", "shifted", "none-but-first", "no-embeddings"]
)
def test_a_deepstack_fault_shows_in_the_logits(checkpoint: Write, fault: str) -> None:
    folder = checkpoint(Shape())
    model = loaded(folder)
    packed = prompt_of(model, REQUESTS["several"])
    sound = model.vision
    assert sound is not None
    embeddings, first, second, third = sound.features(packed.images)
    nothing = torch.zeros_like(first)
    wrong = {
        "dropped": (embeddings, first, nothing, third),
        "swapped": (embeddings, second, first, third),
        "late": (embeddings, nothing, first, second, third),
        "shifted": (embeddings, first, second.roll(1, 0), third),
        "none-but-first": (embeddings, first),
        "no-embeddings": (nothing, first, second, third),
    }[fault]
    expected = oracle_logits(folder, packed, ANSWER)
    assert difference(engine_logits(model, packed, ANSWER), expected) < TOLERANCE
    broken = replace(model, vision=_Features(wrong))  # type: ignore[arg-type]
    assert difference(engine_logits(broken, packed, ANSWER), expected) > 100 * TOLERANCE


class _Features:
    def __init__(self, features: tuple[torch.Tensor, ...]) -> None:
        self._features = features

    def features(self, images: object) -> tuple[torch.Tensor, ...]:
        return self._features


def test_without_deepstack_only_the_embeddings_are_used(checkpoint: Write) -> None:
    model = loaded(checkpoint(Shape()), deepstack=False)
    packed = prompt_of(model, REQUESTS["one"])
    assert model.vision is not None
    assert len(model.vision.features(packed.images)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_their_batch(checkpoint: Write, dtype: torch.dtype) -> None:
    if not row_invariant(dtype, torch.device("cpu")):
        pytest.skip("oneDNN's inner product is not available here")
    model = loaded(checkpoint(Shape(moe=True)), dtype=str(dtype)[6:])
    packed = [prompt_of(model, one) for one in REQUESTS.values()]
    alone = [engine_logits(model, one, ANSWER) for one in packed]
    with torch.inference_mode():
        sequences = [new_sequence(model, one) for one in packed]
        together = []
        for sequence in sequences:
            logits = model.runner.prefill(sequence)
            assert logits is not None
            together.append([logits])
        for token in ANSWER:
            for sequence in sequences:
                sequence.answer.append(token)
            for rows, row in zip(together, model.runner.decode(sequences), strict=True):
                rows.append(row)
    for sequence in sequences:
        assert sequence.run is not None
        model.cache.runs.release(sequence.run)
    for one, rows in zip(alone, together, strict=True):
        assert torch.equal(one, torch.cat(rows))


def test_a_draft_gives_the_same_bits_as_single_steps(checkpoint: Write) -> None:
    if not row_invariant(torch.float32, torch.device("cpu")):
        pytest.skip("oneDNN's inner product is not available here")
    model = loaded(checkpoint(Shape()))
    packed = prompt_of(model, REQUESTS["one"])
    expected = engine_logits(model, packed, ANSWER)
    with torch.inference_mode():
        sequence = new_sequence(model, packed)
        model.runner.prefill(sequence)
        sequence.answer.append(ANSWER[0])
        sequence.draft = ANSWER[1:]
        rows = model.runner.decode([sequence])[0]
    assert sequence.run is not None
    model.cache.runs.release(sequence.run)
    assert torch.equal(rows, expected[1:])


def prompts(numbers: range) -> list[tuple[str, int]]:
    """Texts, and how many images go with each: 0 to 3, of all sizes."""
    text = "the colour of a large red circle is blue and its position left right"
    words = text.split(" ")
    return [
        (" ".join(words[(i * k) % len(words)] for k in range(1, 3 + i % 9)), i % 4) for i in numbers
    ]


def check_prompts(folder: Path, numbers: range, tokens: int) -> None:
    """Greedy tokens are identical, and so are the logits behind every one of them."""
    model = loaded(folder)
    for index, (text, kind) in zip(numbers, prompts(numbers), strict=True):
        sizes = [(32 + 8 * (index % 11) + k, 40 + 13 * k) for k in range(kind)]
        shown = [random_image(index * 5 + k, *size) for k, size in enumerate(sizes)]
        packed = prompt_of(model, request(text, *shown, sampling=Sampling(max_tokens=tokens)))
        expected, logits = oracle_greedy(folder, packed, tokens)
        assert engine_greedy(model, packed, tokens) == expected, (text, sizes)
        found = engine_logits(model, packed, expected)[: len(logits)]
        assert difference(found, logits) < TOLERANCE, (text, sizes)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]], ids=lambda shape: shape.name)
def test_greedy_tokens_are_transformers_tokens(checkpoint: Write, shape: Shape) -> None:
    check_prompts(checkpoint(shape), range(4), tokens=8)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_greedy_tokens_of_many_prompts(checkpoint: Write, shape: Shape) -> None:
    """512 prompts in all: 64 different ones for each of eight checkpoints."""
    first = 64 * SHAPES.index(shape)
    check_prompts(checkpoint(shape), range(first, first + 64), tokens=16)
