"""Writes a Qwen3-VL checkpoint as the two GGUF files that llama.cpp reads: language model, and vision.

``python -m tests.model_servers.gguf_files CHECKPOINT FOLDER`` with the package ``gguf``. Float32, without
loss. For small checkpoints without experts, as the bundled model: llama.cpp has a converter of its own for all
others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TEXT, VISION = "text.gguf", "mmproj.gguf"
LANGUAGE_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION_BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
MERGER = {"norm": "v.post_ln", "linear_fc1": "mm.0", "linear_fc2": "mm.2"}
DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
EPSILON_OF_VISION = 1e-6


def write(checkpoint: Path, folder: Path) -> tuple[Path, Path]:
    """Write both files into a folder, which is made; returns their paths."""
    config = json.loads((checkpoint / "config.json").read_text())
    weights = read_weights(checkpoint / "model.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    text, vision = folder / TEXT, folder / VISION
    _write_language(checkpoint, config, weights, text)
    _write_vision(config, weights, vision)
    return text, vision


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors in float32, without torch: whoever has llama.cpp need not have it."""
    from safetensors import deserialize

    found = {}
    for name, tensor in deserialize(path.read_bytes()):
        kind, data = tensor["dtype"], tensor["data"]
        if kind == "BF16":  # numpy has none: it is the upper half of a float32
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[kind])
        found[name] = values.astype(np.float32).reshape(tensor["shape"])
    return found


def _write_language(
    checkpoint: Path, config: dict[str, Any], weights: dict[str, Any], path: Path
) -> None:
    import gguf

    text, vision = config["text_config"], config["vision_config"]
    rope = text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}
    writer = gguf.GGUFWriter(path, "qwen3vl")
    writer.add_name("drawings")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_num_deepstack_layers(len(vision["deepstack_visual_indexes"]))
    writer.add_vocab_size(text["vocab_size"])
    _add_tokenizer(writer, checkpoint, text)
    model = "model.language_model."
    _add(writer, "token_embd.weight", weights[f"{model}embed_tokens.weight"])
    _add(writer, "output_norm.weight", weights[f"{model}norm.weight"])
    if not text["tie_word_embeddings"]:
        _add(writer, "output.weight", weights["lm_head.weight"])
    for layer in range(text["num_hidden_layers"]):
        for source, target in LANGUAGE_LAYER.items():
            name = f"{model}layers.{layer}.{source}.weight"
            _add(writer, f"blk.{layer}.{target}.weight", weights[name])
    _finish(writer)


def _add_tokenizer(writer: Any, checkpoint: Path, text: dict[str, Any]) -> None:
    import gguf

    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokens = [f"[PAD{number}]" for number in range(text["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_pad_token_id(text["pad_token_id"])
    writer.add_bos_token_id(text["bos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((checkpoint / "chat_template.jinja").read_text())


def _write_vision(config: dict[str, Any], weights: dict[str, Any], path: Path) -> None:
    import gguf

    vision, model = config["vision_config"], "model.visual."
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("qwen3vl_merger")
    writer.add_vision_use_gelu(True)
    side = round(vision["num_position_embeddings"] ** 0.5)
    writer.add_vision_image_size(side * vision["patch_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_projection_dim(vision["out_hidden_size"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_attention_layernorm_eps(EPSILON_OF_VISION)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    taps = vision["deepstack_visual_indexes"]
    writer.add_vision_is_deepstack_layers([block in taps for block in range(vision["depth"])])
    # One kernel over two frames becomes two kernels over one: (out, in, 2, height, width).
    kernel = weights[f"{model}patch_embed.proj.weight"]
    _add(writer, "v.patch_embd.weight", kernel[:, :, 0])
    _add(writer, "v.patch_embd.weight.1", kernel[:, :, 1])
    _add(writer, "v.patch_embd.bias", weights[f"{model}patch_embed.proj.bias"])
    _add(writer, "v.position_embd.weight", weights[f"{model}pos_embed.weight"])
    for block in range(vision["depth"]):
        names = {
            f"{model}blocks.{block}.{one}": f"v.blk.{block}.{to}"
            for one, to in VISION_BLOCK.items()
        }
        _add_layers(writer, weights, names)
    _add_layers(writer, weights, {f"{model}merger.{one}": to for one, to in MERGER.items()})
    for number, tap in enumerate(taps):
        merger = f"{model}deepstack_merger_list.{number}"
        names = {f"{merger}.{one}": f"v.deepstack.{tap}.{to}" for one, to in DEEPSTACK.items()}
        _add_layers(writer, weights, names)
    _finish(writer)


def _add_layers(writer: Any, weights: dict[str, Any], names: dict[str, str]) -> None:
    for source, target in names.items():
        for part in ("weight", "bias"):
            _add(writer, f"{target}.{part}", weights[f"{source}.{part}"])


def _add(writer: Any, name: str, values: Any) -> None:
    writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    for path in write(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
