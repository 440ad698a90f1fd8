"""Images arranged anew: features and answers move together, whatever the grid."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.drawings import tokenizer
from examples.drawings.arrangements import CELLS, Arrangement, arrange, cell_tokens
from examples.drawings.batches import joint_round
from examples.drawings.images import GRIDS
from examples.drawings.probes import PLACE_PROBES, place_targets, targets
from examples.drawings.scenes import HELD_OUT_SEED, POSITIONS, Keyframes, keyframes, scene
from service.wiring import BUNDLED_MODEL

pytestmark = pytest.mark.slow  # imports transformers

SEEDS = st.integers(0, 2 * HELD_OUT_SEED)


def arranged(seed: int, taken: set[int], share: float = 0.8) -> tuple[Any, Arrangement]:
    rng = random.Random(seed)
    grid = rng.choice(GRIDS)
    return grid, arrange(grid, rng, taken, share)


def is_late(arrangement: Arrangement, grid: Any) -> bool:
    return list(arrangement.marks) != cell_tokens(grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_centre_of_each_cell_moves_to_its_new_cell(grid: Any) -> None:
    rng, late = random.Random(0), 0
    for _ in range(60):
        arrangement = arrange(grid, rng, {0})
        assert sorted(arrangement.cells) == list(range(CELLS))
        places = {center: arrangement.source.eq(center).nonzero() for center in cell_tokens(grid)}
        assert all(len(where) == 1 for where in places.values()), "one copy of each"
        for cell, center in enumerate(cell_tokens(grid)):
            assert places[center].item() == arrangement.marks[arrangement.cells[cell]]
        late += is_late(arrangement, grid)
    assert 3 <= late <= 25


def test_rows_and_columns_are_permuted_as_a_whole() -> None:
    """Every one of the 36 ways occurs; cells of one row stay in one row, in one order."""
    seen = set()
    for seed in range(2000):
        _, arrangement = arranged(seed, taken=set(range(CELLS)))
        table = torch.tensor(arrangement.cells).view(3, 3)
        assert (table // 3 == table[:, :1] // 3).all()
        assert (table % 3 == table[:1] % 3).all()
        seen.add(arrangement.cells)
    assert len(seen) == 36


def test_share_zero_moves_nothing() -> None:
    for seed in range(50):
        grid, arrangement = arranged(seed, set(), share=0.0)
        assert arrangement.source.tolist() == list(range(grid.tokens))
        assert arrangement.cells == tuple(range(CELLS))
        assert list(arrangement.marks) == cell_tokens(grid)


def test_a_late_arrangement_is_the_image_one_token_later_and_one_cell_further() -> None:
    found = [
        (grid, arrangement)
        for grid, arrangement in (arranged(seed, {0}) for seed in range(300))
        if is_late(arrangement, grid)
    ]
    assert found
    for grid, arrangement in found:
        assert list(arrangement.marks)[1:] == [token + 1 for token in cell_tokens(grid)[:-1]]
        assert arrangement.cells[0] != 0, "an object of the last cell would wrap around"


@given(SEEDS)
def test_features_and_scene_move_together(seed: int) -> None:
    """What the vision probes find at each token, gathered, is what the new scene says."""
    facts = scene(seed)
    grid, arrangement = arranged(seed, {thing.cell for thing in facts.objects})
    new = arrangement.scene(facts)
    assert [t.cell for t in new.objects] == sorted(t.cell for t in new.objects)
    assert (new.place, new.lighting) == (facts.place, facts.lighting)
    in_place, _ = targets(facts, grid)
    gathered = in_place[:, arrangement.source]
    expected = torch.zeros_like(gathered)
    labels, _ = targets(new, grid)
    for thing in new.objects:
        expected[:, arrangement.marks[thing.cell]] = labels[:, cell_tokens(grid)[thing.cell]]
    assert torch.equal(gathered, expected)
    [places] = place_targets([new], arrangement)
    position, rank, change = places
    occupied = gathered[0] > 0
    assert torch.equal(occupied, position > 0)
    assert (position[occupied] - 1).sort().values.tolist() == [t.cell for t in new.objects]
    by_cell = sorted(zip(position[occupied].tolist(), rank[occupied].tolist(), strict=True))
    assert [r for _, r in by_cell] == list(range(1, 1 + len(new.objects)))
    assert not change.any()


@given(SEEDS)
def test_keyframes_keep_their_move(seed: int) -> None:
    frames = keyframes(seed)
    taken = {thing.cell for facts in (frames.first, frames.second) for thing in facts.objects}
    _, arrangement = arranged(seed, taken)
    new: Keyframes = arrangement.keyframes(frames)
    assert new.moved in new.first.objects
    gone = set(new.first.objects) - set(new.second.objects)
    came = set(new.second.objects) - set(new.first.objects)
    assert gone == {new.moved}
    assert [(t.name, t.size, t.cell) for t in came] == [
        (new.moved.name, new.moved.size, new.target)
    ]
    before, after = place_targets([new.first, new.second], arrangement)
    assert len(before) == len(PLACE_PROBES)
    assert not before[2].any()
    changes = {int(token): int(after[2, token]) for token in after[2].nonzero()}
    assert changes == {arrangement.marks[new.target]: 1, arrangement.marks[new.moved.cell]: 2}


def test_a_batch_has_the_answers_of_its_arranged_images() -> None:
    """The places that an answer names are those in which the decoder should see objects."""
    words: Any = tokenizer.load(BUNDLED_MODEL)
    moved = 0
    for number in range(3):
        for batch in joint_round(number, 10, 0, words, "analysis"):
            rows = batch.sequences.scored // batch.sequences.ids.shape[1]
            for row, (places, source) in enumerate(zip(batch.places, batch.source, strict=True)):
                text = words.decode(batch.sequences.wanted[rows == row])
                objects = json.loads(text.removesuffix("<|im_end|>"))["objects"]
                cells = [POSITIONS.index(phrase.partition(" at ")[2]) for phrase in objects]
                found = places[0][places[0] > 0] - 1
                assert sorted(cells) == sorted(found.tolist())
                marked = batch.images.per_token[row, 0][source] > 0
                assert torch.equal(marked, places[0] > 0)
                moved += source.tolist() != list(range(len(source)))
    assert moved > 60
