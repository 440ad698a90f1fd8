"""What can be chosen about the LMDeploy engine. Plain values: importing them imports no LMDeploy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from service.engines.shared.loops import LoopGuard

BACKENDS = ("auto", "turbomind", "pytorch")
TURBOMIND, PYTORCH = BACKENDS[1:]
DTYPES = ("auto", "bfloat16", "float16")
MODEL_FORMATS = ("auto", "hf", "awq", "gptq", "compressed-tensors", "fp8")
CACHE_BITS = {"none": 0, "int8": 8, "int4": 4, "fp8": 16}
"""Types of the key-value cache -> LMDeploy's ``quant_policy``."""
_ONLY_PYTORCH_CACHES = ("fp8",)
_PYTORCH_FORMATS = ("auto", "hf")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `service.engines.lmdeploy.LMDeployEngine`, which documents them."""

    model: str | Path
    revision: str | None = None
    backend: str = "auto"
    vision: bool = True
    dtype: str = "auto"
    model_format: str = "auto"
    tensor_parallel: int = 1
    context_length: int | None = None
    max_batch: int = 64
    max_queue: int = 1024
    cache_share: float = 0.8
    cache_type: str = "none"
    prefix_caching: bool = True
    prefill_chunk: int = 8192
    max_images: int = 16
    picture_pixels: int | None = None
    vision_batch: int | None = None
    grammar_cache_bytes: int = 512 << 20
    grammar_threads: int = 2
    check_guidance: bool = True
    stall_s: float = 120.0
    loop_guard: LoopGuard = field(default_factory=LoopGuard)

    def __post_init__(self) -> None:
        positive = ("max_batch", "max_queue", "max_images", "tensor_parallel", "prefill_chunk")
        for name in (*positive, "grammar_threads", "picture_pixels", "vision_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        choices = (
            ("backend", BACKENDS),
            ("dtype", DTYPES),
            ("model_format", MODEL_FORMATS),
            ("cache_type", tuple(CACHE_BITS)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}")
        if not 0 < self.cache_share < 1:
            raise ValueError(f"cache_share must lie between 0 and 1, got {self.cache_share}")
        refusal = unsupported(
            self.chosen_backend, self.vision, self.cache_type, self.model_format, self.vision_batch
        )
        if refusal is not None:
            raise ValueError(refusal)

    @property
    def chosen_backend(self) -> str:
        """``turbomind`` or ``pytorch``; see `choose_backend`."""
        return choose_backend(self.backend, self.vision)


def choose_backend(backend: str, vision: bool) -> str:
    """What ``auto`` stands for: correct answers first, then speed.

    TurboMind has no DeepStack yet, which pictures need and texts do not. So a model with vision
    runs on LMDeploy's PyTorch engine, one without on TurboMind.
    """
    if backend != "auto":
        return backend
    return PYTORCH if vision else TURBOMIND


def unsupported(
    backend: str, vision: bool, cache_type: str, model_format: str, vision_batch: int | None
) -> str | None:
    """Why a backend cannot do this, as ``setting: reason``; None when it can."""
    if backend == TURBOMIND and cache_type in _ONLY_PYTORCH_CACHES:
        return (
            f"cache_type: TurboMind has no {cache_type} key-value cache; "
            "take int8 or int4, or backend=pytorch"
        )
    if backend == PYTORCH and model_format not in _PYTORCH_FORMATS:
        return (
            f"model_format: LMDeploy's PyTorch engine reads the format of the weights from "
            f"config.json; leave it at auto, or take backend=turbomind for {model_format}"
        )
    if vision_batch is not None and not vision:
        return "vision_batch: there are no pictures with vision=false; leave it out"
    return None
