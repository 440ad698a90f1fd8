"""Qwen3-VL, dense and MoE, for TurboMind's loader: decoder and vision tower together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lmdeploy.turbomind.builders import Context

from lmdeploy_ext.deepstack import engine as deepstack
from lmdeploy_ext.turbomind.names import DEEPSTACK, TOWER, UNREAD
from lmdeploy_ext.turbomind.text import Qwen3VLTextModel
from lmdeploy_ext.turbomind.vision import Qwen3VLVisionModel

logger = logging.getLogger("lmdeploy_ext")


class Qwen3VLSourceModel:
    """The source model that ``get_tm_config`` creates and ``ModelLoader`` uses.

    Args:
        cfg: transformers' configuration of Qwen3-VL.
        resolver: weight formats of the decoder.
        vision_resolver: weight format of the tower.
        vision_data_type: TurboMind's data type of the tower.
        language_model_only: do not load the tower.
    """

    _vision = True  # get_tm_config passes vision arguments only to classes with this attribute

    def __init__(
        self,
        cfg: Any,
        *,
        resolver: Any,
        vision_resolver: Any = None,
        vision_data_type: Any = None,
        language_model_only: bool = False,
    ) -> None:
        self.text_model = Qwen3VLTextModel(
            cfg.text_config, tied=bool(cfg.tie_word_embeddings), resolver=resolver
        )
        self.vision_model = (
            None
            if language_model_only
            else Qwen3VLVisionModel(cfg.vision_config, resolver=vision_resolver)
        )
        self._vision_data_type = vision_data_type

    def bind_runtime(
        self,
        *,
        ctx: Any,
        root_handles: Any,
        attn_tp: Any,
        mlp_tp: Any,
        ep: Any,
        model_tp: Any,
        dense_tp: Any,
    ) -> None:
        """Pass devices and parallel groups to both parts."""
        self.text_model.bind_runtime(
            ctx=ctx,
            root_handles=root_handles,
            attn_tp=attn_tp,
            mlp_tp=mlp_tp,
            ep=ep,
            model_tp=model_tp,
            dense_tp=dense_tp,
        )
        if self.vision_model is not None:
            vision_ctx = Context(
                ctx.devices,
                ctx.gemm,
                data_type=self._vision_data_type,
                gemm_input_dtype=ctx.gemm_input_dtype,
            )
            self.vision_model.bind_runtime(
                ctx=vision_ctx, root_handles=root_handles, model_tp=model_tp
            )

    @property
    def _vocab_size(self) -> int:
        return int(self.text_model.cfg.vocab_size)

    @property
    def _loader_mappings(self) -> list[Any]:
        return list(self.text_model._loader_mappings)

    def model(self, pfx: Any) -> None:
        """Build both trees. TurboMind requires the decoder first.

        A missing tensor is an error of LMDeploy. An unread tensor is named in a warning, because it
        may be a scale without which the weights are wrong.
        """
        self.text_model.model(pfx)
        if self.vision_model is not None:
            self.vision_model.model(pfx)
            self._start_deepstack(self.vision_model, pfx + TOWER)
        unread = sorted(name for name in pfx.ckpt.keys() if not self._may_stay(name))  # noqa: SIM118
        if unread:
            logger.warning(
                "%d tensors of the checkpoint were not read: %s%s",
                len(unread),
                ", ".join(unread[:5]),
                ", …" if len(unread) > 5 else "",
            )

    def _start_deepstack(self, vision: Qwen3VLVisionModel, tower: Any) -> None:
        text = self.text_model
        deepstack.start(
            self,
            tower,
            vision=vision.cfg,
            text=text.cfg,
            dtype=vision._ctx.dtype,
            groups={
                "GPUs": len(vision._ctx.devices),
                "attention_tp": text._attn_tp.size,
                "mlp_tp": text._mlp_tp.size,
                "ep": text._ep.size,
                "model_tp": text._model_tp.size,
            },
        )

    def _may_stay(self, name: str) -> bool:
        if self.vision_model is None and name.startswith(TOWER + "."):
            return True
        return any(pattern.fullmatch(name) for pattern in (DEEPSTACK, UNREAD))

    def to_turbomind_multimodal(self, multimodal: Sequence[dict[str, Any]]) -> Any:
        """Convert the images and video frames of one request for TurboMind.

        Raises:
            ValueError: the tower is not loaded, or an item is invalid for Qwen3-VL.
        """
        if self.vision_model is None:
            raise ValueError("vision is disabled: the model takes no images or videos")
        return self.vision_model.to_turbomind_multimodal(multimodal)
