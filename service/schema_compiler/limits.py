"""The limits on grammars that callers send."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchemaLimits:
    """Maximum sizes of a grammar. Bytes are counted in UTF-8."""

    max_bytes: int = 256 * 1024
    max_depth: int = 64
    max_regex_length: int = 1024
    max_choices: int = 4096


DEFAULT_LIMITS = SchemaLimits()
