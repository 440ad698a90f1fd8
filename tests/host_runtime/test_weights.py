"""Weights read back from the engine's memory against the checkpoint's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host, pytest.mark.parity]


def _export(checkpoint: str, result: str) -> None:
    from tests.host_runtime.weights import exported

    torch.save(exported(checkpoint), result)


def test_committed_weights_are_those_of_the_checkpoint(
    text_checkpoint: Path, tmp_path: Path
) -> None:
    run(_export, text_checkpoint, result=tmp_path / "weights.pt")
    written: dict[str, Any] = torch.load(tmp_path / "weights.pt")
    read = load_file(text_checkpoint / "model.safetensors")
    embedding = read["model.embed_tokens.weight"]
    assert torch.equal(written.pop("text_model.tok_embeddings"), embedding)
    assert torch.equal(written.pop("text_model.output.weight"), embedding.T)
    assert torch.equal(written.pop("text_model.norm.weight"), read["model.norm.weight"])
    for layer in range(2):
        here, there = f"text_model.layers.{layer}", f"model.layers.{layer}"
        for name, source in {
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():
            assert torch.equal(
                written.pop(f"{here}.{name}.weight"), read[f"{there}.{source}.weight"]
            )
        down = written.pop(f"{here}.feed_forward.w2.weight")
        assert torch.equal(down, read[f"{there}.mlp.down_proj.weight"].T)
        out = written.pop(f"{here}.attention.wo.weight")
        assert torch.equal(out, read[f"{there}.self_attn.o_proj.weight"].T)
        # The fused and re-ordered ones: the same numbers, in an order of the kernels' own.
        for name, sources in {
            "attention.w_qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attention.q_norm": ["self_attn.q_norm"],
            "attention.k_norm": ["self_attn.k_norm"],
            "feed_forward.w1w3": ["mlp.gate_proj", "mlp.up_proj"],
        }.items():
            values = torch.cat([read[f"{there}.{one}.weight"].flatten() for one in sources])
            assert torch.equal(
                written.pop(f"{here}.{name}.weight").flatten().sort().values, values.sort().values
            )
    assert not written, "nothing else was committed"
