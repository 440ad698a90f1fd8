"""The stages of a compilation as text, for people who want to see what the compiler makes of a schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from service.schema_compiler.api import ANALYSIS_SECONDS, ANALYSIS_STEPS, Options, compile_schema
from service.schema_compiler.budget import Budget, bounded
from service.schema_compiler.frontend.checked_schema import checked_schema
from service.schema_compiler.ir.values import AcceptedText, Digits, Document, MatchedText
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.lower.lowering import normalized
from service.schema_compiler.normalize.nodes import TYPE_NAMES
from service.schema_compiler.prompt_schema import prompt_schema

Stage = Callable[[str, Options], Iterable[str]]


def _normalized(text: str, options: Options) -> Iterator[str]:
    """Each state with its alternatives by type; the alternatives as conjunctions of constraints."""
    text = compile_schema(text, DEFAULT_LIMITS, options).schema
    checked = checked_schema(text, DEFAULT_LIMITS)
    with bounded(Budget(ANALYSIS_SECONDS, ANALYSIS_STEPS)):
        states = normalized(checked, text)
    for names, expansion in states:
        yield " and ".join(names) or "any value"
        for type_name, alternatives in zip(TYPE_NAMES, expansion, strict=True):
            for one in alternatives:
                conjunction = " and ".join(map(_text, one)) or "any"
                yield f"  {type_name}: {conjunction}"


def _ir(text: str, options: Options) -> Iterator[str]:
    """Each value of the document with its alternatives."""
    document: Document = compile_schema(text, DEFAULT_LIMITS, options).document
    for reference, alternatives in document.values.items():
        yield f"value {reference}" + (" (root)" if reference == document.root else "")
        for one in alternatives:
            yield f"  {_text(one)}"


def _grammar(text: str, options: Options) -> Iterator[str]:
    """The rules of the grammar in EBNF."""
    yield from compile_schema(text, DEFAULT_LIMITS, options).grammar.splitlines()


def _prompt(text: str, options: Options) -> Iterator[str]:
    """The schema as a model reads it in its prompt."""
    yield prompt_schema(compile_schema(text, DEFAULT_LIMITS, options).schema)


def _report(text: str, options: Options) -> Iterator[str]:
    """Each keyword with its enforcement and the reason, rewrites and warnings."""
    report = compile_schema(text, DEFAULT_LIMITS, options).report
    yield report.enforcement.name
    for keyword in report.keywords:
        why = f": {keyword.why}" if keyword.why else ""
        yield f"  {keyword.enforcement.value:<11}{keyword.pointer}{why}"
    for rewrite in report.rewrites:
        yield f"  {'rewritten':<11}{rewrite.pointer}: {rewrite.what}"
    for warning in report.warnings:
        yield f"  {'warning':<11}{warning.pointer or 'the schema'}: {warning.message}"


STAGES: dict[str, Stage] = {
    "normalized": _normalized,
    "ir": _ir,
    "grammar": _grammar,
    "report": _report,
    "prompt": _prompt,
}


def _text(value: Any) -> str:
    """A value of a stage as text: its class with the fields that are not empty."""
    if isinstance(value, AcceptedText):
        return f"AcceptedText({len(value.automaton.edges)} states)"
    if isinstance(value, MatchedText):
        return "MatchedText"
    if isinstance(value, Digits):
        return f"Digits({len(value.states)} states)"
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        parts = ((field.name, getattr(value, field.name)) for field in fields(value))
        shown = (f"{name}={_text(part)}" for name, part in parts if _is_shown(part))
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    return repr(value)


def _is_shown(value: Any) -> bool:
    return value is not None and value is not False and value not in ((), {}, "", frozenset())
