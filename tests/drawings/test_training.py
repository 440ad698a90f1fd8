"""Training computes what transformers computes, on data that is a function of its number, and resumes exactly."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from examples.drawings import batches, optim, tokenizer, train
from examples.drawings.architecture import MAX_PIXELS, MIN_PIXELS
from examples.drawings.arrangements import cell_tokens
from examples.drawings.batches import JointBatch, joint_round, vision_batch
from examples.drawings.conversations import positions
from examples.drawings.export import token_ids
from examples.drawings.images import GRIDS
from examples.drawings.network import Grid, vision_features, vision_tables
from examples.drawings.probes import PLACE_LAYER, TOKEN_PROBES
from examples.drawings.scenes import HELD_OUT_SEED
from examples.drawings.trainer import Trainer
from service.wiring import BUNDLED_MODEL

pytestmark = pytest.mark.slow  # trains, or loads transformers

SMALL = {"short": (2, 2), "analysis": (2, 1), "pair": (1, 2)}


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer.load(BUNDLED_MODEL)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SHAPES", SMALL)
    monkeypatch.setattr(train, "SHAPES", SMALL)
    monkeypatch.setattr(batches, "BATCHES_PER_ROUND", 2)


def options(work: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "work": work,
        "tokenizer": BUNDLED_MODEL,
        "init": None,
        "seed": 0,
        "device": "cpu",
        "lr": 2e-3,
        "vision_steps": 6,
        "vision_batch": 2,
        "vision_rate": 0.3,
        "rounds": 4,
        "probe_weight": 0.1,
        "evaluate_every": 10**9,
    }
    return argparse.Namespace(**{**values, **changes})


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """An untrained model that no test changes."""
    return Trainer(options(tmp_path_factory.mktemp("none")), token_ids(BUNDLED_MODEL))


PROCESSOR = Qwen2VLImageProcessor(
    size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    patch_size=16,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
)


def processed(pixels: Tensor) -> dict[str, Tensor]:
    """uint8 images (B, height, width, 3) as transformers wants them."""
    done = PROCESSOR(images=list(pixels.numpy()), return_tensors="pt")
    return {"pixel_values": done["pixel_values"], "image_grid_thw": done["image_grid_thw"]}


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[-1], Grid(10, 20), Grid(16, 16)], ids=str)
@torch.no_grad()
def test_vision_features_equal_transformers(trainer: Trainer, grid: Grid) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, *grid.size[::-1], 3), dtype=torch.uint8)
    found = vision_features(trainer.tower, pixels, *vision_tables(trainer.tower, grid))
    values = processed(pixels)
    assert values["image_grid_thw"].tolist() == [[1, grid.rows, grid.columns]] * 2
    oracle = trainer.tower(values["pixel_values"], grid_thw=values["image_grid_thw"])
    expected = [oracle.pooler_output, *oracle.deepstack_features]
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_answers_equal_transformers(trainer: Trainer, words: Any, kind: str) -> None:
    """Logits at every scored place, one and two images, with and without a system turn.

    And what the place probes see: the images' tokens in the middle of the decoder.
    """
    numbers = {bool(joint(n, words, kind).sequences.prefix.system): n for n in range(40)}
    assert len(numbers) == 2
    for number in numbers.values():
        batch = joint(number, words, kind, share=0.0)
        sequences = batch.sequences
        found, seen = trainer.answer(batch, trainer.see(batch.images)[0])
        count = sequences.prefix.images
        drawings = batch.images.pixels.unflatten(0, (-1, count))
        repeated = drawings.repeat_interleave(batch.questions, 0)
        image = words.convert_tokens_to_ids("<|image_pad|>")
        middle: list[Tensor] = []
        hook = trainer.decoder.layers[PLACE_LAYER + 1].register_forward_pre_hook(
            lambda layer, inputs, kept=middle: kept.append(inputs[0])
        )
        expected = trainer.model(
            input_ids=sequences.ids,
            attention_mask=torch.ones_like(sequences.ids),
            mm_token_type_ids=(sequences.ids == image).int(),
            **processed(repeated.flatten(0, 1)),
        ).logits.flatten(0, 1)[sequences.scored]
        hook.remove()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        states = middle[0][sequences.ids == image]
        states = states.view(len(drawings), batch.questions, count, -1, states.shape[-1])
        torch.testing.assert_close(seen, states[:, 0].flatten(0, 1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_equal_transformers_on_arranged_features(trainer: Trainer, words: Any) -> None:
    for kind in SMALL:
        batch = joint(5, words, kind, share=1.0)
        plain = joint(5, words, kind, share=0.0)
        features, _, _ = trainer.see(batch.images)
        by_hand = [
            torch.stack(
                [tokens[source] for tokens, source in zip(stream, batch.source, strict=True)]
            )
            for stream in features
        ]
        batch_in_place = replace(batch, source=plain.source)
        found, _ = trainer.answer(batch, features)
        expected, _ = trainer.answer(batch_in_place, by_hand)
        in_place, _ = trainer.answer(batch_in_place, features)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, in_place)


def joint(
    number: int, words: Any, kind: str = "", rank: int = 0, seed: int = 0, share: float = 0.8
) -> JointBatch:
    return joint_round(number, 40, seed, words, kind, rank=rank, share=share)[0]


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("grid", [Grid(10, 16), Grid(16, 10), Grid(12, 12)], ids=str)
def test_positions_equal_transformers(trainer: Trainer, grid: Grid, images: int) -> None:
    starts = [5 + index * (grid.tokens + 2) for index in range(images)]
    types = torch.zeros(1, starts[-1] + grid.tokens + 9, dtype=torch.int)
    for start in starts:
        types[0, start : start + grid.tokens] = 1
    expected, _ = trainer.model.model.get_rope_index(
        types.long(), types, image_grid_thw=torch.tensor([[1, grid.rows, grid.columns]] * images)
    )
    assert torch.equal(positions(grid, starts, types.shape[1]), expected[:, 0])


def test_sequences_decode_to_question_and_answer(words: Any) -> None:
    for kind in SMALL:
        sequences = joint(3, words, kind).sequences
        rows = sequences.scored // sequences.ids.shape[1]
        for row in range(len(sequences.ids)):
            answer = words.decode(sequences.wanted[rows == row])
            assert answer.endswith("<|im_end|>")
            assert f"<|im_start|>assistant\n{answer}" in words.decode(sequences.ids[row])
        # What is wanted at a place is the token behind it.
        assert torch.equal(sequences.ids.flatten()[sequences.scored + 1], sequences.wanted)
        image = words.convert_tokens_to_ids("<|image_pad|>")
        tokens = sequences.prefix.grid.tokens
        for start in sequences.starts:
            assert (sequences.ids[:, start : start + tokens] == image).all()
        assert int((sequences.ids[0] == image).sum()) == tokens * len(sequences.starts)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors(item)]
    return (
        [t for item in vars(value).values() for t in tensors(item)]
        if hasattr(value, "__dict__")
        else []
    )


def same(a: Any, b: Any) -> bool:
    pairs = list(itertools.zip_longest(tensors(a), tensors(b)))
    assert pairs
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def test_batches_are_functions_of_number_seed_and_rank(words: Any) -> None:
    makers: list[Callable[..., Any]] = [
        lambda number, seed, rank: vision_batch(number, 2, seed, rank),
        lambda number, seed, rank: joint_round(number, 40, seed, words, rank=rank),
    ]
    for make in makers:
        first = make(7, 1, 0)
        assert same(first, make(7, 1, 0))
        for other in (make(8, 1, 0), make(7, 2, 0), make(7, 1, 1)):
            assert not same(first, other)


def test_ranks_draw_images_of_one_size(words: Any) -> None:
    for number in range(12):
        grids = {vision_batch(number, 1, 0, rank).grid for rank in range(3)}
        rounds = [joint_round(number, 40, 0, words, rank=rank) for rank in range(3)]
        assert len(grids) == 1
        assert len({batch.kind for batches_ in rounds for batch in batches_}) == 1
        assert len({batch.images.grid for batches_ in rounds for batch in batches_}) == 1


def test_a_run_from_a_checkpoint_skips_the_easy_questions(words: Any) -> None:
    kinds = {
        easy: {joint_round(n, 10**6, 0, words, easy_first=easy)[0].kind for n in range(16)}
        for easy in (True, False)
    }
    assert kinds == {True: {"short", "analysis"}, False: set(SMALL)}


def test_training_never_sees_a_held_out_drawing(
    words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for name in ("scene", "keyframes"):
        real = getattr(batches, name)
        spy = lambda seed, most, real=real: seen.append(seed) or real(seed, most)  # noqa: E731
        monkeypatch.setattr(batches, name, spy)
    for number in range(10):
        vision_batch(number, 2, 0)
        joint_round(number, 10, 0, words)
    assert len(seen) > 40
    assert max(seen) < HELD_OUT_SEED


def test_probes_look_at_the_centres_of_cells() -> None:
    for grid in GRIDS:
        tokens = cell_tokens(grid)
        assert len(set(tokens)) == 9
        rows, columns = grid.rows // 2, grid.columns // 2
        assert [(t // columns * 3 // rows, t % columns * 3 // columns) for t in tokens] == [
            (row, column) for row in range(3) for column in range(3)
        ]
    assert {stream for stream, _ in TOKEN_PROBES.values()} == {1, 2, 3}, "one for each DeepStack"


def test_the_learning_rate_schedule() -> None:
    rates = [optim.learning_rate(1.0, step, 1000, warm=100) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == rates[150] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[300:]))
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)


def test_training_can_start_from_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(options(tmp_path / "run", init=BUNDLED_MODEL), token_ids(BUNDLED_MODEL))
    assert trainer.phase == "joint"
    saved = load_file(BUNDLED_MODEL / "model.safetensors")
    assert saved
    state = trainer.model.state_dict()
    for name, value in saved.items():
        assert torch.equal(state[name], value.float()), name
    assert torch.equal(state["lm_head.weight"], state["model.language_model.embed_tokens.weight"])
    del saved["model.visual.merger.norm.weight"]
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing.*merger\.norm"):
        Trainer(options(tmp_path / "run", init=tmp_path), token_ids(BUNDLED_MODEL))


class Killed(Exception):
    """Stands for a kill at a bad moment."""


def run(phase: str, settings: argparse.Namespace, kill_at: int | None = None) -> Trainer:
    """Train one phase in this process, from the state file if there is one."""
    trainer = Trainer(settings, token_ids(BUNDLED_MODEL))

    def save_when_due() -> None:
        if trainer.step == kill_at:
            trainer.save()
            trainer.file.with_suffix(".partial").write_bytes(b"half a file")
            raise Killed

    trainer.save_when_due = save_when_due  # type: ignore[method-assign]
    getattr(train, f"train_{phase}")(trainer)
    return trainer


def straight(make: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    return (make(number) for number in range(start, stop))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["vision", "joint"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "prefetch", straight)
    whole = run(phase, options(tmp_path / "whole"))
    with pytest.raises(Killed):
        run(phase, options(tmp_path / "parts"), kill_at=2)
    saved = torch.load(tmp_path / "parts" / "state.pt")
    assert (saved["phase"], saved["step"]) == (phase, 2)
    parts = run(phase, options(tmp_path / "parts"))
    assert parts.phase == whole.phase == {"vision": "joint", "joint": "done"}[phase]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    for name, value in whole.probes.state_dict().items():
        assert torch.equal(value, parts.probes.state_dict()[name]), name


@pytest.mark.slow
def test_training_reduces_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same few answers over and over, the loss goes down."""
    monkeypatch.setattr(
        train, "prefetch", lambda make, start, stop: (make(0) for _ in range(start, stop))
    )
    losses: list[float] = []
    step = train.joint_step

    def watched(*arguments: Any) -> Any:
        values = step(*arguments)
        losses.append(float(values["loss"]))
        return values

    monkeypatch.setattr(train, "joint_step", watched)
    monkeypatch.setattr(train, "exact_answers", lambda *_: {})
    run("joint", options(tmp_path, rounds=16))
    assert losses[0] > 6
    assert sum(losses[-4:]) / 4 < 0.8 * losses[0]
