"""Images and video frames on their way into TurboMind: spans, grids, pixels, fingerprints, positions."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lmdeploy_ext.mrope import mrope_positions
from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape
from tests.lmdeploy_ext.prompts import IMAGE, Piece, Prompt, features, prompts

pytestmark = [pytest.mark.slow, pytest.mark.host]
CASES = 600
VALUES = 3 * 2 * 2 * 2
"""Values of a patch of 2×2 pixels."""


def tower() -> Any:
    """A source model of the tower that packs, with small patches and bfloat16; for a child."""
    from transformers import Qwen3VLVisionConfig

    from lmdeploy_ext.turbomind.vision import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(hidden_size=128, num_heads=2, patch_size=2)
    model = Qwen3VLVisionModel(config, resolver=None)
    model._ctx = SimpleNamespace(dtype=torch.bfloat16)
    return model


def item(piece: Piece, span: tuple[int, int], seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """An item as LMDeploy's front end makes it, with the modality as an enum or as text."""
    from lmdeploy.vl.constants import Modality

    t, h, w = piece.grid
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.rand(t * h * w, VALUES, generator=noise).to(dtype)
    kind = Modality.IMAGE if piece.kind == IMAGE else Modality.VIDEO
    names = ("pixel_values", "image_grid_thw", "image_token_id")
    if kind is Modality.VIDEO:
        names = ("pixel_values_videos", "video_grid_thw", "video_token_id")
    values: tuple[Any, ...] = (pixels, torch.tensor(piece.grid), 5)
    modality = kind if seed % 2 else kind.value
    return {"modality": modality, "offset": span, **dict(zip(names, values, strict=True))}


def _random_prompts(count: int) -> dict[str, Any]:
    from lmdeploy.turbomind import _tm

    from tests.host_runtime.weights import tensor

    model, source = tower(), random.Random(0)
    seen: collections.Counter[str] = collections.Counter()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(prompts(8))
    def check(prompt: Prompt) -> None:
        seen.update(features(prompt))
        seen["prompts"] += 1
        made = [
            item(piece, span, index, source.choice([torch.float32, torch.bfloat16]))
            for index, (piece, span) in enumerate(zip(prompt.pieces, prompt.spans, strict=True))
        ]
        packed = model.to_turbomind_multimodal(source.sample(made, len(made))).items
        spans = [(one.token_begin, one.token_end) for one in packed]
        grids = [tuple(one.grid_thw) for one in packed]
        assert spans == prompt.spans
        assert grids == [piece.grid for piece in prompt.pieces]
        positions, delta = mrope_positions(len(prompt.types), spans, np.array(grids).reshape(-1, 3))
        expected, expected_delta = prompt.positions()
        np.testing.assert_array_equal(positions, expected)
        assert delta == expected_delta
        kinds = {True: _tm.multimodal.Modality.IMAGE, False: _tm.multimodal.Modality.VIDEO}
        for one, given_item, piece in zip(packed, made, prompt.pieces, strict=True):
            assert one.modality == kinds[piece.kind == IMAGE]
            pixels = given_item.get("pixel_values", given_item.get("pixel_values_videos"))
            assert torch.equal(tensor(one.data), pixels.bfloat16())
        assert len({one.fingerprint for one in packed}) == len(packed)

    check()
    return dict(seen)


def test_spans_and_positions_are_those_of_transformers() -> None:
    seen = run(_random_prompts, CASES, mode="driver", timeout_s=280)
    assert seen["prompts"] >= 500
    assert all(seen[f"{count} pieces"] >= 10 for count in range(9))
    for feature in ("starts with a piece", "ends with a piece", "images and video",
                    "neighbours of one kind", "neighbours of two kinds"):  # fmt: skip
        assert seen[feature] >= 20, feature


def _fingerprints() -> dict[str, str]:
    model = tower()
    piece = Piece(2, 3)

    def of(made: dict[str, Any]) -> str:
        (one,) = model.to_turbomind_multimodal([made]).items
        return str(one.fingerprint.hex())

    plain = item(piece, (0, 6), 1, torch.float32)
    other = {**plain, "pixel_values": plain["pixel_values"].clone()}
    other["pixel_values"][-1, -1] += 0.5
    rounded = {**plain, "pixel_values": plain["pixel_values"].bfloat16()}
    turned = {**plain, "image_grid_thw": torch.tensor([1, 6, 4])}
    return {
        "plain": of(plain),
        "again": of(item(piece, (0, 6), 1, torch.float32)),
        "elsewhere": of(item(piece, (7, 13), 1, torch.float32)),
        "rounded before": of(rounded),
        "one value": of(other),
        "turned": of(turned),
        "video": of(item(Piece(2, 3, kind=2), (0, 6), 1, torch.float32)),
        "given": of({**plain, "fingerprint": b"x" * 32}),
        "none": of({**plain, "fingerprint": b""}),
    }


def _small_checks() -> dict[str, dict[str, str]]:
    return {"fingerprints": _fingerprints(), "refusals": _refusals()}


@pytest.fixture(scope="module")
def checked() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = run(_small_checks, mode="driver")
    return found


def test_fingerprints_differ_whenever_the_input_of_the_tower_differs(
    checked: dict[str, dict[str, str]],
) -> None:
    found = checked["fingerprints"]
    plain = found.pop("plain")
    same = ("again", "elsewhere", "rounded before")
    assert [found.pop(name) for name in same] == [plain] * 3
    assert found.pop("given") == (b"x" * 32).hex()
    assert found.pop("none") == "00" * 32, "TurboMind's mark for: not in the prefix cache"
    assert len({plain, *found.values()}) == 4, "one value, turned and video are other images"
    assert all(len(value) == 64 for value in found.values())


def _refusals() -> dict[str, str]:
    from lmdeploy.vl.constants import Modality

    model = tower()
    good = item(Piece(2, 3), (0, 6), 1, torch.float32)
    frame = item(Piece(2, 3, kind=2), (0, 6), 1, torch.float32)
    pixels = good["pixel_values"]
    film = {**frame, "pixel_values_videos": torch.rand(48, VALUES), "offset": (0, 12),
            "video_grid_thw": torch.tensor([2, 4, 6])}  # fmt: skip
    wrong = {
        "audio": [{**good, "modality": Modality.AUDIO}],
        "no modality": [{**good, "modality": None}],
        "bytes": [{**good, "pixel_values": (pixels * 255).to(torch.uint8)}],
        "numpy": [{**good, "pixel_values": pixels.numpy()}],
        "rows": [{**good, "pixel_values": pixels[:-1]}],
        "values": [{**good, "pixel_values": pixels[:, :-1]}],
        "short span": [{**good, "offset": (0, 5)}],
        "overlap": [good, item(Piece(1, 2), (5, 7), 2, torch.float32)],
        "negative": [{**good, "offset": (-1, 5)}],
        "odd side": [{**good, "image_grid_thw": [1, 3, 8]}],
        "film in one span": [film],
        "three offsets": [{**good, "offset": (0, 3, 6)}],
    }
    said = {}
    for name, items in wrong.items():
        try:
            model.to_turbomind_multimodal(items)
        except ValueError as error:
            said[name] = str(error)
    return said


def test_items_that_do_not_fit_are_refused_by_name(checked: dict[str, dict[str, str]]) -> None:
    assert checked["refusals"] == {
        "audio": "item 0: Qwen3-VL takes no <Modality.AUDIO: 'audio'>",
        "no modality": "item 0: Qwen3-VL takes no None",
        "bytes": "item 0: pixels must be a floating tensor, got torch.uint8",
        "numpy": "item 0: pixels must be a floating tensor, got float32",
        "rows": "item 0: pixels (23, 24) do not fit grid (1, 4, 6): (24, 24)",
        "values": "item 0: pixels (24, 23) do not fit grid (1, 4, 6): (24, 24)",
        "short span": "image 0: span [0, 5) has 5 tokens, grid (1, 4, 6) needs 6",
        "overlap": "image 1: span [5, 7) is not inside [6, 7); spans must be sorted, disjoint and "
        "within the prompt",
        "negative": "image 0: span [-1, 5) is not inside [0, 5); spans must be sorted, disjoint "
        "and within the prompt",
        "odd side": "image 0: grid (1, 3, 8) needs sides in positive multiples of 2",
        "film in one span": "image 0: grid (2, 4, 6) has t = 2; give each frame a span and grid",
        "three offsets": "Qwen3.5 ViT offset should contain 2 values, got [0, 3, 6]",
    }


# LMDeploy's own front end, with transformers' processor.


def _front_end(checkpoint: str) -> list[dict[str, Any]]:
    from lmdeploy.vl.model.qwen3 import Qwen3VLModel

    import lmdeploy_ext

    lmdeploy_ext.install()
    front = Qwen3VLModel(checkpoint, backend="turbomind")
    front.build_preprocessor()
    front.set_mm_feature_dtype(torch.bfloat16)
    model, source = tower(), random.Random(3)
    model._patch_in_dim = 3 * 2 * 16 * 16
    return [_one_conversation(front, model, source, media) for media in CONVERSATIONS]


CONVERSATIONS = ("", "i", "ii", "iti", "titit", "v", "tvt", "ivi", "vv", "iviitv", "iiiiiiii")
"""Parts of a message: t text, i image, v video."""


def _one_conversation(front: Any, model: Any, source: random.Random, media: str) -> dict[str, Any]:
    content, text = [], "<|im_start|>user\n"
    for part in media:
        if part == "t":
            text += "the red circle "
        elif part == "i":
            sides = (source.randrange(20, 300), source.randrange(20, 300), 3)
            content.append({"type": "image", "data": _image(source, sides)})
            text += "<|vision_start|><|image_pad|><|vision_end|>"
        else:
            frames = source.choice([2, 3, 4, 6])
            film = np.stack([np.asarray(_image(source, (64, 96, 3))) for _ in range(frames)])
            metadata = {"total_num_frames": frames, "fps": 2.0, "duration": frames / 2,
                        "frames_indices": list(range(frames)), "video_backend": "none"}  # fmt: skip
            content.append({"type": "video", "data": film, "video_metadata": metadata})
            text += "<|vision_start|><|video_pad|><|vision_end|>"
    text += " describe<|im_end|>\n<|im_start|>assistant\n"
    made = front.preprocess([{"role": "user", "content": content}], text)
    packed = model.to_turbomind_multimodal(made["multimodal"]).items
    spans = [(one.token_begin, one.token_end) for one in packed]
    grids = [tuple(one.grid_thw) for one in packed]
    positions, delta = mrope_positions(
        len(made["input_ids"]), spans, np.array(grids).reshape(-1, 3)
    )
    return {
        "ids": made["input_ids"], "spans": spans, "grids": grids,
        "kinds": [one.modality.name for one in packed],
        "positions": positions.tolist(), "delta": delta, "media": media,
        "image": front.image_token_id, "video": front.video_token_id,
    }  # fmt: skip


def _image(source: random.Random, sides: tuple[int, int, int]) -> Any:
    from PIL import Image

    noise = np.random.default_rng(source.randrange(1000))
    return Image.fromarray(noise.integers(0, 255, sides, dtype=np.uint8))


def test_the_front_end_gives_each_frame_its_own_span(
    engine_checkpoint: Callable[[EngineShape], Path],
) -> None:
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel as Oracle

    folder = engine_checkpoint(EngineShape())
    config = Qwen3VLConfig.from_pretrained(folder)
    with torch.device("meta"):
        oracle = Oracle(config)
    for seen in run(_front_end, folder, mode="driver"):
        ids = np.array(seen["ids"])
        types = (ids == seen["image"]) + 2 * (ids == seen["video"])
        grids: dict[str, list[list[int]]] = {"IMAGE": [], "VIDEO": []}
        for kind, grid, (begin, end) in zip(
            seen["kinds"], seen["grids"], seen["spans"], strict=True
        ):
            assert grid[0] == 1
            assert (types[begin:end] == (1 if kind == "IMAGE" else 2)).all()
            grids[kind].append(grid)
        assert (types > 0).sum() == sum(end - begin for begin, end in seen["spans"])
        assert len(grids["IMAGE"]) == seen["media"].count("i")
        assert len(grids["VIDEO"]) >= seen["media"].count("v")
        positions, delta = oracle.get_rope_index(
            torch.from_numpy(ids)[None],
            torch.from_numpy(types)[None].int(),
            image_grid_thw=torch.tensor(grids["IMAGE"]) if grids["IMAGE"] else None,
            video_grid_thw=torch.tensor(grids["VIDEO"]) if grids["VIDEO"] else None,
        )
        assert positions[:, 0].tolist() == seen["positions"]
        assert int(delta) == seen["delta"]
