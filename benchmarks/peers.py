"""Other engines that can run the bundled model, where they are installed: mistral.rs, llama.cpp."""

from __future__ import annotations

import base64
import io
import json
import shutil
import statistics
import tempfile
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from benchmarks.contenders import TASK, Contender, Round


@dataclass(frozen=True)
class Answer:
    """first_s: seconds until the first token."""

    text: str
    tokens: int
    first_s: float


class Peer(Contender):
    """An engine with a chat API, asked for one answer after the other."""

    def run(self, shown: Sequence[np.ndarray]) -> Round:
        begun = time.perf_counter()
        answers = [self.answer(self.messages(pixels)) for pixels in shown]
        wall_s = time.perf_counter() - begun
        first_s = [one.first_s for one in answers]
        return Round(
            wall_s,
            statistics.median(first_s),
            wall_s - sum(first_s),
            sum(one.tokens for one in answers),
            [one.text for one in answers],
        )

    @abstractmethod
    def answer(self, messages: list[dict[str, Any]]) -> Answer:
        """One answer, with the schema of the task."""

    def messages(self, pixels: np.ndarray) -> list[dict[str, Any]]:
        """The task's prompt in the form of the chat API."""
        buffer = io.BytesIO()
        Pillow.fromarray(pixels).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}},
                   {"type": "text", "text": TASK.user}]  # fmt: skip
        system = [{"role": "system", "content": TASK.system}] if TASK.system else []
        return [*system, {"role": "user", "content": content}]


class MistralRs(Peer):
    """mistral.rs through its Python package."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None:
        import mistralrs

        self._api, self._max_tokens = mistralrs, max_tokens
        self._copy = tempfile.TemporaryDirectory()
        model = write_older_layout(folder, Path(self._copy.name) / "model")
        kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        which = mistralrs.Which.MultimodalPlain(
            model_id=str(model),
            arch=mistralrs.MultimodalArchitecture.Qwen3VL,
            dtype=getattr(mistralrs.ModelDType, kind),
        )
        self._runner = mistralrs.Runner(
            which=which, no_paged_attn=True, prefix_cache_n=0, token_source="none"
        )

    def answer(self, messages: list[dict[str, Any]]) -> Answer:
        assert TASK.grammar is not None
        request = self._api.ChatCompletionRequest(
            model="default", messages=messages, max_tokens=self._max_tokens, temperature=0.0,
            stream=True, grammar=TASK.grammar.source, grammar_type="json_schema",
        )  # fmt: skip
        begun = time.perf_counter()
        pieces, times = [], []
        for chunk in self._runner.send_chat_completion_request(request):
            piece = chunk.choices[0].delta.content
            if piece:
                pieces.append(piece)
                times.append(time.perf_counter())
        return Answer("".join(pieces), len(pieces), times[0] - begun)


class LlamaCpp(Peer):
    """llama.cpp through xllamacpp, on a GGUF file written from the same weights."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None:
        import xllamacpp

        if dtype != "float32":
            raise ValueError(f"dtype must be float32, got {dtype}")
        self._max_tokens = max_tokens
        self._copy = tempfile.TemporaryDirectory()
        text, vision = write_gguf(folder, Path(self._copy.name))
        options = xllamacpp.CommonParams()
        options.model.path, options.mmproj.path = str(text), str(vision)
        options.n_ctx, options.n_parallel = 4096, 1
        options.use_jinja = options.warmup = True
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 2
        options.cache_prompt = options.mmproj_use_gpu = options.endpoint_metrics = False
        options.n_gpu_layers = options.cache_ram_mib = 0
        options.fit_params = False
        self._server = xllamacpp.Server(options)

    def answer(self, messages: list[dict[str, Any]]) -> Answer:
        assert TASK.grammar is not None
        schema = {"name": "answer", "strict": True, "schema": json.loads(TASK.grammar.source)}
        request = {
            "messages": messages, "max_tokens": self._max_tokens, "temperature": 0.0,
            "cache_prompt": False, "stream": True,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }  # fmt: skip
        begun = time.perf_counter()
        pieces: list[str] = []
        times: list[float] = []
        tokens = 0

        def receive(events: Any) -> bool:
            nonlocal tokens
            for event in map(_decoded, events if isinstance(events, list) else [events]):
                tokens = event.get("timings", {}).get("predicted_n", tokens)
                for choice in event.get("choices", []):
                    piece = choice.get("delta", {}).get("content")
                    if piece:
                        pieces.append(piece)
                        times.append(time.perf_counter())
            return False

        self._server.handle_chat_completions(json.dumps(request), receive)
        return Answer("".join(pieces), tokens, times[0] - begun)


def _decoded(event: Any) -> dict[str, Any]:
    if isinstance(event, (str, bytes)):
        text = event if isinstance(event, str) else event.decode()
        text = text.strip().removeprefix("data:").strip()
        event = json.loads(text) if text and text != "[DONE]" else {}
    if "error" in event:
        raise RuntimeError(str(event)[:300])
    return dict(event)


def write_older_layout(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint with the files of transformers 4.57, which other engines read."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "dtype": "bfloat16"}
    config |= {"torch_dtype": "bfloat16", "transformers_version": "4.57.1"}
    config["vision_config"].pop("rope_parameters", None)
    config["vision_config"]["model_type"] = "qwen3_vl"
    (target / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = (folder / "chat_template.jinja").read_text()
    settings["chat_template"] = template
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    settings["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in tokens
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    (target / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (target / "chat_template.jinja").unlink()
    return target


TEXT_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
VISION_NAMES = {
    "norm1": "ln1", "norm2": "ln2", "attn.qkv": "attn_qkv", "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down",
}  # fmt: skip


def write_gguf(folder: Path, target: Path) -> tuple[Path, Path]:
    """The decoder and the vision tower of a tied dense checkpoint as two float32 GGUF files."""
    config = json.loads((folder / "config.json").read_text())
    from safetensors.torch import load_file

    weights = {name: tensor.float().numpy()
               for name, tensor in load_file(folder / "model.safetensors").items()}  # fmt: skip
    text, vision = target / "text.gguf", target / "vision.gguf"
    _write_text(folder, config["text_config"], len(config["vision_config"]["deepstack_visual_indexes"]),
                weights, text)  # fmt: skip
    _write_vision(config["vision_config"], weights, vision)
    return text, vision


def _write_text(
    folder: Path, config: dict[str, Any], deepstack: int, weights: dict[str, np.ndarray], path: Path
) -> None:
    import gguf

    rope = config["rope_parameters"]
    out = gguf.GGUFWriter(path, "qwen3vl")
    out.add_file_type(0)
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_key_length(config["head_dim"])
    out.add_value_length(config["head_dim"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(rope["rope_theta"])
    out.add_rope_dimension_sections([*rope["mrope_section"], 0])
    out.add_num_deepstack_layers(deepstack)
    out.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = [f"[unused {index}]" for index in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        types[added["id"]] = kind
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(tokens)
    out.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    out.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    ends = json.loads((folder / "generation_config.json").read_text())
    out.add_eos_token_id(ends["eos_token_id"][0])
    out.add_pad_token_id(ends["pad_token_id"])
    out.add_add_bos_token(False)
    out.add_chat_template((folder / "chat_template.jinja").read_text())
    prefix = "model.language_model."
    out.add_tensor("token_embd.weight", weights[prefix + "embed_tokens.weight"])
    out.add_tensor("output_norm.weight", weights[prefix + "norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in TEXT_NAMES.items():
            tensor = weights[f"{prefix}layers.{layer}.{ours}.weight"]
            out.add_tensor(f"blk.{layer}.{theirs}.weight", tensor)
    _finish(out)


def _write_vision(config: dict[str, Any], weights: dict[str, np.ndarray], path: Path) -> None:
    import gguf

    out = gguf.GGUFWriter(path, "clip")
    out.add_file_type(0)
    out.add_clip_has_vision_encoder(True)
    out.add_clip_projector_type("qwen3vl_merger")
    out.add_vision_use_gelu(True)
    side = round(config["num_position_embeddings"] ** 0.5)
    out.add_vision_image_size(side * config["patch_size"])
    out.add_vision_patch_size(config["patch_size"])
    out.add_vision_embedding_length(config["hidden_size"])
    out.add_vision_feed_forward_length(config["intermediate_size"])
    out.add_vision_projection_dim(config["out_hidden_size"])
    out.add_vision_block_count(config["depth"])
    out.add_vision_head_count(config["num_heads"])
    out.add_vision_attention_layernorm_eps(1e-6)
    out.add_vision_image_mean([0.5] * 3)
    out.add_vision_image_std([0.5] * 3)
    out.add_vision_spatial_merge_size(config["spatial_merge_size"])
    taken = config["deepstack_visual_indexes"]
    out.add_vision_is_deepstack_layers([index in taken for index in range(config["depth"])])
    prefix = "model.visual."
    patches = weights[prefix + "patch_embed.proj.weight"]
    out.add_tensor("v.patch_embd.weight", np.ascontiguousarray(patches[:, :, 0]))
    out.add_tensor("v.patch_embd.weight.1", np.ascontiguousarray(patches[:, :, 1]))
    out.add_tensor("v.patch_embd.bias", weights[prefix + "patch_embed.proj.bias"])
    out.add_tensor("v.position_embd.weight", weights[prefix + "pos_embed.weight"])
    names = {"merger.norm": "v.post_ln", "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2"}
    for block in range(config["depth"]):
        names |= {f"blocks.{block}.{ours}": f"v.blk.{block}.{theirs}"
                  for ours, theirs in VISION_NAMES.items()}  # fmt: skip
    for number, block in enumerate(taken):
        for ours, theirs in {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}.items():
            names[f"deepstack_merger_list.{number}.{ours}"] = f"v.deepstack.{block}.{theirs}"
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            out.add_tensor(f"{theirs}.{kind}", weights[f"{prefix}{ours}.{kind}"])
    _finish(out)


def _finish(out: Any) -> None:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
