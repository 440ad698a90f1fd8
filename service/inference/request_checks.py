"""Checks of a request before the engine starts to work on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

from service.errors import (
    FieldViolation,
    GrammarError,
    InvalidRequest,
    TooManyImages,
    VisionDisabled,
)
from service.inference.sampling import refuse, violations
from service.inference.stops import check_stops
from service.schema_compiler import jsontext
from service.schema_compiler.report import Enforcement, KeywordReport, SchemaWarning, under
from service.tasks.contract import Task
from service.types import (
    Capabilities,
    Enforcer,
    GenerateRequest,
    Grammar,
    ImageSource,
    Message,
    Modality,
    Role,
    Sampling,
    TextPart,
)

DEFAULT_SAMPLING = Sampling()
DEFAULT_OPTIONS = {one.name: one.default for one in fields(Sampling)}
SCHEMA_NOTE = "Answer with one JSON value that is valid under this JSON Schema:\n"
"""Stands before the schema in a prompt."""
MAX_NOT_ENFORCED = 16
"""Maximum number of keywords that the error of a strict request names; the error also has their
total."""


def check_request(
    capabilities: Capabilities,
    task: Task,
    images: Sequence[ImageSource],
    sampling: Sampling,
    request_id: str,
    stop: Sequence[str] = (),
    *,
    strict: bool = False,
    deadline: float | None = None,
    piecewise: bool = True,
) -> GenerateRequest:
    """Build the request for the engine. Raises if the engine cannot run it, before any computation.

    stop: texts that end the answer. The service looks for them; the engine does not get them.
    strict: see ``Call``. deadline, piecewise: see ``GenerateRequest``.
    """
    check_sampling(sampling, capabilities)
    _check_thinking(task, sampling)
    _check_stop(task, stop)
    _check_images(task, len(images) - len(task.example_images), len(images), capabilities)
    if task.grammar is not None:
        check_kind(task.grammar, capabilities, task.grammar_field)
    made = partial(
        GenerateRequest,
        request_id=request_id,
        tools=task.tools,
        grammar=task.grammar,
        sampling=sampling,
        enforced=strict or capabilities.enforcer is Enforcer.MASK,
        deadline=deadline,
        piecewise=piecewise,
        joinable=not stop,
    )
    note = schema_note(task, capabilities)
    if task.messages or task.examples:
        return made(messages=_with_note(task.conversation(images), note))
    system = "\n\n".join(filter(None, (task.system, note)))
    return made(user=task.user, system=system, images=tuple(images))


def schema_note(task: Task, capabilities: Capabilities) -> str:
    """What the prompt says of the JSON schema of the answer; empty where it says nothing."""
    grammar, wish = task.grammar, task.schema_in_prompt
    shown = capabilities.schema_in_prompt if wish is None else wish
    if not shown or grammar is None or not grammar.prompt_schema:
        return ""
    return SCHEMA_NOTE + grammar.prompt_schema


def _with_note(messages: tuple[Message, ...], note: str) -> tuple[Message, ...]:
    """The conversation with the note at the end of the system text, where chat templates also list
    tools: it is the same for all calls of a task, so that a prefix cache keeps it."""
    if not note:
        return messages
    first, *others = messages
    if first.role is not Role.SYSTEM:
        return (Message(Role.SYSTEM, (TextPart(note),)), *messages)
    return (replace(first, parts=(*first.parts, TextPart("\n\n" + note))), *others)


def on_engine(task: Task, capabilities: Capabilities) -> Task:
    """The task with the grammar for this engine, and what the engine enforces of it."""
    if task.counted is not None and not capabilities.limits_lengths:
        counted = task.counted
        task = replace(task, grammar=counted.grammar, report=counted.report, counted=None)
    if task.report is None:
        return task
    return replace(task, report=under(capabilities, task.report))


def check_kind(grammar: Grammar, capabilities: Capabilities, field: str) -> None:
    """Refuse a kind of grammar that the engine does not support."""
    kinds = capabilities.grammar_kinds
    if grammar.kind in kinds:
        return
    supported = ", ".join(sorted(kind.value for kind in kinds)) or "none"
    raise GrammarError(
        field,
        f"{grammar.kind.value} is not a kind of grammar that this engine supports; it supports: {supported}",
        reason="GRAMMAR_KIND_UNSUPPORTED",
        metadata={"kind": grammar.kind.value, "supported": supported},
    )


def check_enforced(task: Task) -> None:
    """The check of ``strict``: refuse a grammar that does not enforce every keyword, or a schema
    with misspelt keywords.

    A task without a grammar passes.
    """
    report = task.report
    if report is None or (report.enforcement is Enforcement.ENFORCED and not report.misspelt):
        return
    unenforced: list[KeywordReport | SchemaWarning] = [*report.misspelt, *report.checked]
    found = [FieldViolation(task.grammar_field, _unenforced(one)) for one in unenforced]
    first, *more = found[:MAX_NOT_ENFORCED] or [FieldViolation(task.grammar_field, report.why)]
    how = "misspelt or only checked" if report.misspelt else "only checked"
    several = f"{len(found)} keywords are {how} after generation, the first "
    raise GrammarError(
        first.field,
        first.description,
        reason="SCHEMA_NOT_ENFORCED",
        metadata={"checked": str(max(1, len(found)))},
        more=tuple(more),
        summary="is not fully enforced, which strict requires: "
        f"{several if more else ''}{first.description}. "
        "Change the schema (ValidateSchema lists all keywords), or leave out strict",
    )


def _unenforced(found: KeywordReport | SchemaWarning) -> str:
    why = found.why if isinstance(found, KeywordReport) else found.message
    return f"at {jsontext.short(found.pointer, 200)}: {why}"


def check_sampling(sampling: Sampling, capabilities: Capabilities) -> None:
    """Refuse options out of range and options that the engine does not support, all in one
    error."""
    if sampling == DEFAULT_SAMPLING:
        return
    given = {
        name: value
        for name, default in DEFAULT_OPTIONS.items()
        if (value := getattr(sampling, name)) != default
    }
    found = list(violations(given))
    honoured = capabilities.sampling_options
    known = ", ".join(sorted(honoured)) or "none"
    description = f"is not supported by this engine, which supports: {known}; leave it out"
    found += [
        FieldViolation(f"sampling.{name}", description) for name in given if name not in honoured
    ]
    refuse(found)


def takes_any_text(task: Task) -> bool:
    """Whether any text is an answer: neither a grammar nor a parser says what one looks like."""
    return all(part is None for part in (task.grammar, task.parse, task.usable, task.document))


def _check_thinking(task: Task, sampling: Sampling) -> None:
    if sampling.thinking and task.grammar is not None:
        raise InvalidRequest(
            "sampling.thinking",
            "is for answers without a grammar: a grammar constrains the answer from its first "
            "token; leave it out, or leave out the grammar",
            reason="SAMPLING_OPTION_INVALID",
        )


def _check_stop(task: Task, stop: Sequence[str]) -> None:
    check_stops(stop)
    if stop and not takes_any_text(task):
        raise InvalidRequest(
            "stop",
            "is for free text alone: under a grammar the answer ends where the grammar ends, and a "
            "stop text would cut it; leave it out",
        )


def _check_images(task: Task, asked: int, shown: int, capabilities: Capabilities) -> None:
    """asked: number of images of the request; shown: the same plus the images of the task's
    examples."""
    if task.needs_image and not asked:
        raise InvalidRequest(
            "images", "this task needs at least one image", reason="IMAGE_REQUIRED"
        )
    if shown and Modality.IMAGE not in capabilities.modalities:
        raise VisionDisabled(
            "This model runs without vision: send the request without images, "
            "or ask the operator for a model with vision."
        )
    if task.max_images is not None and asked > task.max_images:
        raise TooManyImages(asked, task.max_images)
    if shown > capabilities.max_images:
        raise TooManyImages(shown, capabilities.max_images)
