"""The protocol between the server and its grammar workers: requests and answers as JSON in frames.

A frame is a length in four bytes, big-endian, followed by so many bytes of JSON. A frame never
contains code, so a worker that a hostile grammar has taken over can at worst send a wrong answer.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode, b64encode
from dataclasses import asdict, replace
from typing import Any

from service.errors import FieldViolation, GrammarError
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import (
    Analysed,
    Enforcement,
    GrammarReport,
    KeywordReport,
    Rewrite,
    SchemaWarning,
    WarningKind,
)
from service.types import Grammar, GrammarKind, PropertyOrder

LENGTH = struct.Struct(">I")
MAX_FRAME = 256 << 20
"""Maximum size of an answer, in bytes."""


def frame(message: dict[str, Any]) -> bytes:
    """Encode a message as a frame. Unpaired surrogates are sent as JSON escapes."""
    body = json.dumps(message).encode("ascii")
    return LENGTH.pack(len(body)) + body


def write_request(grammar: Grammar, limits: SchemaLimits, limit_s: float) -> dict[str, Any]:
    """Encode a request. limit_s: seconds after which the server no longer waits for the answer."""
    return {
        "kind": grammar.kind.value,
        "source": grammar.source,
        "property_order": grammar.property_order and grammar.property_order.value,
        "close_objects": grammar.close_objects,
        "lengths_beside": grammar.lengths_beside,
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
        close_objects=message["close_objects"],
        lengths_beside=message["lengths_beside"],
    )
    return grammar, SchemaLimits(**message["limits"]), float(message["limit_s"])


def write_analysed(grammar: Grammar, analysed: Analysed) -> dict[str, Any]:
    """Encode the answer for a valid grammar. grammar: as it was sent, so that its source is sent back
    only where the analysis has changed it."""
    report = analysed.report
    source = analysed.grammar.source
    return {
        "source": None if source == grammar.source else source,
        "ebnf": analysed.grammar.ebnf,
        "forces_little": analysed.grammar.forces_little,
        "prompt_schema": analysed.grammar.prompt_schema,
        "lengths": b64encode(analysed.grammar.lengths).decode("ascii"),
        "enforcement": report.enforcement.value,
        "keywords": [[k.pointer, k.keyword, k.enforcement.value, k.why] for k in report.keywords],
        "rewrites": [[rewrite.pointer, rewrite.what] for rewrite in report.rewrites],
        "ebnf_bytes": report.ebnf_bytes,
        "seconds": report.seconds,
        "why": report.why,
        "warnings": [[one.pointer, one.kind.value, one.message] for one in report.warnings],
    }


def write_refusal(error: GrammarError) -> dict[str, Any]:
    """Encode the answer for a refused grammar."""
    return {
        "violations": [[v.field, v.description] for v in error.violations],
        "reason": error.reason,
        "metadata": error.metadata,
    }


def read_answer(grammar: Grammar, message: dict[str, Any]) -> Analysed | GrammarError:
    """Decode the answer to a request. Raises ``KeyError``, ``TypeError`` or ``ValueError`` for a
    malformed answer."""
    if "violations" in message:
        (field, description), *more = message["violations"]
        return GrammarError(
            field,
            description,
            reason=message["reason"],
            metadata=message["metadata"],
            more=tuple(FieldViolation(*violation) for violation in more),
        )
    source = message["source"]
    ready = replace(
        grammar,
        source=grammar.source if source is None else source,
        ebnf=message["ebnf"],
        forces_little=message["forces_little"],
        prompt_schema=message["prompt_schema"],
        lengths=b64decode(message["lengths"], validate=True),
    )
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
