"""Objects that allow names which the schema does not list, and the schema with these objects closed.

``close_objects`` stands for what authors forgot: ``additionalProperties: false`` in each object that has
``properties`` and says nothing of other names. An answer under the closed schema is valid under the
schema as sent, so an object stays open where a closed one could make more values valid, as below
``not``, or no value at all, as beside ``allOf`` with other properties.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from service.errors import GrammarError
from service.schema_compiler import jsontext
from service.schema_compiler.exact import text_of
from service.schema_compiler.frontend.checked_schema import FIELD, CheckedSchema
from service.schema_compiler.frontend.drafts import frozen
from service.schema_compiler.frontend.keywords import KEYWORDS, REFERENCES, Applies, children
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import Enforcement, KeywordReport, Rewrite

MAX_NAMES = 1_000
"""Names that may be spoken of for one object; objects with more stay open."""
MAX_BRANCHES = 100
"""Branches of one ``oneOf`` that are compared with each other."""
_DYNAMIC = ("$dynamicRef", "$recursiveRef")
_OF_OTHERS = (
    "additionalProperties",
    "patternProperties",
    "propertyNames",
    "unevaluatedProperties",
)
"""Keywords that say something of names which ``properties`` does not list."""

OPEN = "this object may have properties that the schema does not list"
CLOSE_BY = (
    ". To forbid them in all such objects, ask with close_objects (--close-objects), or write"
    ' extra="forbid" in the model_config of each pydantic model, z.strictObject in zod. Maps, such as'
    " dict[str, int], stay open"
)
_IN_CONDITION = (
    "open also with close_objects: not, if, maxContains or an overlapping oneOf applies it"
)
_IN_PARTS = (
    "open also with close_objects: several subschemas speak of the same object; close it with "
    "unevaluatedProperties: false"
)
_UNLISTED = "open also with close_objects: the schema asks for names that properties does not list"

Names = frozenset[str] | None
"""Names of properties; None: those are not all."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Subschemas that a keyword applies to the same object, as alternatives. is_condition: what
    violates them can be valid, too."""

    keyword: str
    schemas: list[dict[str, Any]]
    is_condition: bool


@dataclass(frozen=True, slots=True)
class OpenObject:
    """A subschema with ``properties`` that says nothing of other names.

    pointer: JSON pointer of the subschema. why_not: why ``close_objects`` leaves it open; empty where
    it does not.
    """

    pointer: str
    why_not: str = ""


def open_objects(checked: CheckedSchema) -> list[OpenObject]:
    """The open objects that apply to some value, in the order of their pointers' subschemas."""
    return list(_Openings(checked).found())


def closed(checked: CheckedSchema, objects: Iterable[OpenObject], limits: SchemaLimits) -> str:
    """The text of the schema with ``additionalProperties: false`` in the open objects that can have
    it. Raises ``GrammarError`` where it is larger than a schema may be."""
    document = jsontext.decode(checked.text, max_depth=limits.max_depth, exact=True)
    for one in objects:
        if not one.why_not:
            _at(document, one.pointer)["additionalProperties"] = False
    text = text_of(document)
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limits.max_bytes:
        raise GrammarError(
            FIELD,
            f"has {size} bytes with its objects closed, at most {limits.max_bytes} are allowed",
            reason="SCHEMA_TOO_LARGE",
            metadata={"limit": str(limits.max_bytes), "actual": str(size)},
        )
    return text


def remarked(
    keywords: Iterable[KeywordReport], objects: Sequence[OpenObject], *, is_closed: bool
) -> Iterator[KeywordReport]:
    """The reports, with what is to be said of open objects at their ``properties``. is_closed: whether
    ``close_objects`` is on."""
    remarks: dict[str, str] = {}
    hint = CLOSE_BY
    for one in objects:
        if is_closed:
            what = one.why_not
        elif one.why_not:
            what = OPEN
        else:
            what, hint = OPEN + hint, ""  # once is enough
        if what:
            remarks[f"{one.pointer}/properties"] = what
    for report in keywords:
        remark = remarks.get(report.pointer)
        if remark is not None and report.enforcement is not Enforcement.ANNOTATION:
            yield replace(report, why="; ".join(filter(None, (report.why, remark))))
        else:
            yield report


def rewrites(objects: Iterable[OpenObject]) -> list[Rewrite]:
    """What ``close_objects`` has added."""
    what = "closed by close_objects: additionalProperties: false added"
    return [Rewrite(one.pointer, what) for one in objects if not one.why_not]


def _at(document: Any, pointer: str) -> Any:
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        document = document[int(name) if isinstance(document, list) else name]
    return document


class _Openings:
    """Finds the open objects of one schema, by passes over its subschemas without recursion."""

    def __init__(self, checked: CheckedSchema) -> None:
        self.subschemas = checked.subschemas
        self.live = checked.subschemas.live
        self.meanings = {id(one): checked.draft.meaning(one) for one in self.live}
        # Through a dynamic reference, an object can be reached from anywhere.
        self.is_dynamic = checked.subschemas.embedded and any(
            keyword in meaning for meaning in self.meanings.values() for keyword in _DYNAMIC
        )
        self.names = {at: _own_names(meaning) for at, meaning in self.meanings.items()}
        self.groups = {id(one): list(self._groups(one)) for one in self.live}

    def found(self) -> Iterator[OpenObject]:
        conditions = self._in_conditions()
        spoken = self._spoken_in_place()
        accompanied = self._accompanied(spoken)
        within = self._within()
        for schema in self.live:
            meaning = self.meanings[id(schema)]
            if "properties" not in meaning or any(one in meaning for one in _OF_OTHERS):
                continue
            if id(schema) in within:
                continue
            names = spoken[id(schema)]
            own = self.names[id(schema)]
            if self.is_dynamic or id(schema) in conditions:
                why_not = _IN_CONDITION
            elif id(schema) in accompanied or (names is None and own is not None):
                why_not = _IN_PARTS
            elif names is None or not names.issubset(meaning["properties"]):
                why_not = _UNLISTED
            else:
                why_not = ""
            yield OpenObject(self.subschemas.pointers[id(schema)], why_not)

    def _groups(self, schema: Any) -> Iterator[_Group]:
        meaning = self.meanings[id(schema)]
        for keyword, several, is_condition in self._applied_in_place(schema, meaning):
            kept = [one for one in several if isinstance(one, dict) and id(one) in self.meanings]
            if kept:
                yield _Group(keyword, kept, is_condition)

    def _applied_in_place(
        self, schema: Any, meaning: dict[str, Any]
    ) -> Iterator[tuple[str, list[Any], bool]]:
        for keyword in REFERENCES:
            if keyword in meaning:
                target = self.subschemas.targets[id(schema), keyword]
                yield keyword, [target], keyword in _DYNAMIC
        for one in meaning.get("allOf", ()):
            yield "allOf", [one], False
        if "anyOf" in meaning:
            yield "anyOf", meaning["anyOf"], False
        if "oneOf" in meaning:
            yield "oneOf", meaning["oneOf"], not self._disjoint(meaning["oneOf"])
        yield (
            "then",
            [meaning[keyword] for keyword in ("then", "else") if keyword in meaning],
            False,
        )
        for keyword in ("if", "not"):
            if keyword in meaning:
                yield keyword, [meaning[keyword]], True
        for keyword in ("dependentSchemas", "dependencies"):
            for one in meaning.get(keyword, {}).values():
                yield keyword, [one], False

    def _in_place(self, schema: Any) -> list[dict[str, Any]]:
        """The subschemas that apply to the same object."""
        return [one for group in self.groups[id(schema)] for one in group.schemas]

    def _parts(self, schema: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        """The subschemas that apply to parts of a value, and whether they are conditions."""
        meaning = self.meanings[id(schema)]
        for keyword, _, child in children(meaning):
            if KEYWORDS[keyword].applies is Applies.PARTS and id(child) in self.meanings:
                yield child, keyword == "contains" and "maxContains" in meaning

    def _in_conditions(self) -> set[int]:
        """The subschemas that a condition applies, by whatever way."""
        pending: list[dict[str, Any]] = []
        for schema in self.live:
            for group in self.groups[id(schema)]:
                pending += group.schemas if group.is_condition else ()
            pending += [part for part, is_condition in self._parts(schema) if is_condition]
        reached: set[int] = set()
        while pending:
            schema = pending.pop()
            if id(schema) not in reached:
                reached.add(id(schema))
                pending += self._in_place(schema)
                pending += [part for part, _ in self._parts(schema)]
        return reached

    def _spoken_in_place(self) -> dict[int, Names]:
        """The names that each subschema, and those that it applies to the same object, speak of. Ends,
        as no subschema applies itself to the same value."""
        spoken: dict[int, Names] = {}
        for start in self.live:
            stack = [start]
            while stack:
                schema = stack[-1]
                below = self._in_place(schema)
                missing = [one for one in below if id(one) not in spoken]
                if missing:
                    stack += missing
                    continue
                stack.pop()
                names = self.names[id(schema)]
                for one in below:
                    names = _both(names, spoken[id(one)])
                spoken[id(schema)] = names
        return spoken

    def _accompanied(self, spoken: dict[int, Names]) -> set[int]:
        """The subschemas beside which another one speaks of names of the same object, be it around
        them; other branches of the same alternatives do not count."""
        pending: list[dict[str, Any]] = []
        for schema in self.live:
            own_speaks = self.names[id(schema)] != frozenset()
            groups = self.groups[id(schema)]
            speaking = [any(spoken[id(one)] != frozenset() for one in g.schemas) for g in groups]
            for group, speaks in zip(groups, speaking, strict=True):
                if own_speaks or sum(speaking) > speaks:
                    pending += group.schemas
        return self._with_those_in_place(pending)

    def _within(self) -> set[int]:
        """Subschemas that add to an object which another one around them describes, and conditions:
        nobody would close these."""
        targets = {id(target) for target in self.subschemas.targets.values()}
        pending: list[dict[str, Any]] = []
        for schema in self.live:
            describes = "properties" in self.meanings[id(schema)]
            for group in self.groups[id(schema)]:
                if describes or group.keyword in ("if", "not"):
                    pending += [one for one in group.schemas if id(one) not in targets]
        return self._with_those_in_place(pending) - targets

    def _with_those_in_place(self, pending: list[dict[str, Any]]) -> set[int]:
        reached: set[int] = set()
        while pending:
            schema = pending.pop()
            if id(schema) not in reached:
                reached.add(id(schema))
                pending += self._in_place(schema)
        return reached

    # Branches of oneOf

    def _disjoint(self, branches: list[Any]) -> bool:
        """Whether no value fits two branches, as types or the values of a required property tell."""
        if len(branches) > MAX_BRANCHES:
            return False
        known = [self._resolved(one) for one in branches]
        return all(_apart(one, other) for one, other in combinations(known, 2))

    def _resolved(self, schema: Any) -> dict[str, Any]:
        """What a branch itself says, with its required properties alone; nothing where that is not
        known."""
        found = self._target(schema)
        required, listed = found.get("required", ()), found.get("properties", {})
        kept = {name: self._target(listed[name]) for name in required if name in listed}
        return {**found, "properties": kept}

    def _target(self, schema: Any) -> dict[str, Any]:
        """The keywords of a subschema, or of what its reference stands for."""
        while isinstance(schema, dict) and id(schema) in self.meanings:
            meaning = self.meanings[id(schema)]
            if "$ref" not in meaning:
                return meaning
            schema = self.subschemas.targets[id(schema), "$ref"]  # no loops: they were refused
        return {}


def _own_names(meaning: dict[str, Any]) -> Names:
    """The names that a subschema itself speaks of; None where it speaks of others, too."""
    if any(keyword in meaning for keyword in _OF_OTHERS):
        return None
    listed = meaning.get("properties", {})
    names = {*listed, *meaning.get("required", ())}
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, others in meaning.get(keyword, {}).items():
            names.add(name)
            names.update(others if isinstance(others, list) else ())
    if meaning.get("minProperties", 0) > len(listed) or len(names) > MAX_NAMES:
        return None
    values = [*meaning.get("enum", ()), *([meaning["const"]] if "const" in meaning else ())]
    return None if any(isinstance(value, dict) for value in values) else frozenset(names)


def _both(one: Names, other: Names) -> Names:
    if one is None or other is None:
        return None
    both = one | other
    return both if len(both) <= MAX_NAMES else None


def _apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    types, others = _types(one), _types(other)
    if types is not None and others is not None:
        shared = types & others
        if not shared:
            return True
        if shared == {"object"}:
            return any(
                _no_common_value(one["properties"][name], other["properties"][name])
                for name in one["properties"].keys() & other["properties"].keys()
            )
    return _no_common_value(one, other)


def _types(schema: dict[str, Any]) -> set[str] | None:
    types = schema.get("type")
    if types is None:
        return None
    listed = {types} if isinstance(types, str) else set(types)
    return {"number" if name == "integer" else name for name in listed}


def _no_common_value(one: dict[str, Any], other: dict[str, Any]) -> bool:
    values, others = _values(one), _values(other)
    return values is not None and others is not None and values.isdisjoint(others)


def _values(schema: dict[str, Any]) -> set[Any] | None:
    if "const" in schema:
        return {frozen(schema["const"])}
    return {frozen(value) for value in schema["enum"]} if "enum" in schema else None
