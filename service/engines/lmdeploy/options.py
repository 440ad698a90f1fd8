"""Settings and options of the LMDeploy engine. This module does not import LMDeploy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from service.engines.kind import (
    CONTEXT_LENGTH,
    DTYPE,
    GRAMMAR_CACHE,
    MAX_BATCH,
    MIB,
    EngineArguments,
    EngineSettings,
)

TURBOMIND, PYTORCH = "turbomind", "pytorch"
CACHE_BITS = {"none": 0, "int8": 8, "int4": 4, "fp8": 16}
"""Types of the key-value cache -> LMDeploy's ``quant_policy``."""
LENGTHS_BESIDE, LENGTHS_COUNTED = "beside the grammar", "up to 64 in the grammar"
"""Where the engine keeps lengths of strings, for operators."""
_ONLY_PYTORCH_CACHES = ("fp8",)
_PYTORCH_FORMATS = ("auto", "hf")


class LMDeploySettings(EngineSettings):
    """Settings of the LMDeploy engine for operators; each becomes a flag and a variable."""

    backend: Literal["auto", "turbomind", "pytorch"] = Field(
        "auto",
        description="Engine of LMDeploy: auto is turbomind, but pytorch where TurboMind cannot be "
        "given DeepStack, which images need: on several GPUs, or on an unknown build.",
    )
    deepstack: Literal["auto", "require", "off"] = Field(
        "auto",
        description="DeepStack on TurboMind: require ends the start where it cannot be had, off "
        "goes without, for worse answers about images.",
    )
    string_lengths: Literal["auto", "require", "off"] = Field(
        "auto",
        description="Lengths of strings counted beside the grammar on TurboMind: require ends the start "
        "where that is not possible; with off, or where it is not, the grammar counts up to 64 and longer "
        "ones are checked after generation.",
    )
    dtype: Literal["auto", "bfloat16", "float16"] = Field("auto", description=DTYPE)
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="GPUs that share the model; divides its attention heads."
    )
    model_format: Literal["auto", "hf", "awq", "gptq", "compressed-tensors", "fp8"] = Field(
        "auto", description="Format of the weights; auto reads it from config.json."
    )
    cache_share: float = Field(
        0.8,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="Share of the GPU memory left beside the weights that keys and values get.",
    )
    cache_type: Literal["none", "int8", "int4", "fp8"] = Field(
        "none",
        description="Quantisation of keys and values: none is 16 bits; int8 and fp8 take half of "
        "that, int4 a quarter. fp8: backend pytorch only.",
    )
    prefix_caching: bool = Field(
        True, description="Keep keys and values of prompts, so that equal beginnings cost nothing."
    )
    prefill_chunk: int = Field(
        8192, ge=64, le=1_048_576, description="Maximum number of prompt tokens in one pass."
    )
    image_pixels: int | None = Field(
        None,
        ge=1024,
        le=2**31 - 1,
        description="Maximum number of pixels of an image after resizing, whatever a caller asks "
        "for; 1024 pixels are one token. Unset: the limit of the checkpoint.",
    )
    vision_batch: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Maximum number of images inside the engine that it has not encoded yet; more "
        "wait before it. Unset: no bound but the prefill chunk.",
    )
    context_length: int | None = Field(None, ge=16, description=CONTEXT_LENGTH)
    max_batch: int = Field(64, ge=1, le=1024, description=MAX_BATCH)
    grammar_cache_bytes: int = Field(512 * MIB, ge=1, description=GRAMMAR_CACHE)

    @field_validator("dtype", mode="before")
    @classmethod
    def _computes_in_16_bits(cls, value: object) -> object:
        if value == "float32":
            raise ValueError("LMDeploy computes in bfloat16 or float16, not in float32")
        return value

    @classmethod
    def why_not(cls, name: str) -> str | None:
        if name == "device":
            return (
                "LMDeploy takes the first GPUs that it sees; choose them with "
                "CUDA_VISIBLE_DEVICES, or take engine=reference for a CPU"
            )
        return super().why_not(name)

    @model_validator(mode="after")
    def _check_backend(self) -> LMDeploySettings:
        refusal = unsupported(self, self.chosen_backend)
        if refusal is not None:
            raise ValueError(refusal)
        return self

    @property
    def gpus(self) -> float:
        return self.tensor_parallel

    @property
    def chosen_backend(self) -> str:
        """The backend, ``turbomind`` or ``pytorch``; resolves ``auto`` from the settings.

        Correct answers come before speed. Images need DeepStack. LMDeploy's PyTorch engine has it;
        this project adds it to TurboMind on one GPU. If that fails at start-up, ``auto`` uses the
        PyTorch engine.
        """
        return self.backend_for(has_deepstack=True)

    def backend_for(self, *, has_deepstack: bool) -> str:
        """The same for a model. has_deepstack: whether the computation of the model has DeepStack;
        without it, TurboMind runs the model on several GPUs, too."""
        if self.backend != "auto":
            return self.backend
        spread = self.vision and self.tensor_parallel > 1 and self.deepstack != "off"
        return PYTORCH if spread and has_deepstack else TURBOMIND


class Options(LMDeploySettings, EngineArguments):
    """The options of `service.engines.lmdeploy.LMDeployEngine`, which documents them."""

    check_guidance: bool = True


def unsupported(
    options: LMDeploySettings, backend: str, *, has_deepstack: bool = True
) -> str | None:
    """Why a backend does not support the options, as ``setting: reason``; None if it does.

    has_deepstack: False if the model is known to have no DeepStack.
    """
    spread = options.vision and options.tensor_parallel > 1 and options.deepstack != "off"
    spread = spread and has_deepstack
    if backend == TURBOMIND and spread:
        return (
            "tensor_parallel: TurboMind has DeepStack on one GPU only, and images need it; take "
            "backend=pytorch, or vision=false, or deepstack=off for worse answers about images. For "
            "a model without DeepStack, such as Qwen3.5, leave backend at auto"
        )
    if backend == TURBOMIND and options.cache_type in _ONLY_PYTORCH_CACHES:
        return (
            f"cache_type: TurboMind has no {options.cache_type} key-value cache; "
            "take int8 or int4, or backend=pytorch"
        )
    if backend == PYTORCH and options.model_format not in _PYTORCH_FORMATS:
        return (
            "model_format: LMDeploy's PyTorch engine reads the format of the weights from "
            "config.json; leave it at auto, or take backend=turbomind for "
            f"{options.model_format}"
        )
    if backend == PYTORCH and options.deepstack == "off":
        return "deepstack: LMDeploy's PyTorch engine always has it; leave it at auto"
    for name, default in (("vision_batch", None), ("image_pixels", None), ("deepstack", "auto")):
        if not options.vision and getattr(options, name) != default:
            return f"{name}: there are no images with vision=false; leave it out"
    return None
