"""What can be chosen about the reference engine. Plain values, so that importing them is cheap."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from service.engines.shared.loops import LoopGuard


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `ReferenceEngine`, which documents them."""

    model: str | Path
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_batch: int = 16
    max_queue: int = 1024
    context_length: int | None = None
    max_images: int = 16
    threads: int | None = None
    deepstack: bool = True
    vision: bool = True
    prefill_piece: int = 256
    cache_bytes: int = 1 << 30
    vision_cache_bytes: int = 64 << 20
    grammar_cache_bytes: int = 64 << 20
    grammar_threads: int = 2
    stall_s: float = 120.0
    loop_guard: LoopGuard = field(default_factory=LoopGuard)

    def __post_init__(self) -> None:
        positive = ("max_batch", "max_queue", "max_images", "prefill_piece", "grammar_threads")
        for name in (*positive, "cache_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
