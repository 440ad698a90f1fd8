"""Where features come from and where they go, from the segments of a batch."""

from __future__ import annotations

import random

import pytest

from lmdeploy_ext.deepstack.plan import Plan, plan

Segment = tuple[int, int, int, int, int, int]


def text(row: int, count: int) -> Segment:
    return (row, count, 7, 0, 0, 0)


def image(row: int, count: int, height: int, width: int, offset: int = 0) -> Segment:
    return (row, count, 7, height, width, offset)


def test_batches_without_images_have_no_plan() -> None:
    assert plan([]) is None
    assert plan([text(0, 12), text(20, 3)]) is None


def test_one_image_between_texts() -> None:
    found = plan([text(0, 3), image(3, 16, 4, 4), text(19, 10)])
    assert found == Plan(tokens=16, rows=16, sources=((0, 16),), targets=((3, 19),))


def test_adjacent_ranges_are_merged() -> None:
    found = plan([image(0, 6, 2, 3), image(6, 4, 2, 2), text(10, 5), image(15, 4, 2, 2)])
    assert found == Plan(tokens=14, rows=14, sources=((0, 14),), targets=((0, 10), (15, 19)))


def test_the_end_of_an_image_whose_beginning_was_in_the_batch_before() -> None:
    found = plan([image(0, 5, 4, 4, offset=11), text(5, 2), image(7, 3, 2, 3)])
    assert found == Plan(tokens=22, rows=8, sources=((11, 19),), targets=((0, 5), (7, 10)))


def test_the_middle_of_an_image() -> None:
    found = plan([image(2, 4, 4, 4, offset=6), image(6, 4, 2, 2)])
    assert found == Plan(tokens=20, rows=8, sources=((6, 10), (16, 20)), targets=((2, 10),))


@pytest.mark.parametrize(
    "segment",
    [image(0, 17, 4, 4), image(0, 4, 4, 4, 13), image(0, 0, 2, 2), image(-1, 4, 2, 2),
     image(0, 4, 2, 2, -1), image(0, 4, -2, -2)],
)  # fmt: skip
def test_an_invalid_segment_is_refused(segment: Segment) -> None:
    with pytest.raises(ValueError, match="no part of an image"):
        plan([text(0, 1), segment])


def test_rows_and_sources_of_random_batches() -> None:
    """Token by token: the feature of the image's token lands at the row that the segment gives it."""
    for seed in range(300):
        source = random.Random(seed)
        segments, wanted, row, tokens = [], [], 0, 0
        for _ in range(source.randrange(8)):
            if source.random() < 0.5:
                count = source.randrange(1, 9)
                segments.append(text(row, count))
            else:
                height, width = source.randrange(1, 6), source.randrange(1, 6)
                offset = source.randrange(height * width) if source.random() < 0.5 else 0
                count = source.randrange(1, height * width - offset + 1)
                segments.append(image(row, count, height, width, offset))
                wanted += [(tokens + offset + i, row + i) for i in range(count)]
                tokens += height * width
            row += count + source.choice([0, 0, 3])  # rows of requests that only decode
        found = plan(segments)
        if found is None:
            assert not wanted
            continue
        sources = [token for begin, end in found.sources for token in range(begin, end)]
        targets = [row for begin, end in found.targets for row in range(begin, end)]
        assert list(zip(sources, targets, strict=True)) == wanted
        assert (found.tokens, found.rows) == (tokens, len(wanted))
