"""Settings and options of the reference engine. This module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from service.engines.kind import (
    CONTEXT_LENGTH,
    DTYPE,
    GRAMMAR_CACHE,
    MAX_BATCH,
    MIB,
    EngineArguments,
    EngineSettings,
)


class ReferenceSettings(EngineSettings):
    """Settings of the reference engine for operators; each becomes a flag and a variable."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description=DTYPE)
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads; unset: one per core, but one for small models.",
    )
    context_length: int | None = Field(None, ge=16, description=CONTEXT_LENGTH)
    max_batch: int = Field(16, ge=1, le=1024, description=MAX_BATCH)
    grammar_cache_bytes: int = Field(64 * MIB, ge=1, description=GRAMMAR_CACHE)

    @property
    def gpus(self) -> float:
        return float(self.device.startswith("cuda"))

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: object) -> object:
        if value == "float16":
            raise ValueError("float16 is a type of engine=lmdeploy; take bfloat16")
        return value


class Options(ReferenceSettings, EngineArguments):
    """The options of `ReferenceEngine`, which documents them."""

    deepstack: bool = True
    prefill_piece: int = Field(256, ge=1)
    cache_bytes: int = Field(1 << 30, ge=1)
    vision_cache_bytes: int = 64 * MIB
