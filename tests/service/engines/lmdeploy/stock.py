"""The LMDeploy engine on the stock TurboMind module; works in a process on the host runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from service.engine import Engine
from service.engines.lmdeploy import LMDeployEngine
from tests.lmdeploy_ext.contract.engine_checkpoints import EngineShape, write_engine_checkpoint

SMALL: dict[str, Any] = {
    "backend": "turbomind", "context_length": 1024, "max_batch": 16, "cache_share": 0.2,
    "prefill_chunk": 256, "dtype": "bfloat16",
}  # fmt: skip


def write(folder: Path) -> Path:
    """A tiny random Qwen3-VL in the sizes of TurboMind's kernels, with end tokens."""
    write_engine_checkpoint(folder, EngineShape())
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {entry["content"]: entry["id"] for entry in added}
    content = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def write_qwen3_5(folder: Path) -> Path:
    """A tiny random dense Qwen3.5, for compute capability 8.0."""
    from tests import qwen3_5

    return qwen3_5.write_qwen3_5(folder)


def engine(folder: Path, *, small: bool = False, **options: Any) -> LMDeployEngine:
    """small: one request runs, one may wait."""
    limits = {"max_batch": 1, "max_queue": 1} if small else {}
    return LMDeployEngine(folder, **{**SMALL, **limits, **options})


def is_idle(engine: Engine) -> bool:
    assert isinstance(engine, LMDeployEngine)
    if engine._loaded is None:
        return engine.active_requests == 0
    metrics = engine._loaded.host.native.get_schedule_metrics()  # type: ignore[attr-defined]
    return engine.active_requests == metrics.active_seqs + metrics.waiting_seqs == 0
