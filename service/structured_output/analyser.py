"""The interface to the analysis of grammars, and an implementation in a thread; ``pool`` has the
one in processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from service.schema_compiler.api import analyse
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import Analysed
from service.types import Grammar

ANYBODY = "-"
"""The caller of a grammar that comes from no caller who is known by name."""


class Analyser(Protocol):
    """Analyses the grammar of a caller, outside the event loop, so that engines can compile it."""

    def __call__(
        self, grammar: Grammar, limits: SchemaLimits, caller: str = ANYBODY
    ) -> Awaitable[Analysed]:
        """caller: name of the caller; those who wait take turns.

        Raises ``GrammarError``, on a field at or below ``grammar``, for a grammar that cannot be
        used."""
        ...


async def in_thread(grammar: Grammar, limits: SchemaLimits, caller: str = ANYBODY) -> Analysed:
    """The analysis in a thread of this process: for tests, and for servers with trusted callers."""
    return await asyncio.to_thread(analyse, grammar, limits)
