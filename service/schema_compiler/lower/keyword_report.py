"""The report on every keyword of a schema, place by place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.frontend.keywords import BY_NAME, REFERENCES
from service.schema_compiler.jsontext import pointer as pointer_of
from service.schema_compiler.normalize.nodes import Nodes
from service.schema_compiler.report import Enforcement, KeywordReport

_BESIDE = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}


def keyword_reports(
    nodes: Nodes,
    dropped: dict[str, str],
    given_up: dict[int, tuple[Any, str]],
    remarks: Mapping[str, str],
) -> Iterable[KeywordReport]:
    """One report for each keyword of each subschema, and for what a missing keyword lets through.

    dropped: why, by pointer of the keyword. given_up: why, by ``id()`` of a subschema of which
    nothing is enforced somewhere, which holds for all that it applies. remarks: what else is to be
    said, by pointer.
    """
    reached = _reached(nodes, [(nodes.subschemas.root, "")])
    lost = _reached(nodes, given_up.values())
    open_ = _reached(nodes, _by_open_conditions(nodes, dropped, lost))
    seen: set[str] = set()
    for schema, pointer in _places(nodes):
        live = id(schema) in reached
        known = nodes.meaning(schema) if live else {}
        if pointer in nodes.subschemas.dialects:
            seen.add(f"{pointer}/$schema")
            yield KeywordReport(f"{pointer}/$schema", "$schema", Enforcement.ANNOTATION)
        for keyword, value in schema.items():
            at = pointer + _step(keyword)
            seen.add(at)
            if keyword not in known or _says_nothing(keyword, value, known):
                yield KeywordReport(at, keyword, Enforcement.ANNOTATION)
                continue
            why = dropped.get(at, "") or lost.get(id(schema), "") or open_.get(id(schema), "")
            if not why and keyword in _BESIDE and isinstance(value, bool):
                why = dropped.get(f"{pointer}/{_BESIDE[keyword]}", "")
            yield _kept(at, keyword, why, remarks.get(at, ""))
    for at, why in dropped.items():
        if at not in seen:
            yield _kept(at, at.rpartition("/")[2], why)


def _by_open_conditions(
    nodes: Nodes, dropped: dict[str, str], lost: dict[int, str]
) -> Iterable[tuple[Any, str]]:
    """What applies by an ``if`` of which something is only checked: the grammar may take a value for
    one that meets the condition, and it does not, or the other way round."""
    checked = {at.rpartition("/")[0] for at in dropped}
    if not checked and not lost:
        return
    for schema, pointer in _places(nodes):
        known = nodes.meaning(schema)
        if "if" not in known:
            continue
        condition = _reached(nodes, [(known["if"], "")])
        places = nodes.subschemas.pointers
        if any(one in lost or places.get(one) in checked for one in condition):
            why = f"applies by {pointer}/if, of which something is only checked"
            yield from ((known[branch], why) for branch in ("then", "else") if branch in known)


@lru_cache(maxsize=1024)
def _step(keyword: str) -> str:
    return pointer_of((keyword,))


def _kept(pointer: str, keyword: str, why: str, remark: str = "") -> KeywordReport:
    enforcement = Enforcement.CHECKED if why else Enforcement.ENFORCED
    return KeywordReport(pointer, keyword, enforcement, "; ".join(filter(None, (why, remark))))


def _says_nothing(keyword: str, value: Any, known: dict[str, Any]) -> bool:

    if keyword == "format":
        return value not in FORMATS
    return keyword == "if" and "then" not in known and "else" not in known


def _places(nodes: Nodes) -> Iterable[tuple[dict[str, Any], str]]:
    """All subschemas that are objects, in the order of the document."""
    pointers = nodes.subschemas.pointers
    pending: list[Any] = [nodes.subschemas.root]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if id(part) in pointers:
                yield part, pointers[id(part)]
            pending += reversed(part.values())
        elif isinstance(part, list):
            pending += reversed(part)


def _reached(nodes: Nodes, starts: Iterable[tuple[Any, str]]) -> dict[int, str]:
    """Subschemas that some apply, by whatever way, and these; with the text of the one."""
    reached: dict[int, str] = {}
    pending = list(starts)
    while pending:
        schema, why = pending.pop()
        if isinstance(schema, dict) and id(schema) not in reached:
            reached[id(schema)] = why
            pending += [(child, why) for child in _applied(nodes, schema)]
    return reached


def _applied(nodes: Nodes, schema: dict[str, Any]) -> Iterable[Any]:
    for keyword, value in nodes.meaning(schema).items():
        if keyword in REFERENCES:
            yield nodes.subschemas.targets.get((id(schema), keyword))
        elif keyword in BY_NAME:
            yield from value.values()
        elif keyword in ("enum", "const", "required"):
            continue
        elif isinstance(value, list):
            yield from value
        elif isinstance(value, dict):
            yield value
