"""Tasks that travel with a request."""

from __future__ import annotations

from dataclasses import replace

from service.errors import GrammarError, InvalidRequest
from service.tasks.contract import Task
from service.tasks.grammars.analyser import Analyser
from service.tasks.schema import DEFAULT_LIMITS, SchemaLimits
from service.types import Grammar


async def inline_task(
    system: str,
    user: str,
    grammar: Grammar | None,
    analyser: Analyser,
    limits: SchemaLimits = DEFAULT_LIMITS,
    *,
    max_text_bytes: int | None = None,
    field: str = "task.inline",
) -> Task:
    """A task of a caller. Raises ``InvalidRequest`` or ``GrammarError`` on fields below ``field``."""
    _check_texts(system, user, max_text_bytes, field)
    task = Task(name="inline", description="A task of the request.", system=system, user=user)
    if grammar is None:
        return task
    try:
        analysed = await analyser(grammar, limits)
    except GrammarError as error:
        raise _below(field, error) from error
    return replace(
        task,
        grammar=analysed.grammar,
        report=analysed.report,
        grammar_field=f"{field}.grammar.{grammar.kind.value}",
    )


def _check_texts(system: str, user: str, max_bytes: int | None, field: str) -> None:
    if not user.strip():
        raise InvalidRequest(f"{field}.user", "is empty; say what to do", reason="TEXT_EMPTY")
    size = len(user.encode("utf-8", "surrogatepass")) + len(system.encode("utf-8", "surrogatepass"))
    if max_bytes is not None and size > max_bytes:
        raise InvalidRequest(
            f"{field}.user",
            f"system and user texts have {size} bytes, at most {max_bytes} are allowed",
            reason="TEXT_TOO_LONG",
            metadata={"limit": str(max_bytes), "actual": str(size)},
        )


def _below(field: str, error: GrammarError) -> GrammarError:
    """The analysis knows a grammar as ``grammar``; the caller knows it by the path in the message."""
    violation = error.violations[0]
    return GrammarError(
        f"{field}.{violation.field}",
        violation.description,
        reason=error.reason,
        metadata=error.metadata,
    )
