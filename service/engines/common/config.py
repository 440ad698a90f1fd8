"""Finds a checkpoint and reads the shape of its decoder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy_ext.families import ModelFamily, find_family, known_architectures
from service.errors import EngineUnavailable

logger = logging.getLogger(__name__)

DEFAULT_SECTION = (24, 20, 20)
LAYER_TYPES = ("linear_attention", "full_attention")
LINEAR_SIZES = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
"""Fields of a layer with a recurrent state -> the only value that TurboMind has kernels for."""
STATE_DTYPES = ("float32", "bfloat16", "float16")
"""Supported values of ``mamba_ssm_dtype``; the first is the default, as in transformers."""
PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.jinja")
"""Patterns of the files to download. Pickle files are never downloaded or read."""


class CheckpointError(ValueError):
    """This engine cannot run the checkpoint; the message says why."""


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Mixture of experts of a decoder layer."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The values of config.json and generation_config.json that the decoder needs.

    family: what the models of this architecture have in common.
    thinking: whether answers begin with thoughts, as those of Thinking editions do; False for a
        family whose requests choose.
    intermediate_size: of the dense layers; 0 where every layer has experts.
    mrope_section: how many of the rotated frequencies follow time, height and width.
    moe: for each layer its experts, or None for a dense one.
    quantisation: ``quant_method`` of quantised weights, such as "awq"; None for others.
    schema_in_prompt: whether the prompt has the JSON schema of an answer by default; as the family
        says, unless the checkpoint has a key of this name.
    state_dtype: dtype of the recurrent state that the checkpoint asks for, such as "float32";
        None for a family without such a state.
    """

    family: ModelFamily
    thinking: bool
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    attention_bias: bool
    tied: bool
    moe: tuple[MoeConfig | None, ...]
    image_token_id: int
    vision_start_id: int
    vision_end_id: int
    stop_ids: tuple[int, ...]
    dtype: str
    quantisation: str | None = None
    state_dtype: str | None = None
    schema_in_prompt: bool = True

    @property
    def kv_values_per_token(self) -> int:
        """Numbers per token in the key-value cache, over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    def thinks(self, *, constrained: bool, thinking: bool) -> bool:
        """Whether an answer begins with thoughts. constrained: a grammar constrains the answer;
        thinking: the caller asked for thoughts."""
        wanted = self.thinking or (thinking and self.family.thinking_optional)
        return wanted and not constrained

    def answer_prefix(self, *, constrained: bool, thinking: bool) -> str:
        """What the prompt writes at the beginning of the answer; see `thinks`."""
        if self.thinks(constrained=constrained, thinking=thinking):
            return self.family.thinking_prefix
        may_think = self.thinking or self.family.thinking_optional
        return self.family.thinking_closed if may_think else ""

    @classmethod
    def from_checkpoint(cls, folder: Path, *, quantised: bool = False) -> TextConfig:
        """Read a checkpoint folder. quantised: whether quantised weights are acceptable.

        Raises:
            CheckpointError: the checkpoint is of no supported family, or has an unsupported option.
        """
        content = _read_json(folder, "config.json")
        architecture = (content.get("architectures") or ["none"])[0]
        family = find_family(architecture)
        if family is None:
            known = ", ".join(known_architectures())
            raise CheckpointError(f"architecture is {architecture}; supported are {known}")
        text = content.get("text_config")
        if not isinstance(text, Mapping):
            raise CheckpointError("config.json has no text_config")
        if content.get("quantization_config") and not quantised:
            raise CheckpointError(
                "the weights are quantised; use the checkpoint in bfloat16 instead"
            )
        if text.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"hidden_act {text['hidden_act']!r} is not supported")
        theta, section = _rope(text, family)
        heads = int(text["num_attention_heads"])
        head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
        rotated = int(head_dim * family.rotary_fraction) // 2
        if sum(section) != rotated:
            raise CheckpointError(f"mrope_section {section} does not sum to {rotated}")
        layers = int(text["num_hidden_layers"])
        moe = tuple(
            _moe(text, index, family) if architecture in family.moe else None
            for index in range(layers)
        )
        tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(
            family=family,
            thinking=_always_thinks(folder, family),
            vocab_size=int(text["vocab_size"]),
            hidden_size=int(text["hidden_size"]),
            intermediate_size=0 if all(moe) else int(text["intermediate_size"]),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            mrope_section=section,
            max_position_embeddings=int(text["max_position_embeddings"]),
            attention_bias=bool(text.get("attention_bias", False)),
            tied=bool(tied),
            moe=moe,
            image_token_id=int(content["image_token_id"]),
            vision_start_id=int(content["vision_start_token_id"]),
            vision_end_id=int(content["vision_end_token_id"]),
            stop_ids=_stop_ids(folder, text),
            dtype=str(
                content.get("dtype")
                or text.get("dtype")
                or content.get("torch_dtype")
                or "bfloat16"
            ),
            quantisation=(content.get("quantization_config") or {}).get("quant_method"),
            state_dtype=_state_dtype(text, layers) if family.recurrent else None,
            schema_in_prompt=bool(content.get("schema_in_prompt", family.schema_in_prompt)),
        )


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a local folder, or a model of the hub that is downloaded at a
    revision. The log names its commit.

    Raises:
        EngineUnavailable: neither a folder nor a name on the hub that can be fetched.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EngineUnavailable(
                f"the model folder {folder.name!r} has no config.json; give the folder of a "
                "Qwen3-VL checkpoint"
            )
        return folder
    name = str(model)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise EngineUnavailable(
            f"there is no model folder {folder.name!r}; give an existing folder or a hub name "
            "such as Qwen/Qwen3-VL-2B-Instruct"
        )
    snapshot = _download(name, revision)
    # The name of a snapshot folder is its commit, which operators can pin; a branch may change.
    logger.info("model %s revision=%s commit=%s", name, revision or "main", snapshot.name)
    return snapshot


def commit_of(folder: Path) -> str | None:
    """The commit of a checkpoint in the cache of the hub; None for a folder of another origin."""
    return folder.name if folder.parent.name == "snapshots" else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))
    except LocalEntryNotFoundError as error:
        problem = (
            "the hub cannot be reached and the model is not in the local cache; check the network"
        )
        cause: Exception = error
    except HfHubHTTPError as error:
        problem = "the hub refused it; check the name, the revision and the access token"
        cause = error
    except (OSError, ValueError) as error:
        problem = "the download failed; check the name, the network and the free disk space"
        cause = error
    logger.error("fetching model %s failed: %s", name, cause)
    raise EngineUnavailable(
        f"cannot fetch model {name!r} at revision {revision or 'main'}: {problem}, or give a "
        "local folder"
    ) from cause


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return content


def _rope(text: Mapping[str, Any], family: ModelFamily) -> tuple[float, tuple[int, int, int]]:
    """Base frequency and sections, from ``rope_parameters`` or the older pair of keys."""
    parameters = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"rope type {kind!r} is not supported")
    if parameters.get("mrope_interleaved") is False:
        raise CheckpointError(f"mrope_interleaved=false is not the layout of {family.name}")
    rotated = family.rotary_fraction
    found = parameters.get("partial_rotary_factor", text.get("partial_rotary_factor", rotated))
    if found != rotated:
        raise CheckpointError(
            f"partial_rotary_factor {found} is not that of {family.name}: {rotated}"
        )
    theta = parameters.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise CheckpointError("config.json has no rope_theta")
    given = parameters.get("mrope_section", DEFAULT_SECTION if family.extension else None)
    if given is None:  # stock TurboMind would take positions of text for those of images
        raise CheckpointError("config.json has no mrope_section")
    section = tuple(int(value) for value in given)
    if len(section) != 3:
        raise CheckpointError(f"mrope_section {section} must have three entries")
    return float(theta), section


def _moe(text: Mapping[str, Any], layer: int, family: ModelFamily) -> MoeConfig | None:
    experts = int(text.get("num_experts") or text.get("num_local_experts") or 0)
    if text.get("norm_topk_prob") is False:
        raise CheckpointError(f"norm_topk_prob=false is not the router of {family.name}")
    sparse = experts > 0 and (layer + 1) % int(text.get("decoder_sparse_step", 1)) == 0
    if layer in (text.get("mlp_only_layers") or []) or not sparse:
        return None
    return MoeConfig(experts, int(text["num_experts_per_tok"]), int(text["moe_intermediate_size"]))


def _state_dtype(text: Mapping[str, Any], layers: int) -> str:
    """The dtype of the recurrent state, after a check of the layers that keep it: TurboMind has
    kernels for one form only, and ends the process for others."""
    if text.get("attn_output_gate") is False:
        raise CheckpointError("attn_output_gate=false is not supported")
    types = text.get("layer_types")
    if types is not None and (len(types) != layers or set(types) - set(LAYER_TYPES)):
        raise CheckpointError(
            f"layer_types must name {layers} layers, each one of {', '.join(LAYER_TYPES)}"
        )
    for name, wanted in LINEAR_SIZES.items():
        if int(text.get(name, wanted)) != wanted:
            raise CheckpointError(f"{name} is {text[name]}; supported is {wanted}")
    keys, values = (int(text[f"linear_num_{one}_heads"]) for one in ("key", "value"))
    if keys < 1 or values % keys:
        raise CheckpointError(
            f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}"
        )
    dtype = str(text.get("mamba_ssm_dtype") or STATE_DTYPES[0])
    if dtype not in STATE_DTYPES:
        raise CheckpointError(
            f"mamba_ssm_dtype {dtype!r} is not supported; it is one of {', '.join(STATE_DTYPES)}"
        )
    return dtype


def _always_thinks(folder: Path, family: ModelFamily) -> bool:
    if family.thinking_optional or not family.thinking_prefix:
        return False
    return _begins_with_thoughts(folder)


def _begins_with_thoughts(folder: Path) -> bool:
    """Whether the chat template ends with an open ``<think>``, so that answers begin with thoughts.

    Instruct and Thinking editions have the same architecture but different templates. A template
    also mentions ``<think>`` for earlier answers, so this function reads only its end, where the
    answer begins.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        template: object = path.read_text(encoding="utf-8")
    elif (folder / "chat_template.json").is_file():
        template = _read_json(folder, "chat_template.json").get("chat_template")
    elif (folder / "tokenizer_config.json").is_file():
        template = _read_json(folder, "tokenizer_config.json").get("chat_template")
    else:
        return False
    end = str(template).rpartition("add_generation_prompt")[2]
    return "<think>" in end and "</think>" not in end


def _stop_ids(folder: Path, text: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens of generation_config.json, else those of config.json."""
    value = None
    if (folder / "generation_config.json").is_file():
        value = _read_json(folder, "generation_config.json").get("eos_token_id")
    if value is None:
        value = text.get("eos_token_id")
    ids = tuple(int(entry) for entry in ([value] if isinstance(value, int) else value or ()))
    if not ids:
        raise CheckpointError("neither generation_config.json nor config.json has eos_token_id")
    return ids
