"""What in a schema probably does not do what its author means, for the report.

JSON Schema ignores what it does not know: a misspelt ``requried`` is no error, it requires nothing.
Names are compared with the keywords, and values with what the keyword can have, so that annotations
of other tools pass: ``note`` is close to ``not``, but a text is no schema.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from service.schema_compiler import jsontext
from service.schema_compiler.frontend.checked_schema import CheckedSchema
from service.schema_compiler.frontend.drafts import ASSERTING, Draft
from service.schema_compiler.frontend.envelopes import looks_like_schema
from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.frontend.keywords import REFERENCES, Form, with_form
from service.schema_compiler.frontend.metaschema import plausible
from service.schema_compiler.report import SchemaWarning, WarningKind

MAX_OF_A_KIND = 50
"""Warnings of one kind in a report."""
MAX_NAMES = 2_000
"""Unknown names of a schema that are compared letter by letter, so that it takes bounded time."""
_SHORTEST, _LONG, _LONGEST = 4, 9, 26
"""Letters of a keyword that one typing error may hit, or two; of a name that is compared."""

_WORDS = frozenset((
    "$anchor", "$comment", "$defs", "$dynamicAnchor", "$id", "$recursiveAnchor", "$schema",
    "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "default", "definitions",
    "deprecated", "description", "discriminator", "example", "examples", "externalDocs", "id",
    "nullable", "readOnly", "title", "writeOnly", "xml",
))  # fmt: skip
"""Annotations of JSON Schema and words of OpenAPI."""
_OWN = ("x-", "x_", "_")
"""How names begin that are no keywords on purpose; keywords are switched off by an underscore."""
_HOLDERS = with_form(Form.SCHEMA, Form.SCHEMAS, Form.SCHEMA_OR_SCHEMAS, Form.SCHEMA_BY_NAME) - {
    "not",
    "oneOf",
    "contains",
}
"""Keywords that constrain nothing where their subschemas constrain nothing."""
_BY_REFERENCE = (
    "constrains nothing: every JSON value fits; to use a definition, add a reference, as "
)


def find(compiled: CheckedSchema) -> tuple[SchemaWarning, ...]:
    """The warnings on a schema, by kind and then in the order of the document."""
    subschemas, draft = compiled.subschemas, compiled.draft
    found = [
        *_unconstrained(compiled),
        *_misspelt(compiled),
        *_nullable(compiled),
        *_of_other_drafts(compiled),
        *_ignored(subschemas.live, subschemas.pointers, draft),
        *(
            SchemaWarning(at, WarningKind.UNUSED, f"never applies to a value; if it did: {what}")
            for at, what in subschemas.unused
        ),
    ]
    return tuple(_limited(found))


def _limited(found: Iterable[SchemaWarning]) -> Iterator[SchemaWarning]:
    by_kind: dict[WarningKind, list[SchemaWarning]] = defaultdict(list)
    for one in found:
        by_kind[one.kind].append(one)
    for several in by_kind.values():
        *kept, last = several[:MAX_OF_A_KIND]
        yield from kept
        more = len(several) - MAX_OF_A_KIND
        yield SchemaWarning(last.pointer, last.kind, last.message + _more(more))


def _more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""


def _at(pointer: str, keyword: str) -> str:
    return pointer + jsontext.pointer((keyword,))


# Schemas that constrain nothing


def _unconstrained(compiled: CheckedSchema) -> Iterator[SchemaWarning]:
    draft, document = compiled.draft, compiled.subschemas.root
    if document is False or any(
        _constrains(draft.meaning(one)) for one in compiled.subschemas.live
    ):
        return
    what = "constrains nothing: every JSON value fits"
    members = document.items() if isinstance(document, dict) else ()
    for name, member in members:
        if name in ("$defs", "definitions") and isinstance(member, dict) and member:
            reference = "#" + jsontext.pointer((name, next(iter(member))))
            what = f'{_BY_REFERENCE}"$ref": {jsontext.short(reference, 200)}'
        elif name not in _WORDS and looks_like_schema(member):
            at = jsontext.short(jsontext.pointer((name,)), 200)
            what = f"constrains nothing: every JSON value fits; {at} looks like a schema"
    yield SchemaWarning("", WarningKind.CONSTRAINS_NOTHING, what)


def _constrains(meaning: dict[str, Any]) -> bool:
    return any(_asserts(keyword, value) for keyword, value in meaning.items())


def _asserts(keyword: str, value: Any) -> bool:
    if keyword in _HOLDERS:
        parts = value.values() if isinstance(value, dict) else value
        return value is False or (not isinstance(value, bool) and False in list(parts))
    if keyword == "format":
        return value in FORMATS
    return keyword not in REFERENCES and value != []


# Misspelt keywords


def _misspelt(compiled: CheckedSchema) -> Iterator[SchemaWarning]:
    names = _Names()
    draft = compiled.draft
    for schema in compiled.subschemas.live:
        if draft.ignores_siblings and "$ref" in schema:
            continue
        for name, value in schema.items():
            meant = names.meant(name, value)
            if meant is not None and meant not in schema:
                at = _at(compiled.subschemas.pointers[id(schema)], name)
                what = f"is not a keyword of JSON Schema and constrains nothing; {meant} is one"
                yield SchemaWarning(at, WarningKind.MISSPELT_KEYWORD, what)


def _simplified(name: str) -> str:
    return "".join(name.split()).lower().translate(_NO_SIGNS)


_NO_SIGNS = str.maketrans("", "", "_-$")
_BY_SIMPLE = {_simplified(keyword): keyword for keyword in sorted(ASSERTING)}


def _shortened(word: str, times: int) -> set[str]:
    """The word, and what is left of it without some letters."""
    found = {word}
    for _ in range(times):
        found |= {one[:at] + one[at + 1 :] for one in found for at in range(len(one))}
    return found


def _errors(keyword: str) -> int:
    """Typing errors that still leave a keyword recognisable."""
    return 0 if len(keyword) < _SHORTEST else 2 if len(keyword) >= _LONG else 1


_BY_SHORTENED: dict[str, set[str]] = defaultdict(set)
for _simple in _BY_SIMPLE:
    for _part in _shortened(_simple, _errors(_simple)):
        _BY_SHORTENED[_part].add(_simple)


class _Names:
    """Unknown names of one schema, and the keywords that they may be meant for."""

    def __init__(self) -> None:
        self._close: dict[str, tuple[str, ...]] = {}

    def meant(self, name: str, value: Any) -> str | None:
        """The keyword; None where the name is one, or close to none that could have the value."""
        if name in ASSERTING or name in _WORDS or name.lower().startswith(_OWN):
            return None
        close = self._close.get(name)
        if close is None:
            compared = len(self._close) < MAX_NAMES
            close = self._close[name] = _close_to(name, compared=compared)
        return next((keyword for keyword in close if _could_be(keyword, value)), None)


def _could_be(keyword: str, value: Any) -> bool:
    if keyword in REFERENCES:
        return isinstance(value, str) and value.startswith("#")
    if isinstance(value, bool):
        return keyword in ("additionalProperties", "unevaluatedProperties", "uniqueItems")
    return plausible(keyword, value)


def _close_to(name: str, *, compared: bool) -> tuple[str, ...]:
    """Keywords that a name may be meant for, the closest first. compared: also letter by letter."""
    if len(name) > 2 * _LONGEST:
        return ()
    simple = _simplified(name)
    if simple in _BY_SIMPLE:
        return (_BY_SIMPLE[simple],)
    if not compared or not _SHORTEST - 1 <= len(simple) <= _LONGEST:
        return ()
    shortened = _shortened(simple, 1 if len(simple) < _LONG - 2 else 2)
    candidates = set().union(*(_BY_SHORTENED.get(part, ()) for part in shortened))
    ranked = sorted((_distance(simple, one), one) for one in candidates)
    return tuple(_BY_SIMPLE[one] for distance, one in ranked if distance <= _errors(one))


def _distance(one: str, other: str) -> int:
    """Letters that are added, left out, replaced, or swapped with the next one."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            best = min(row[-1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


# Keywords that say something else, or nothing, where they stand


def _nullable(compiled: CheckedSchema) -> Iterator[SchemaWarning]:
    for schema in compiled.subschemas.live:
        if schema.get("nullable") is True and not _takes_null(schema):
            at = _at(compiled.subschemas.pointers[id(schema)], "nullable")
            what = f"is of OpenAPI 3.0 and does not allow null in JSON Schema; write {_with_null(schema)}"
            yield SchemaWarning(at, WarningKind.NULLABLE, what)


def _takes_null(schema: dict[str, Any]) -> bool:
    types = schema.get("type")
    return isinstance(types, list) and "null" in types


def _with_null(schema: dict[str, Any]) -> str:
    types = schema.get("type")
    names = [types] if isinstance(types, str) else types if isinstance(types, list) else []
    if not names:
        return '{"anyOf": [{…}, {"type": "null"}]}'
    also = ", and null among the values of enum" if "enum" in schema else ""
    quoted = ", ".join(f'"{name}"' for name in (*names, "null"))
    return f'"type": [{quoted}]{also}'


def _of_other_drafts(compiled: CheckedSchema) -> Iterator[SchemaWarning]:
    """One warning for each keyword that is read as in another draft."""
    draft = compiled.draft
    found: dict[str, list[str]] = defaultdict(list)
    for schema in compiled.subschemas.live:
        for keyword, value in draft.meaning(schema).items():
            what = _of_another_draft(draft, keyword, value)
            if what:
                found[what].append(_at(compiled.subschemas.pointers[id(schema)], keyword))
    for what, pointers in found.items():
        message = what + _more(len(pointers) - 1)
        yield SchemaWarning(pointers[0], WarningKind.OTHER_DRAFT, message)


def _of_another_draft(draft: Draft, keyword: str, value: Any) -> str:
    if keyword in draft.newer:
        return f"{keyword} is newer than {draft.name}, and is enforced all the same"
    exclusive = keyword in ("exclusiveMinimum", "exclusiveMaximum")
    if exclusive and draft.name == "draft-04" and not isinstance(value, bool):
        return f"{keyword} with a number is newer than draft-04, and is enforced all the same"
    if exclusive and draft.older_forms and isinstance(value, bool):
        return f"{keyword} with a boolean is read as in draft-04, with the bound beside it"
    if keyword == "items" and draft.older_forms and isinstance(value, list):
        return "items with a list is read as in draft-07; since 2020-12 it is called prefixItems"
    return ""


def _ignored(
    live: Iterable[dict[str, Any]], pointers: dict[int, str], draft: Draft
) -> Iterator[SchemaWarning]:
    found: dict[str, list[str]] = defaultdict(list)
    for schema in live:
        meaning = draft.meaning(schema)
        for keyword in schema:
            if keyword in ASSERTING and keyword not in meaning:
                what = _why_ignored(schema, keyword, draft)
                if what:
                    found[what].append(_at(pointers[id(schema)], keyword))
    for what, several in found.items():
        message = what + _more(len(several) - 1)
        yield SchemaWarning(several[0], WarningKind.IGNORED, message)


def _why_ignored(schema: dict[str, Any], keyword: str, draft: Draft) -> str:
    if draft.ignores_siblings and "$ref" in schema:
        return f"stands beside $ref, where {draft.name} ignores everything; use allOf, or 2020-12"
    if keyword in ("then", "else"):
        return f"{keyword} says nothing without if"
    if keyword in ("minContains", "maxContains"):
        return f"{keyword} says nothing without contains"
    if keyword == "additionalItems" and "prefixItems" in schema:
        return "additionalItems says nothing beside prefixItems; call it items"
    return ""
