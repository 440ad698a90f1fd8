"""What can be chosen about the LMDeploy engine. Plain values: importing them imports no LMDeploy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from service.engines.shared.loops import LoopGuard

BACKENDS = ("auto", "turbomind", "pytorch")
TURBOMIND, PYTORCH = BACKENDS[1:]
DEEPSTACK_MODES = ("auto", "require", "off")
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
    deepstack: str = "auto"
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
            ("deepstack", DEEPSTACK_MODES),
            ("dtype", DTYPES),
            ("model_format", MODEL_FORMATS),
            ("cache_type", tuple(CACHE_BITS)),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}")
        if not 0 < self.cache_share < 1:
            raise ValueError(f"cache_share must lie between 0 and 1, got {self.cache_share}")
        refusal = unsupported(self, self.chosen_backend)
        if refusal is not None:
            raise ValueError(refusal)

    @property
    def chosen_backend(self) -> str:
        """``turbomind`` or ``pytorch``: what ``auto`` stands for, as far as settings tell.

        Right answers first, then speed. Pictures need DeepStack, which LMDeploy's PyTorch engine
        has; TurboMind is given it on one GPU. Where that turns out to be impossible, ``auto`` takes
        the PyTorch engine when it starts.
        """
        if self.backend != "auto":
            return self.backend
        spread = self.vision and self.tensor_parallel > 1 and self.deepstack != "off"
        return PYTORCH if spread else TURBOMIND


def unsupported(options: Options, backend: str) -> str | None:
    """Why a backend cannot do what the options ask for, as ``setting: reason``; None when it can."""
    spread = options.vision and options.tensor_parallel > 1 and options.deepstack != "off"
    if backend == TURBOMIND and spread:
        return (
            "tensor_parallel: TurboMind has DeepStack on one GPU only, and pictures need it; take "
            "backend=pytorch, or vision=false, or deepstack=off for worse answers about pictures"
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
    for name, default in (("vision_batch", None), ("picture_pixels", None), ("deepstack", "auto")):
        if not options.vision and getattr(options, name) != default:
            return f"{name}: there are no pictures with vision=false; leave it out"
    return None
