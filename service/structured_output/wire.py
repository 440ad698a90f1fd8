"""Requests to the processes that analyse grammars, and their answers, as JSON in frames.

A frame is its length in four bytes, big-endian, and that many bytes of JSON. Nothing in it is code,
so a process that a caller's grammar has taken over can at worst answer wrongly.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, replace
from typing import Any

from service.errors import FieldViolation, GrammarError
from service.schema_compiler.report import (
    Analysed,
    Enforcement,
    GrammarReport,
    KeywordReport,
    Rewrite,
    SchemaWarning,
    WarningKind,
)
from service.schema_compiler.schema import SchemaLimits
from service.types import Grammar, GrammarKind, PropertyOrder

LENGTH = struct.Struct(">I")
MAX_FRAME = 256 << 20
"""Bytes of an answer that are believed."""


def frame(message: dict[str, Any]) -> bytes:
    """A message as bytes. Half surrogates travel as escapes."""
    body = json.dumps(message).encode("ascii")
    return LENGTH.pack(len(body)) + body


def write_request(grammar: Grammar, limits: SchemaLimits, limit_s: float) -> dict[str, Any]:
    """limit_s: seconds after which nobody waits for the answer any more."""
    return {
        "kind": grammar.kind.value,
        "source": grammar.source,
        "property_order": grammar.property_order and grammar.property_order.value,
        "limits": asdict(limits),
        "limit_s": limit_s,
    }


def read_request(message: dict[str, Any]) -> tuple[Grammar, SchemaLimits, float]:
    """The inverse of ``write_request``."""
    order = message["property_order"]
    grammar = Grammar(
        GrammarKind(message["kind"]),
        message["source"],
        property_order=None if order is None else PropertyOrder(order),
    )
    return grammar, SchemaLimits(**message["limits"]), float(message["limit_s"])


def write_analysed(analysed: Analysed) -> dict[str, Any]:
    """The answer for a grammar that can be used. Its source is known where it was asked for."""
    report = analysed.report
    return {
        "ebnf": analysed.grammar.ebnf,
        "forces_little": analysed.grammar.forces_little,
        "enforcement": report.enforcement.value,
        "keywords": [[k.pointer, k.keyword, k.enforcement.value, k.why] for k in report.keywords],
        "rewrites": [[rewrite.pointer, rewrite.what] for rewrite in report.rewrites],
        "ebnf_bytes": report.ebnf_bytes,
        "seconds": report.seconds,
        "why": report.why,
        "warnings": [[one.pointer, one.kind.value, one.message] for one in report.warnings],
    }


def write_refusal(error: GrammarError) -> dict[str, Any]:
    """The answer for a grammar that is refused."""
    return {
        "violations": [[v.field, v.description] for v in error.violations],
        "reason": error.reason,
        "metadata": error.metadata,
    }


def read_answer(grammar: Grammar, message: dict[str, Any]) -> Analysed | GrammarError:
    """What was found out about the grammar that was asked for. Raises what a wrong form makes."""
    if "violations" in message:
        (field, description), *more = message["violations"]
        return GrammarError(
            field,
            description,
            reason=message["reason"],
            metadata=message["metadata"],
            more=tuple(FieldViolation(*violation) for violation in more),
        )
    ready = replace(grammar, ebnf=message["ebnf"], forces_little=message["forces_little"])
    report = GrammarReport(
        enforcement=Enforcement(message["enforcement"]),
        keywords=tuple(
            KeywordReport(pointer, keyword, Enforcement(how), why)
            for pointer, keyword, how, why in message["keywords"]
        ),
        rewrites=tuple(Rewrite(pointer, what) for pointer, what in message["rewrites"]),
        ebnf_bytes=message["ebnf_bytes"],
        seconds=message["seconds"],
        why=message["why"],
        warnings=tuple(
            SchemaWarning(pointer, WarningKind(kind), text)
            for pointer, kind, text in message["warnings"]
        ),
    )
    return Analysed(ready, report)
