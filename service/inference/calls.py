"""A decoded call and its answer, as plain values without protobuf types."""

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
"""Name of the built-in task that AnalyzeImage runs."""


@dataclass(frozen=True, slots=True)
class InlineTask:
    """A task that is defined in the request.

    messages: a whole conversation instead of ``system`` and ``user``; its empty image parts are
        filled with the images of the call, in order.
    tools: tools that the model may call.
    schema_in_prompt: whether the prompt has the JSON schema of the answer; None uses the default.
    """

    system: str
    user: str
    grammar: Grammar | None
    messages: tuple[Message, ...] = ()
    tools: tuple[ToolDefinition, ...] = ()
    schema_in_prompt: bool | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A decoded request for inference.

    task: name of a registered task, or an inline task.
    strict: refuse a schema with keywords that the grammar does not enforce.
    caller: the caller whose quotas apply.
    accept_cut: return free text that was cut, with a finish reason that says so, instead of an
        error; a cut answer under a grammar or a parser stays an error.
    stop: free text ends before the first of these texts; refused with a grammar or a parser.
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

    text: the exact output of the model.
    value: the result of the task's parser.
    json: the answer as JSON text, if the task answers in JSON; equal to ``text`` unless the task's
        parser tidies.
    report: the enforcement of each schema keyword; None without a grammar.
    attempts: number of generations; usage and timings are the sums over all attempts.
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
    """Public description of a registered task, for ListTasks and GetTask."""

    name: str
    description: str
    needs_image: bool
    grammar: Grammar | None
    report: GrammarReport | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """Report on a grammar. compile_s: seconds that the engine needed to compile it."""

    report: GrammarReport
    compile_s: float
