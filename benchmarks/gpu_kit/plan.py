"""The steps in the order of their value, their time limits, and the sizes of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

BUDGET_S = 600.0
"""Of one run, from its first process to its last result."""
LAYOUT_LIMIT_S = 15.0
"""Laying LMDeploy out, or finding it installed."""
PREPARE_LIMIT_S = 120.0
"""Checkpoints, images and the truth are made beside the first steps; a step waits for what it needs."""


@dataclass(frozen=True)
class Session:
    """A process with one engine, which several steps share.

    model: ``bundled``, ``2B`` or ``8B``; empty for a process without an engine of the service.
    options: of `service.engines.lmdeploy.LMDeployEngine`.
    """

    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


_BUNDLED = {"backend": "turbomind", "context_length": 2048, "cache_share": 0.2, "max_batch": 64,
            "prefill_chunk": 256}  # fmt: skip
_LARGE = {"backend": "turbomind", "context_length": 4096, "cache_share": 0.7, "max_batch": 64,
          "check_guidance": False}  # fmt: skip
SESSIONS = {
    "bundled": Session("bundled", {**_BUNDLED, "deepstack": "require"}),
    "bundled-off": Session("bundled", {**_BUNDLED, "deepstack": "off"}),
    "alone": Session(),
    "2B": Session("2B", {**_LARGE, "deepstack": "require"}),
    "2B-text": Session("2B", {**_LARGE, "vision": False}),
    "2B-pytorch": Session("2B", {**_LARGE, "backend": "pytorch"}),
    "2B-transformers": Session(),
    "8B": Session("8B", {**_LARGE, "deepstack": "require"}),
    "8B-pytorch": Session("8B", {**_LARGE, "backend": "pytorch"}),
    "8B-transformers": Session(),
}


@dataclass(frozen=True)
class Step:
    """One step.

    name: also that of its function in `steps` or `workload`, with a model behind a hyphen.
    part: the letter under which it was asked for. limit_s: planned; time that earlier steps did not
    use is added. needs: what `prepare` makes for it. checks: description for the summary and the documentation.
    """

    name: str
    part: str
    session: str
    limit_s: float
    needs: tuple[str, ...]
    checks: str


STEPS = (
    Step("load", "a", "bundled", 45, (),
         "TurboMind loads the bundled model with the extension, obeys a grammar and answers"),
    Step("text", "b", "bundled", 10, ("truth",),
         "greedy tokens for text equal those of the reference engine, short and in several chunks"),
    Step("images", "b", "bundled", 10, ("truth",),
         "greedy tokens with one to three images equal those of the reference engine, DeepStack on"),
    Step("guided", "c", "bundled", 20, ("truth-guided",),
         "200 AnalyzeImage answers: all are valid against the schema and equal the reference's"),
    Step("mixed", "e", "bundled", 25, (),
         "64 concurrent mixed requests get the same answers as alone; prefix cache; prompts in chunks"),
    Step("cancel", "e", "bundled", 15, (), "200 cancellations leave no request and no memory behind"),
    Step("memory", "e", "bundled", 20, (), "1,000 requests do not increase the memory"),
    Step("off", "b", "bundled-off", 30, ("truth",),
         "without DeepStack the answers differ, and equal the reference engine's without DeepStack"),
    Step("selftest", "d", "alone", 30, (), "the self-test of DeepStack passes"),
    Step("overhead", "d", "2B", 35, ("2B",),
         "the hook is bound; cost of DeepStack in prefill and decode, in turns with and without it"),
    Step("speed-2B", "g", "2B", 50, ("2B", "images"),
         "2B on TurboMind: 32 images one at a time, 1,200 with 64 at a time, 200 with the schema"),
    Step("no_vision", "f", "2B-text", 25, ("2B",),
         "the memory for keys and values that `--no-vision` frees"),
    Step("speed-2B-pytorch", "g", "2B-pytorch", 80, ("2B", "images"),
         "the same on LMDeploy's PyTorch engine"),
    Step("judge-2B", "g", "2B-transformers", 25, ("2B", "images"),
         "answers of 2B equal those of transformers in float32; the time of its `generate`"),
    Step("speed-8B", "g", "8B", 65, ("8B", "images"), "8B on TurboMind, as 2B"),
    Step("speed-8B-pytorch", "g", "8B-pytorch", 75, ("8B", "images"),
         "8B on LMDeploy's PyTorch engine"),
    Step("judge-8B", "g", "8B-transformers", 25, ("8B", "images"),
         "answers of 8B equal those of transformers"),
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much each step does. Sides of images are in pixels; ``shapes`` are of `random_model`."""

    texts: int = 24
    images: int = 24
    answer: int = 24
    guided: int = 200
    mixed: int = 64
    cancels: int = 200
    warm_requests: int = 200
    leak_requests: int = 1000
    turns: int = 10
    decode: int = 256
    prefill_side: int = 512
    single: int = 32
    many: int = 1200
    at_once: int = 64
    schema_requests: int = 200
    tokens: int = 107
    sides: tuple[int, int] = (512, 1024)
    judged: int = 4
    shapes: Mapping[str, str] = field(default_factory=lambda: {"2B": "2B", "8B": "8B"})
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the engines in place of those of the sessions."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


FULL = Sizes()
DRY = Sizes(
    texts=4, images=5, answer=8, guided=3, mixed=11, cancels=16, warm_requests=8, leak_requests=12,
    turns=2, decode=6, prefill_side=64, single=2, many=8, at_once=4, schema_requests=2, tokens=7,
    sides=(64, 160), judged=2, shapes={"2B": "tiny", "8B": "tiny, untied"},
    options={"cache_share": 0.2, "max_batch": 8, "context_length": 1024, "prefill_chunk": 256,
             "dtype": "bfloat16"},
)  # fmt: skip


def planned_s() -> float:
    """The sum of all limits."""
    return LAYOUT_LIMIT_S + sum(step.limit_s for step in STEPS)
