"""Checkpoints that are not as the published ones: what is taken, what is refused, what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.host_runtime.runner import run
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape

pytestmark = [pytest.mark.slow, pytest.mark.host]
TIED, UNTIED = EngineShape(), EngineShape(tied=False, vision_head=72)
MOE = EngineShape(moe=True, tied=False)
LAYER = "model.language_model.layers.0"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


def quantised_tower(config: Any, weights: Any) -> None:
    name = "model.visual.blocks.0.attn.qkv.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = torch.ones(3, 1)


def without_head(config: Any, weights: Any) -> None:
    del weights["lm_head.weight"]


def tied_with_a_head(config: Any, weights: Any) -> None:
    weights["lm_head.weight"] = torch.full_like(
        weights["model.language_model.embed_tokens.weight"], 0.5
    )


def tied_by_the_text_alone(config: Any, weights: Any) -> None:
    config["tie_word_embeddings"] = False
    config["text_config"]["tie_word_embeddings"] = True


def scale_that_nobody_reads(config: Any, weights: Any) -> None:
    weights[f"{LAYER}.self_attn.q_proj.input_scale"] = torch.ones(1)


def rotary_buffer(config: Any, weights: Any) -> None:
    weights[f"{LAYER}.self_attn.rotary_emb.inv_freq"] = torch.ones(64)


def head_of_80(config: Any, weights: Any) -> None:
    config["vision_config"] |= {"hidden_size": 160}


def other_activation(config: Any, weights: Any) -> None:
    config["vision_config"]["hidden_act"] = "gelu"


def section_that_does_not_sum(config: Any, weights: Any) -> None:
    config["text_config"]["rope_parameters"]["mrope_section"] = [24, 20, 8]


def no_section(config: Any, weights: Any) -> None:
    del config["text_config"]["rope_parameters"]["mrope_section"]


def long_context(config: Any, weights: Any) -> None:
    config["text_config"]["max_position_embeddings"] = 3 * 4096
    config["text_config"]["rope_parameters"] |= {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 4096,
    }  # fmt: skip


def experts_of_another_size(config: Any, weights: Any) -> None:
    name = f"{LAYER}.mlp.experts.down_proj"
    weights[name] = weights[name][:, :, :64].contiguous()


def every_second_layer_sparse(config: Any, weights: Any) -> None:
    config["text_config"]["decoder_sparse_step"] = 2
    for name in [name for name in weights if name.startswith(f"{LAYER}.mlp.")]:
        del weights[name]
    for kind, shape in {"gate": (192, 256), "up": (192, 256), "down": (256, 192)}.items():
        weights[f"{LAYER}.mlp.{kind}_proj.weight"] = torch.full(shape, 0.5).bfloat16()


CASES: dict[Change, EngineShape] = {
    quantised_tower: TIED, without_head: UNTIED, tied_with_a_head: TIED,
    tied_by_the_text_alone: TIED, scale_that_nobody_reads: TIED, rotary_buffer: TIED,
    head_of_80: TIED, other_activation: TIED, section_that_does_not_sum: TIED, no_section: TIED,
    long_context: TIED, experts_of_another_size: MOE, every_second_layer_sparse: MOE,
}  # fmt: skip


def _try_all(folders: dict[str, str], results: str) -> dict[str, Any]:
    import logging

    from tests.lmdeploy_ext.contract.exports import export

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                said.append(record.getMessage())

    logging.getLogger("lmdeploy_ext").addHandler(Listener())
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        said.clear()
        try:
            configs = export(folder, f"{results}/{name}.pt")["configs"]
        except (ValueError, KeyError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            found[name] = {"configs": configs, "said": " ".join(said)}
    return found


@pytest.fixture(scope="module")
def tried(
    engine_checkpoint: Callable[[EngineShape], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Name of the change -> the error, or configurations, warnings and tensors of the engine."""
    root = tmp_path_factory.mktemp("odd")
    folders = {}
    for change, shape in CASES.items():
        folder = root / change.__name__
        shutil.copytree(engine_checkpoint(shape), folder)
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        change(config, weights)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        folders[change.__name__] = str(folder)
    found: dict[str, Any] = run(_try_all, folders, root, timeout_s=280)
    for name, result in found.items():
        if "error" not in result:
            result["held"] = torch.load(root / f"{name}.pt")
            result["file"] = load_file(root / name / "model.safetensors")
    return found


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (quantised_tower, "ValueError: the vision tower is quantised (model.visual.blocks.0."),
        (without_head, "the checkpoint has no lm_head and its configuration ties none"),
        (head_of_80, "ValueError: vision head size 160/2 is none of [64, 72]"),
        (other_activation, "ValueError: vision hidden_act 'gelu' is not gelu_pytorch_tanh"),
        (section_that_does_not_sum, "ValueError: mrope_section [24, 20, 8] does not sum to half"),
        (experts_of_another_size, "down_proj (64, 256) are no pair of packed expert weights"),
    ],
)
def test_unsupported_checkpoints_are_refused(
    tried: dict[str, Any], change: Change, error: str
) -> None:
    assert error in tried[change.__name__]["error"]


def test_an_output_head_in_the_checkpoint_is_used_even_if_tied(tried: dict[str, Any]) -> None:
    held = tried["tied_with_a_head"]["held"]
    assert (held["text_model.output.weight"] == 0.5).all()


def test_tied_by_the_text_configuration(tried: dict[str, Any]) -> None:
    found = tried["tied_by_the_text_alone"]
    embedding = found["file"]["model.language_model.embed_tokens.weight"]
    assert torch.equal(found["held"]["text_model.output.weight"], embedding.T)


def test_an_unread_tensor_is_named_in_a_warning(tried: dict[str, Any]) -> None:
    said = tried["scale_that_nobody_reads"]["said"]
    assert (
        f"1 tensors of the checkpoint were not read: {LAYER}.self_attn.q_proj.input_scale" in said
    )
    assert "not read" not in tried["rotary_buffer"]["said"]
    assert "not read" not in tried["every_second_layer_sparse"]["said"]


def test_mrope_section_as_in_transformers_when_none_is_given(tried: dict[str, Any]) -> None:
    rope = tried["no_section"]["configs"]["text_model.layers.0.attention"]["rope"]
    assert (rope["mrope_section"], rope["mrope_interleaved"]) == ([24, 20, 20], True)


def test_yarn_keeps_mrope(tried: dict[str, Any]) -> None:
    rope = tried["long_context"]["configs"]["text_model.layers.0.attention"]["rope"]
    assert (rope["mrope_section"], rope["mrope_interleaved"]) == ([24, 20, 20], True)
    assert (rope["type"], rope["factor"], rope["yarn_beta_fast"]) == (4, 3.0, 32.0)
    assert rope["yarn_attention_factor"] == pytest.approx(1.10986, abs=1e-4)


def test_checkpoints_with_dense_and_moe_layers(tried: dict[str, Any]) -> None:
    held = tried["every_second_layer_sparse"]["held"]
    assert (held["text_model.layers.0.feed_forward.w2.weight"] == 0.5).all()
    assert "text_model.layers.1.moe_ffn.gate.weight" in held


def _in_float16(folder: str, result: str) -> str:
    from tests.lmdeploy_ext.contract.exports import export

    try:
        export(folder, result, dtype="float16")
    except ValueError as error:
        return str(error)
    return "taken"


def test_experts_in_float16_are_refused_on_a_gpu_that_lacks_the_kernels(
    engine_checkpoint: Callable[[EngineShape], Path], tmp_path: Path
) -> None:
    """The host runtime is a device of compute capability 9.0."""
    refused, taken = (
        run(_in_float16, engine_checkpoint(shape), tmp_path / f"{shape.name}.pt", mode=mode)
        for shape, mode in ((MOE, "null"), (TIED, "numbers"))
    )
    assert refused == (
        "model.language_model.layers.0.mlp: on this GPU, TurboMind has no kernels for experts in "
        "TYPE_FP16; take dtype bfloat16, or LMDeploy's PyTorch engine"
    )
    assert taken == "taken"
