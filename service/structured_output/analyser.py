"""The seam between calls and the analysis of their grammars: a thread here, processes in ``pool``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from service.schema_compiler.analysis import analyse
from service.schema_compiler.report import Analysed
from service.schema_compiler.schema import SchemaLimits
from service.types import Grammar


class Analyser(Protocol):
    """Makes the grammar of a caller ready for engines, off the event loop."""

    def __call__(self, grammar: Grammar, limits: SchemaLimits) -> Awaitable[Analysed]:
        """Raises ``GrammarError`` on a field at or below ``grammar`` for one that cannot be used."""
        ...


async def in_thread(grammar: Grammar, limits: SchemaLimits) -> Analysed:
    """The analysis in a thread of this process: for tests, and where nobody is hostile."""
    return await asyncio.to_thread(analyse, grammar, limits)
