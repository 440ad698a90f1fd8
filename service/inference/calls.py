"""A call between the wire and the engine, as plain values: what was asked, what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.quotas import ANONYMOUS, Caller
from service.schema_compiler.report import GrammarReport
from service.types import (
    EncodedImage,
    FinishReason,
    Grammar,
    Message,
    Sampling,
    Timings,
    ToolDefinition,
    Usage,
)

ANALYZE_TASK = "image-analysis"
"""Name of the built-in task behind AnalyzeImage."""


@dataclass(frozen=True, slots=True)
class InlineTask:
    """A task that came with its request.

    messages: a whole conversation in place of the two texts; images of the call take the places of
    its images, in order. tools: what the model is told of.
    """

    system: str
    user: str
    grammar: Grammar | None
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolDefinition, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A decoded request for inference.

    task: name of a registered task, or an inline one. strict: refuse what the grammar does not fully
    enforce. caller: whose quotas apply. accept_cut: free text that was cut is an answer whose finish
    reason says so, not an error; an answer that a grammar constrains or a parser reads stays an
    error. stop: texts before which free text ends; refused with a grammar or a parser.
    """

    task: str | InlineTask
    images: tuple[EncodedImage, ...]
    sampling: Sampling
    accept_empty: bool = False
    strict: bool = False
    caller: Caller = ANONYMOUS
    accept_cut: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A validated answer: complete, or free text that was cut where ``Call.accept_cut`` allows it.

    text: exactly what the model wrote. value: what the parser of the task made of it.
    json: the answer as JSON text where the task answers in JSON; ``text`` itself unless the task
    tidies. report: what the grammar enforces; None without one. attempts: how many it took; usage
    and timings are those of all of them together.
    """

    text: str
    value: Any
    json: str | None
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    model: str
    report: GrammarReport | None = None
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class TaskDescription:
    """What ListTasks and GetTask tell about a registered task."""

    name: str
    description: str
    needs_image: bool
    grammar: Grammar | None
    report: GrammarReport | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """What is enforced of a grammar. compile_s: until the engine had it ready."""

    report: GrammarReport
    compile_s: float
