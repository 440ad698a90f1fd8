"""Grammars as engines get them: analysed."""

from __future__ import annotations

import json
from typing import Any

from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.types import Grammar, GrammarKind


def analysed(kind: GrammarKind, source: Any) -> Grammar:
    """source: text, or a value that is sent as JSON."""
    text = source if isinstance(source, str) else json.dumps(source)
    return analyse(Grammar(kind, text), DEFAULT_LIMITS).grammar
