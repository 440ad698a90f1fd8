"""The mRoPE positions that the stock engine itself makes of packed requests, against transformers'."""

from __future__ import annotations

import asyncio
import collections
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.host_runtime.build import NotAvailable, find_compiler
from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape
from tests.lmdeploy_ext.prompts import IMAGE, Prompt, features, prompts

pytestmark = [pytest.mark.slow, pytest.mark.host]


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that writes segments down."""
    try:
        compiler = find_compiler()
    except NotAvailable as error:
        pytest.skip(str(error))
    library = tmp_path_factory.mktemp("hook") / "segments.so"
    source = Path(__file__).with_name("segments.cpp")
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    return library


def positions(segments: list[list[int]], rows: int) -> np.ndarray:
    """Position ids (3, rows) of one forward, as TurboMind's kernel makes them of its segments."""
    found = np.full((3, rows), -1)
    for first, count, base, height, width, offset in segments:
        index = offset + np.arange(count)
        steps = [index] * 3
        if height:
            steps = [index // (height * width), index // width % height, index % width]
        found[:, first : first + count] = base + np.stack(steps)
    assert (found >= 0).all(), "each row has a segment"
    return found


def _engine_positions(
    checkpoint: str, segments: str, count: int, options: dict[str, Any]
) -> dict[str, int]:
    import lmdeploy_ext
    from tests.host_runtime import engines

    lmdeploy_ext.install("off")  # DeepStack stands in front of the same function
    engine = engines.turbomind(checkpoint, session_len=1280, **options)
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    tokens = [20, config["image_token_id"], config["video_token_id"]]
    written = Path(segments)
    loop = asyncio.new_event_loop()
    seen: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(prompts(8).filter(lambda prompt: bool(prompt.pieces)))
    def check(prompt: Prompt) -> None:
        written.write_text("")
        ids = [tokens[kind] for kind in prompt.types]
        asked = engines.ask(engine, ids, images=_items(prompt), max_new_tokens=1, ignore_eos=True)
        answer = loop.run_until_complete(asked)
        assert answer.status == "FINISH"
        forwards = [json.loads(line) for line in written.read_text().splitlines()]
        parts = [positions(one, sum(rows for _, rows, *_ in one)) for one in forwards]
        seen.update(features(prompt))
        seen["prompts"] += 1
        seen["in several forwards"] += len(forwards) > 1
        # A forward of text alone may need no segments; what there is comes from the front.
        found = np.concatenate(parts, axis=1)
        np.testing.assert_array_equal(found, prompt.positions()[0][:, : found.shape[1]])
        assert found.shape[1] >= prompt.spans[-1][1]

    check()
    return dict(seen)


def _items(prompt: Prompt) -> list[dict[str, Any]]:
    found = []
    for piece, span in zip(prompt.pieces, prompt.spans, strict=True):
        _, h, w = piece.grid
        pixels, grid = torch.zeros(h * w, 1536), torch.tensor(piece.grid)
        if piece.kind == IMAGE:
            fields = {"modality": "image", "pixel_values": pixels, "image_grid_thw": grid}
        else:
            fields = {"modality": "video", "pixel_values_videos": pixels, "video_grid_thw": grid}
        found.append(fields | {"offset": span})
    return found


@pytest.mark.parametrize(
    ("count", "options"),
    [(500, {"max_prefill_token_num": 1024}), (150, {"max_prefill_token_num": 64})],
    ids=["whole", "in parts"],
)
def test_the_engine_makes_the_positions_of_transformers(
    engine_checkpoint: Callable[[EngineShape], Path],
    hook: Path,
    tmp_path: Path,
    count: int,
    options: dict[str, Any],
) -> None:
    written = tmp_path / "segments"
    seen = run(
        _engine_positions, engine_checkpoint(EngineShape()), written, count, options,
        timeout_s=280, extra={"LD_PRELOAD": str(hook), "SEGMENTS": str(written)},
    )  # fmt: skip
    assert seen["prompts"] >= count - 1
    assert (seen["in several forwards"] > count // 2) == (options["max_prefill_token_num"] == 64)
    for feature in ("starts with a piece", "ends with a piece", "images and video",
                    "neighbours of one kind", "neighbours of two kinds", "8 pieces"):  # fmt: skip
        assert seen[feature] >= 2, feature
