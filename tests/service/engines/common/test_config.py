"""Checkpoints that cannot be used are refused with the key that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.engines.common.config import CheckpointError, MoeConfig, TextConfig, resolve_model
from service.errors import EngineUnavailable
from service.wiring import BUNDLED_MODEL

FILES = ("config.json", "generation_config.json")


def checkpoint(folder: Path, **text: Any) -> Path:
    """The configuration of the bundled model, with other values; None takes a key away."""
    for name in FILES:
        shutil.copy(BUNDLED_MODEL / name, folder)
    content = json.loads((folder / "config.json").read_text())
    changed = {**content["text_config"], **text}
    content["text_config"] = {key: one for key, one in changed.items() if one is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def rope(**changes: Any) -> dict[str, Any]:
    text = json.loads((BUNDLED_MODEL / "config.json").read_text())["text_config"]
    found = {**(text.get("rope_parameters") or text["rope_scaling"]), **changes}
    kept = {key: one for key, one in found.items() if one is not None}
    return {"rope_parameters": kept, "rope_scaling": None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (rope(mrope_interleaved=False), "mrope_interleaved=false is not the layout of Qwen3-VL"),
        (rope(rope_type="yarn"), "rope type 'yarn' is not supported"),
        ({**rope(rope_theta=None), "rope_theta": None}, "config.json has no rope_theta"),
        (rope(mrope_section=[4, 4]), "must have three entries"),
        (rope(mrope_section=[4, 4, 9]), "does not sum to"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_an_option_that_is_not_supported(tmp_path: Path, text: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        TextConfig.from_checkpoint(checkpoint(tmp_path, **text))
    assert says in str(caught.value)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("text", "sparse"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"num_experts": 0}, []),
    ],
)
def test_the_layers_with_experts(tmp_path: Path, text: dict[str, Any], sparse: list[int]) -> None:
    folder = checkpoint(tmp_path, num_hidden_layers=6, **{**MOE, **text})
    assert TextConfig.from_checkpoint(folder).moe == (None,) * 6, "a dense architecture"
    found = TextConfig.from_checkpoint(of_experts(folder)).moe
    assert [layer for layer, moe in enumerate(found) if moe is not None] == sparse
    assert {moe for moe in found if moe is not None} <= {MoeConfig(4, 2, 32)}


def test_a_router_that_does_not_normalise(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, norm_topk_prob=False, **MOE)
    assert TextConfig.from_checkpoint(folder)
    with pytest.raises(CheckpointError, match="norm_topk_prob=false is not the router"):
        TextConfig.from_checkpoint(of_experts(folder))


def of_experts(folder: Path) -> Path:
    content = json.loads((folder / "config.json").read_text())
    content["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_the_base_frequency_may_stand_in_either_place(tmp_path: Path) -> None:
    inside = TextConfig.from_checkpoint(checkpoint(tmp_path, **rope(rope_theta=1234.0)))
    outside = checkpoint(tmp_path, **rope(rope_theta=None), rope_theta=1234.0)
    assert TextConfig.from_checkpoint(outside).rope_theta == inside.rope_theta == 1234.0


@pytest.mark.parametrize(
    ("given", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, (5,)), ([], None)]
)
def test_the_tokens_that_end_an_answer(
    tmp_path: Path, given: Any, expected: tuple[int, ...] | None
) -> None:
    """Those of generation_config.json, else those of config.json; there has to be one."""
    folder = checkpoint(tmp_path, eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    if expected is not None:
        assert TextConfig.from_checkpoint(folder).stop_ids == expected
        return
    with pytest.raises(CheckpointError, match=r"neither .* has eos_token_id"):
        TextConfig.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "config.json is missing"),
        ("{", "config.json is not valid JSON: "),
        ("[]", "config.json is not a JSON object"),
        ('{"architectures": []}', "architecture is none; supported are "),
        (
            '{"architectures": ["Qwen3VLForConditionalGeneration"]}',
            "config.json has no text_config",
        ),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        TextConfig.from_checkpoint(tmp_path)
    assert says in str(caught.value)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    """By its name alone: the log of a server is not to tell paths."""
    (tmp_path / "empty").mkdir()
    for name, says in (
        ("empty", "the model folder 'empty' has no config.json"),
        ("none", "there is no model folder 'none'"),
    ):
        with pytest.raises(EngineUnavailable, match=says) as caught:
            resolve_model(tmp_path / name)
        assert str(tmp_path) not in caught.value.message
