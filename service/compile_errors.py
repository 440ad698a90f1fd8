"""Errors for grammars that xgrammar does not compile."""

from __future__ import annotations

import logging
import re

from service.errors import GrammarError
from service.types import GrammarKind

logger = logging.getLogger(__name__)

_MESSAGE_LIMIT = 300


def refusal(kind: GrammarKind, error: Exception) -> GrammarError:
    """xgrammar's message without the address in its source tree."""
    cause = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip())
    cause = re.sub(r"^\S*\.(?:cc|h|cpp):\d+:\s*", "", cause).split("\n")[0][:_MESSAGE_LIMIT]
    logger.info("grammar refused: %s", cause)
    schema = kind is GrammarKind.JSON_SCHEMA
    reason = "SCHEMA_UNSUPPORTED" if schema else "GRAMMAR_INVALID"
    return GrammarError(
        f"grammar.{kind.value}", f"{kind.value} cannot be compiled: {cause}", reason=reason
    )


def too_costly(field: str = "grammar") -> GrammarError:
    """The error for a grammar with which matching gets slower with every token."""
    return GrammarError(
        field,
        "can match an answer in too many ways, so that each token takes longer; avoid repetition of "
        "parts that may be empty or repeat themselves, recursive rules in a repetition, and large "
        "counts such as a minLength of millions",
        reason="GRAMMAR_TOO_COSTLY",
    )
