"""Grammars of callers, compiled by an engine; what goes wrong is told by the field of the caller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.deadlines import Deadline
from service.engine import Engine
from service.errors import GrammarError
from service.types import Grammar

COMPILE_TIMEOUT_S = 5.0


async def prepare(engine: Engine, grammar: Grammar, field: str, timeout_s: float) -> None:
    """The grammar, compiled; the caller of one that takes too long has its answer in time.

    field: path of the grammar in the request. Raises ``GrammarError`` on it.
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

    await Deadline(timeout_s).wait(prepared(), late)


@asynccontextmanager
async def naming(field: str) -> AsyncIterator[None]:
    """An engine knows the grammar of a request; the caller knows it by the field of the message."""
    try:
        yield
    except GrammarError as error:
        what = error.violations[0].description
        raise GrammarError(field, what, reason=error.reason, metadata=error.metadata) from error
