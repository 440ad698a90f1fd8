"""The decoder of Qwen3-VL as a TurboMind source model: LMDeploy's Qwen3 with other tensor names.

Differences from Qwen3: tensor names begin with ``model.language_model``, mRoPE is interleaved, the
outer configuration may tie the output head, and experts may be packed, with either order of their
axes.

Letters: E experts, D hidden size, I expert's intermediate size.
"""

from __future__ import annotations

import copy
from typing import Any

from lmdeploy.turbomind.builders import FfnBuilder, TextModelBuilder
from lmdeploy.turbomind.builders.linear import Linear, _build_linear
from lmdeploy.turbomind.models.qwen3 import Qwen3TextModel
from lmdeploy.turbomind.models.utils import make_model_weight_config

from lmdeploy_ext.turbomind.names import map_packed_experts

MROPE_SECTION = (24, 20, 20)
"""The default of transformers' ``Qwen3VLTextRotaryEmbedding`` for a configuration without
sections."""


NO_KERNEL = "no GEMM kernel family"
"""LMDeploy's message when it has no kernel for a weight on this GPU. This happens for unquantised
experts in float16 on compute capability 9.0, not on 8.0 and 10.0."""


class Qwen3VLTextModel(Qwen3TextModel):
    """The dense or MoE decoder.

    Args:
        cfg: transformers' text configuration of Qwen3-VL; not changed.
        tied: whether the outer configuration ties the head to the embedding.
        resolver: LMDeploy's weight formats, the quantised ones included.
    """

    _loader_mappings = (map_packed_experts,)

    def __init__(self, cfg: Any, *, tied: bool, resolver: Any) -> None:
        cfg = _as_qwen3(cfg)
        super().__init__(cfg, resolver=resolver)
        # In transformers 5 the MoE text configuration is "tied" by default; ignore it.
        self._tied = tied or (self._n_experts == 0 and bool(cfg.tie_word_embeddings))
        rope = self._attn_cfg.rope
        rope.mrope_interleaved = True
        section = list(rope.mrope_section)
        if not any(section):
            rope.mrope_section = section = list(MROPE_SECTION)
        if sum(section) != self._attn_cfg.head_dim // 2:
            raise ValueError(
                f"mrope_section {section} does not sum to half the head size "
                f"{self._attn_cfg.head_dim}"
            )

    def model(self, pfx: Any) -> None:
        """Build the text tree from the checkpoint."""
        language = pfx + "model.language_model"
        builder = TextModelBuilder(
            make_model_weight_config(self.cfg),
            self._ctx,
            root_handles=self._root_handles,
            tp=self._model_tp,
            vocab_size=self.cfg.vocab_size,
        )
        builder.add_token_embeds((language + "embed_tokens").get("weight"))
        builder.norm = self.norm(language + "norm")
        builder.add_lm_head(self._head(pfx + "lm_head", language + "embed_tokens"))
        builder.layers = self.layers(language + "layers")
        builder.build()

    def _head(self, own: Any, embedding: Any) -> Linear:
        """The output projection: its own tensor if the checkpoint has one, else the tied embedding.

        Like transformers 5, a checkpoint with a tied configuration and a head uses the head.
        """
        head = self._linear(own, optional=True)
        if head is None and not self._tied:
            raise KeyError("the checkpoint has no lm_head and its configuration ties none")
        if head is None:
            return self._linear(embedding)
        _forget(embedding, "weight")
        return head

    def moe(self, pfx: Any) -> Any:
        """Router and experts of one layer."""
        try:
            built = super().moe(pfx)
        except RuntimeError as error:
            if NO_KERNEL not in str(error):
                raise
            raise ValueError(
                f"{pfx.prefix}: on this GPU, TurboMind has no kernels for experts in "
                f"{self._ctx.data_type.name}; take dtype bfloat16, or LMDeploy's PyTorch engine"
            ) from error
        for name in ("gate_up_proj", "down_proj"):
            _forget(pfx + "experts" + name, "weight", "weight_scale_inv")
        return built

    def ffn(self, pfx: Any, is_expert: bool = False, *, tp: Any) -> Any:
        """One MLP; experts are read from the packed tensors if the checkpoint has them."""
        experts, _, index = pfx.prefix.rpartition(".")
        packed = type(pfx)(pfx.ckpt, experts)
        if not is_expert or not packed.has("gate_up_proj.weight"):
            return super().ffn(pfx, is_expert, tp=tp)
        config = self._ffn_cfg.clone()
        config.is_expert = True
        builder = FfnBuilder(config, self._ctx, tp=tp)
        builder.add_ffn(*self._packed_expert(packed, int(index)))
        return builder.build()

    def _packed_expert(self, packed: Any, index: int) -> tuple[Linear, Linear, Linear]:
        """(gate, down, up) of one expert, each (in, out).

        The published checkpoints and transformers 4.57 have gate_up (E, D, 2I) and down (E, I, D);
        files that transformers 5 creates may have the last two axes swapped.
        """
        gate_up, down = (
            _build_linear(*self._resolver.resolve(packed + name, index=index))
            for name in ("gate_up_proj", "down_proj")
        )
        # LMDeploy's formats expect (out, in) in the file and swap the axes.
        rows, columns = gate_up.tensors["weight"].shape
        inner, outer = down.tensors["weight"].shape
        if (rows, columns) == (2 * outer, inner):
            gate_up, down = _transposed(gate_up), _transposed(down)
        elif (rows, columns) != (outer, 2 * inner):
            raise ValueError(
                f"{packed.prefix}: gate_up_proj {(rows, columns)} and down_proj {(inner, outer)} "
                "are no pair of packed expert weights"
            )
        gate, up = _halves(gate_up)
        return gate, down, up


def _as_qwen3(cfg: Any) -> Any:
    """A copy of the configuration with the fields that LMDeploy's Qwen3 reads and Qwen3-VL lacks."""
    cfg = copy.copy(cfg)
    if getattr(cfg, "num_experts", 0):
        # Qwen3-VL's router always normalises; transformers 5 has removed the field.
        cfg.norm_topk_prob = True
        step = getattr(cfg, "decoder_sparse_step", 1)
        dense = set(cfg.mlp_only_layers or ())
        dense |= {layer for layer in range(cfg.num_hidden_layers) if (layer + 1) % step}
        cfg.mlp_only_layers = sorted(dense)
    return cfg


def _forget(pfx: Any, *names: str) -> None:
    """Remove tensors that were read in parts from the checkpoint, without copying them."""
    for name in names:
        if pfx.has(name):
            pfx.pop(name, index=slice(0, 0))


def _transposed(linear: Linear) -> Linear:
    """The weight with swapped input and output axes; scales of square blocks are swapped, too."""
    swapped = {kind: tensor.t().contiguous() for kind, tensor in linear.tensors.items()}
    return Linear(tensors=swapped, weight_format=linear.weight_format)


def _halves(gate_up: Linear) -> tuple[Linear, Linear]:
    parts = {kind: tensor.chunk(2, dim=-1) for kind, tensor in gate_up.tensors.items()}
    gate, up = (
        Linear(
            tensors={kind: pair[side].contiguous() for kind, pair in parts.items()},
            weight_format=gate_up.weight_format,
        )
        for side in (0, 1)
    )
    return gate, up
