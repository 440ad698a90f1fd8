"""Faults put into the extension or the weights on purpose, to see that the parity tests notice.

Code faults run in a child; weight faults are other checkpoints. A fault's function changes what it
is given in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

Weights = dict[str, torch.Tensor]

DECODER, TOWER = "model.language_model.layers.1.", "model.visual."


def _swap(weights: Weights, one: str, other: str) -> None:
    weights[one], weights[other] = weights[other], weights[one]


def swap_keys_and_values(weights: Weights) -> None:
    _swap(weights, f"{DECODER}self_attn.k_proj.weight", f"{DECODER}self_attn.v_proj.weight")


def swap_queries_and_keys(weights: Weights) -> None:
    """The first query head against the key head."""
    queries, keys = (f"{DECODER}self_attn.{x}_proj.weight" for x in "qk")
    rows = weights[keys].shape[0]
    first = weights[queries][:rows].clone()
    weights[queries][:rows] = weights[keys]
    weights[keys] = first


def swap_gate_and_up(weights: Weights) -> None:
    _swap(weights, f"{DECODER}mlp.gate_proj.weight", f"{DECODER}mlp.up_proj.weight")


def swap_query_heads(weights: Weights) -> None:
    name = f"{DECODER}self_attn.q_proj.weight"
    weights[name] = weights[name].roll(128, 0)


def forget_head_norms(weights: Weights) -> None:
    for name, weight in weights.items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(1)


def swap_norms(weights: Weights) -> None:
    _swap(weights, f"{DECODER}input_layernorm.weight", f"{DECODER}post_attention_layernorm.weight")


def forget_patch_bias(weights: Weights) -> None:
    weights[f"{TOWER}patch_embed.proj.bias"].zero_()


def forget_qkv_bias(weights: Weights) -> None:
    for block in range(3):
        weights[f"{TOWER}blocks.{block}.attn.qkv.bias"].zero_()


def forget_merger_bias(weights: Weights) -> None:
    weights[f"{TOWER}merger.linear_fc2.bias"].zero_()


def transpose_position_grid(weights: Weights) -> None:
    name = f"{TOWER}pos_embed.weight"
    weights[name] = weights[name].view(6, 6, -1).transpose(0, 1).reshape(36, -1).contiguous()


def swap_vision_queries_and_keys(weights: Weights) -> None:
    name = f"{TOWER}blocks.0.attn.qkv.weight"
    q, k, v = weights[name].chunk(3)
    weights[name] = torch.cat([k, q, v])


def swap_deepstack_mergers(weights: Weights) -> None:
    for name in [name for name in weights if "deepstack_merger_list.0." in name]:
        _swap(weights, name, name.replace("_list.0.", "_list.1."))


IN_WEIGHTS: tuple[Callable[[Weights], None], ...] = (
    swap_keys_and_values, swap_queries_and_keys, swap_gate_and_up, swap_query_heads, forget_head_norms, swap_norms,
    forget_patch_bias, forget_qkv_bias, forget_merger_bias, transpose_position_grid,
    swap_vision_queries_and_keys,
    swap_deepstack_mergers,
)  # fmt: skip


def chunked_mrope(model: Any) -> None:
    """Sections one after the other, as in Qwen2-VL."""
    model._attn_cfg.rope.mrope_interleaved = False


def height_for_time_mrope(model: Any) -> None:
    """The pairs of height turn with time."""
    model._attn_cfg.rope.mrope_section = [44, 0, 20]


def time_only_mrope(model: Any) -> None:
    """No pair turns with height or width."""
    model._attn_cfg.rope.mrope_section = [64, 0, 0]


def other_rope_base(model: Any) -> None:
    model._attn_cfg.rope.base *= 2


IN_MODEL: tuple[Callable[[Any], None], ...] = (
    chunked_mrope,
    height_for_time_mrope,
    time_only_mrope,
    other_rope_base,
)


def shift_spans(items: list[dict[str, Any]]) -> None:
    """Every image one token early, where there is a token before it."""
    for item in items:
        begin, end = item["offset"]
        item["offset"] = (begin - 1, end - 1) if begin else (begin, end)


def turn_grids(items: list[dict[str, Any]]) -> None:
    for item in items:
        item["image_grid_thw"] = item["image_grid_thw"][:, [0, 2, 1]]


def swap_images(items: list[dict[str, Any]]) -> None:
    """The pixels of two images of the same size exchanged."""
    for one, other in zip(items[::2], items[1::2], strict=False):
        if one["pixel_values"].shape == other["pixel_values"].shape:
            one["pixel_values"], other["pixel_values"] = other["pixel_values"], one["pixel_values"]


def roll_patches(items: list[dict[str, Any]]) -> None:
    """Patches off by one row."""
    for item in items:
        item["pixel_values"] = item["pixel_values"].roll(1, 0)


def same_fingerprint(items: list[dict[str, Any]]) -> None:
    """The prefix cache takes every image for the same."""
    for item in items:
        item["fingerprint"] = b"\1" * 32


IN_ITEMS: tuple[Callable[[list[dict[str, Any]]], None], ...] = (
    shift_spans, turn_grids, swap_images, roll_patches, same_fingerprint,
)  # fmt: skip


def forget_pieces(table: torch.Tensor) -> None:
    """A prompt is cut within an image, and the second piece is taken for the image's beginning."""
    table[:, 5] = 0


def restart_pieces(table: torch.Tensor) -> None:
    """Positions begin at 0 again where a prompt was cut."""
    table[:, 2] -= int(table[0, 2])


def delay_pieces(table: torch.Tensor) -> None:
    """Behind a cut positions are one too high."""
    table[:, 2] += int(table[0, 2] > 0)


IN_SEGMENTS: tuple[Callable[[torch.Tensor], None], ...] = (
    forget_pieces, restart_pieces, delay_pieces,
)  # fmt: skip
"""Change what TurboMind says of the runs of text and image in a forward, six numbers for each: first
row, rows, base position, height, width, tokens of the image before. The kernel that makes positions
reads the same memory after DeepStack did."""


WITHOUT_DEEPSTACK = "without_deepstack"


# Faults of Qwen3.5, whose first layer keeps a recurrent state and whose last one attends.
LINEAR, ATTENTION = (
    "model.language_model.layers.0.linear_attn.",
    "model.language_model.layers.3.self_attn.",
)


def forget_z_gate(weights: Weights) -> None:
    """The output of a recurrent layer is gated by other values."""
    weights[f"{LINEAR}in_proj_z.weight"] = weights[f"{LINEAR}in_proj_z.weight"].roll(1, 0)


def forget_output_gate(weights: Weights) -> None:
    """The gate of attention, behind each query, opens where it should close."""
    name = f"{ATTENTION}q_proj.weight"
    heads = weights[name].view(2, 2, 256, -1)
    heads[:, 1] *= -1


def reverse_convolution(weights: Weights) -> None:
    weights[f"{LINEAR}conv1d.weight"] = weights[f"{LINEAR}conv1d.weight"].flip(-1).contiguous()


def delay_convolution(weights: Weights) -> None:
    weights[f"{LINEAR}conv1d.weight"] = weights[f"{LINEAR}conv1d.weight"].roll(1, -1)


def decay_faster(weights: Weights) -> None:
    weights[f"{LINEAR}A_log"] += 1.5


def forget_decay_bias(weights: Weights) -> None:
    weights[f"{LINEAR}dt_bias"] -= 3


def swap_decay_and_strength(weights: Weights) -> None:
    _swap(weights, f"{LINEAR}in_proj_a.weight", f"{LINEAR}in_proj_b.weight")


def swap_recurrent_queries_and_keys(weights: Weights) -> None:
    name = f"{LINEAR}in_proj_qkv.weight"
    q, k, v = weights[name].split([256, 256, 512])
    weights[name] = torch.cat([k, q, v])


def swap_value_heads(weights: Weights) -> None:
    name = f"{LINEAR}out_proj.weight"
    weights[name] = weights[name].roll(128, 1)


def norms_around_one(weights: Weights) -> None:
    """Norm weights that count from 1, as those of Qwen3-VL."""
    for name, weight in weights.items():
        if name.endswith(("_layernorm.weight", "q_norm.weight", "k_norm.weight")):
            weight -= 1


IN_RECURRENT_WEIGHTS: tuple[Callable[[Weights], None], ...] = (
    forget_z_gate, forget_output_gate, reverse_convolution, delay_convolution, decay_faster,
    forget_decay_bias, swap_decay_and_strength, swap_recurrent_queries_and_keys, swap_value_heads,
    norms_around_one,
)  # fmt: skip


def whole_rotary(model: Any) -> None:
    """Twice as much of each head turns."""
    model._attn_cfg.rope.dim *= 2


IN_PARTIAL_ROTARY: tuple[Callable[[Any], None], ...] = (whole_rotary,)


@contextmanager
def armed(name: str) -> Iterator[None]:
    """In a child with the extension installed: put a code fault in; "" puts none in."""
    from lmdeploy_ext.deepstack.binding import SEGMENT_FIELDS
    from lmdeploy_ext.deepstack.features import Features
    from lmdeploy_ext.deepstack.memory import view
    from lmdeploy_ext.turbomind.model import Qwen3VLSourceModel
    from lmdeploy_ext.turbomind.text import Qwen3VLTextModel
    from lmdeploy_ext.turbomind.vision import Qwen3VLVisionModel

    if fault := _named((*IN_MODEL, *IN_PARTIAL_ROTARY), name):
        from lmdeploy.turbomind.models.qwen3_5 import Qwen3_5TextModel

        model = Qwen3VLTextModel if fault in IN_MODEL else Qwen3_5TextModel
        initialise = model.__init__

        def changed(self: Any, *arguments: Any, **keywords: Any) -> None:
            initialise(self, *arguments, **keywords)
            fault(self)

        with mock.patch.object(model, "__init__", changed):
            yield
    elif fault := _named(IN_ITEMS, name):
        convert = Qwen3VLVisionModel.to_turbomind_multimodal

        def converted(self: Any, items: Sequence[dict[str, Any]]) -> Any:
            copies = [dict(item) for item in items]
            fault(copies)
            return convert(self, copies)

        with mock.patch.object(Qwen3VLVisionModel, "to_turbomind_multimodal", converted):
            yield
    elif fault := _named(IN_SEGMENTS, name):
        set_up = Features._set_up

        def changed_segments(self: Any, event: Any) -> None:
            fault(view(event.data, (event.count, SEGMENT_FIELDS), torch.int32, self._device))
            set_up(self, event)

        with mock.patch.object(Features, "_set_up", changed_segments):
            yield
    elif name == WITHOUT_DEEPSTACK:
        with mock.patch.object(Qwen3VLSourceModel, "_start_deepstack"):
            yield
    else:
        assert not name, name
        yield


def _named(faults: Sequence[Callable[[Any], None]], name: str) -> Callable[[Any], None] | None:
    return next((fault for fault in faults if fault.__name__ == name), None)


def write_faulty(folder: Path, target: Path, fault: Callable[[Weights], None]) -> Path:
    """A copy of a checkpoint with a fault in its weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    fault(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target
