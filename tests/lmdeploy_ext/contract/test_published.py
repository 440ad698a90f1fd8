"""``get_tm_config`` on configurations as the published checkpoints have them, without their weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host]
SECTION = [24, 20, 20]


@dataclass(frozen=True)
class Size:
    """Sizes of the decoder and of the tower; 27 blocks of 1152 or 24 of 1024."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    tied: bool = False
    expert: int = 0
    small_tower: bool = False
    fp8: bool = False

    def config(self) -> dict[str, Any]:
        kind = "qwen3_vl_moe" if self.expert else "qwen3_vl"
        text: dict[str, Any] = {
            "model_type": f"{kind}_text", "hidden_size": self.hidden, "vocab_size": 151936,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": 128, "hidden_act": "silu",
            "intermediate_size": self.mlp, "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6, "rope_theta": 5000000, "attention_bias": False,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": SECTION,
                             "rope_type": "default"},
            "dtype": "bfloat16",
        }  # fmt: skip
        if self.expert:
            text |= {
                "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
                "moe_intermediate_size": self.expert, "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }  # fmt: skip
        else:
            text["tie_word_embeddings"] = self.tied
        depth, width, mlp = (24, 1024, 4096) if self.small_tower else (27, 1152, 4304)
        vision = {
            "model_type": kind, "depth": depth, "hidden_size": width, "intermediate_size": mlp,
            "num_heads": 16, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2,
            "spatial_merge_size": 2, "num_position_embeddings": 2304,
            "out_hidden_size": self.hidden, "hidden_act": "gelu_pytorch_tanh",
            "deepstack_visual_indexes": [5, 11, 17] if self.small_tower else [8, 16, 24],
        }  # fmt: skip
        name = "Qwen3VLMoe" if self.expert else "Qwen3VL"
        config = {
            "architectures": [f"{name}ForConditionalGeneration"], "model_type": kind,
            "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
            "vision_end_token_id": 151653, "tie_word_embeddings": self.tied,
            "text_config": text, "vision_config": vision,
        }  # fmt: skip
        if self.fp8:
            config["quantization_config"] = {
                "quant_method": "fp8", "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": ["lm_head", "model.visual.merger.linear_fc1"],
            }  # fmt: skip
        return config


SIZES = {
    "2B": Size(2048, 28, 16, 8, 6144, tied=True, small_tower=True),
    "4B": Size(2560, 36, 32, 8, 9728, tied=True, small_tower=True),
    "8B": Size(4096, 36, 32, 8, 12288),
    "8B-FP8": Size(4096, 36, 32, 8, 12288, fp8=True),
    "32B": Size(5120, 64, 64, 8, 25600),
    "30B-A3B": Size(2048, 48, 32, 4, 6144, expert=768),
    "235B-A22B-FP8": Size(4096, 94, 64, 4, 12288, expert=1536, fp8=True),
}


def _configure(folders: dict[str, str]) -> dict[str, Any]:
    from lmdeploy.turbomind import _tm
    from lmdeploy.turbomind.converter import get_tm_config

    import lmdeploy_ext
    from tests.host_runtime.engines import settings
    from tests.lmdeploy_ext.contract.exports import fields

    lmdeploy_ext.install("off")
    found = {}
    for name, folder in folders.items():
        engine = settings(dtype="auto", session_len=None, devices=[0])
        model, _, _ = get_tm_config(folder, engine)
        text, vision = model.text_model, model.vision_model
        vision._ctx = SimpleNamespace(data_type=_tm.DataType.TYPE_BF16)
        found[name] = {
            "engine": [engine.dtype, engine.session_len, engine.model_format],
            "vocabulary": model._vocab_size,
            "tied": text._tied,
            "attention": fields(text._attn_cfg),
            "moe": fields(text._moe_cfg) if text._n_experts else None,
            "tower": fields(vision._make_vision_root_cfg()),
            "tower attention": fields(vision._make_vision_attn_cfg()),
        }
    return found


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("published")
    for name, size in SIZES.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(size.config()))
    found: dict[str, Any] = run(_configure, {name: str(Path(root / name)) for name in SIZES})
    return found


@pytest.mark.parametrize("name", SIZES)
def test_published_configurations_are_accepted(name: str, configured: dict[str, Any]) -> None:
    size, found = SIZES[name], configured[name]
    assert found["engine"] == ["bfloat16", 262144, "fp8" if size.fp8 else None]
    assert found["vocabulary"] == 151936
    assert found["tied"] is size.tied
    attention = found["attention"]
    assert attention["hidden_dim"] == size.hidden
    assert [attention[key] for key in ("head_num", "kv_head_num", "head_dim")] == [
        size.heads,
        size.kv_heads,
        128,
    ]
    rope = attention["rope"]
    assert (rope["mrope_section"], rope["mrope_interleaved"]) == (SECTION, True)
    assert (rope["type"], rope["base"], rope["max_position_embeddings"]) == (1, 5e6, 262144)
    if size.expert:
        moe = found["moe"]
        assert (moe["expert_num"], moe["experts_per_token"], moe["norm_topk_prob"]) == (
            128,
            8,
            True,
        )
    tower, head = found["tower"], found["tower attention"]
    expected = (24, 1024, 4096, 64, 0.0) if size.small_tower else (27, 1152, 4304, 128, 72**-0.5)
    got = [tower[key] for key in ("depth", "hidden_dim", "intermediate_size")]
    assert [*got, head["head_dim"]] == list(expected[:4])
    assert head["softmax_scale"] == pytest.approx(expected[4], rel=1e-6)
    assert tower["out_hidden_dim"] == size.hidden
