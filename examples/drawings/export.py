"""Write a model folder that transformers (old and new) and serving engines can load.

`python -m examples.drawings.export --folder DIR` starts a folder with an untrained model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from examples.drawings import tokenizer as tokenizers
from examples.drawings.architecture import (
    MAX_PIXELS,
    MERGE,
    MIN_PIXELS,
    MROPE_SECTION,
    PATCH,
    ROPE_THETA,
    config,
    initial_model,
)

FOLDER = Path(__file__).parents[2] / "service" / "bundled" / "drawings"


def token_ids(folder: Path) -> dict[str, int]:
    """Ids of the special tokens of the folder's tokenizer."""
    loaded: Any = tokenizers.load(folder)
    return {token: loaded.convert_tokens_to_ids(token) for token in tokenizers.SPECIAL}


def export(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """All files beside the tokenizer's: configuration, processors, weights in bfloat16."""
    _write_json(folder / "config.json", _config(model))
    _write_json(folder / "generation_config.json", _generation(model))
    _write_json(folder / "preprocessor_config.json", _image_processor())
    _write_json(folder / "video_preprocessor_config.json", _video_processor())
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(model: Qwen3VLForConditionalGeneration) -> dict[str, Any]:
    settings: dict[str, Any] = model.config.to_dict()
    settings["architectures"] = ["Qwen3VLForConditionalGeneration"]
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part.pop("dtype", None)
        part["torch_dtype"] = "bfloat16"
    # Readers from before transformers 5 know the rotary settings under these names.
    settings["text_config"]["rope_theta"] = ROPE_THETA
    settings["text_config"]["rope_scaling"] = {
        "rope_type": "default",
        "mrope_section": MROPE_SECTION,
        "mrope_interleaved": True,
    }
    # The model was trained on questions alone. It has seen no schema and reads none.
    settings["schema_in_prompt"] = False
    return settings


def _generation(model: Qwen3VLForConditionalGeneration) -> dict[str, Any]:
    text = model.config.text_config
    settings = GenerationConfig(
        bos_token_id=text.bos_token_id,
        pad_token_id=text.pad_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        do_sample=False,
    )
    chosen: dict[str, Any] = settings.to_diff_dict()
    return chosen | {"do_sample": False}


def _image_processor() -> dict[str, Any]:
    return {
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
    }


def _video_processor() -> dict[str, Any]:
    settings = _image_processor()
    del settings["image_processor_type"]
    # The limits count the pixels of all frames together.
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": 16 * MAX_PIXELS}
    return settings | {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": size,
        "fps": 2,
        "min_frames": 4,
        "max_frames": 768,
        "do_sample_frames": True,
    }


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder: Path = parser.parse_args().folder
    tokenizers.save(tokenizers.train(), folder)
    export(initial_model(config(token_ids(folder)), seed=0), folder)


if __name__ == "__main__":
    main()
