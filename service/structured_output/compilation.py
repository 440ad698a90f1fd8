"""Has an engine compile the grammar of a caller; errors name the field of the caller's request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.deadlines import Deadline
from service.engine import Engine
from service.errors import ContextTooLong, FieldViolation, GrammarError
from service.observation import current
from service.types import Grammar

COMPILE_TIMEOUT_S = 5.0


async def prepare(engine: Engine, grammar: Grammar, field: str, timeout_s: float) -> None:
    """Have the engine compile a grammar, within a time limit.

    field: path of the grammar in the request. Raises ``GrammarError`` on this field, also at the
    time limit.
    """

    def late() -> GrammarError:
        return GrammarError(
            field,
            f"takes longer than {timeout_s:g} s to compile; make it smaller",
            reason="GRAMMAR_COMPILE_TIMEOUT",
            metadata={"limit_s": f"{timeout_s:g}"},
        )

    async def prepared() -> None:
        async with naming(field):
            await engine.prepare(grammar)

    with current().span("compile grammar"):
        await Deadline(timeout_s).wait(prepared(), late)


@asynccontextmanager
async def naming(
    grammar_field: str, prompt_field: str = "task", hint: str = ""
) -> AsyncIterator[None]:
    """Replace the field names in an engine's errors by the paths in the caller's request.

    hint: what else makes a prompt shorter.
    """
    try:
        yield
    except GrammarError as error:
        first, *more = error.violations
        raise GrammarError(
            grammar_field,
            first.description,
            reason=error.reason,
            metadata=error.metadata,
            more=tuple(FieldViolation(grammar_field, one.description) for one in more),
            summary=error.message.removeprefix(f"{first.field}: "),
        ) from error
    except ContextTooLong as error:
        (found,) = error.violations
        field = prompt_field if found.field == "task" else found.field
        what = found.description + hint
        raise ContextTooLong(field, what, metadata=error.metadata) from error
