"""JSON schemas of callers: checked at admission, then kept as a validator for finished answers.

A schema is read as strict JSON of bounded size and depth, checked against the metaschema of its
draft, and walked: every reference must point into the schema itself (nothing is ever fetched), no
chain of references may come back to itself without going into the instance, and every pattern must
run in linear time. Keywords of later drafts take effect. What the draft itself ignores (unknown
keywords; siblings of ``$ref`` up to draft-07) is ignored here, too, and definitions that nothing
refers to may hold what is refused elsewhere: ``schema_warnings`` finds both for the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jsonschema import exceptions
from referencing import Registry
from referencing import exceptions as reference_errors

from service.errors import GrammarError
from service.schema_compiler import jsontext
from service.schema_compiler.budget import Budget, BudgetExceeded, bounded
from service.schema_compiler.cache import SingleFlightCache
from service.schema_compiler.frontend.drafts import DEFAULT_DRAFT, DRAFTS, Draft, draft_named
from service.schema_compiler.frontend.envelopes import enveloped
from service.schema_compiler.frontend.keywords import KEYWORDS, REFERENCES, Applies, Child, children
from service.schema_compiler.frontend.metaschema import plainly_valid
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.schema_compiler.regex.matching import PatternError, compile_pattern

FIELD = "grammar.json_schema"
SCHEMA_CHECK_SECONDS = 5.0
"""Bound on checking a schema against its metaschema."""


MAX_PATTERN_EFFORT = 1_000_000
"""Steps that the automata of all patterns of a schema may take: about half a second."""


@dataclass(frozen=True, slots=True, eq=False)
class CheckedSchema:
    """A checked schema: its text as sent, the validator with bounded work, and its subschemas.

    Numbers of the validator and of the subschemas are exact.
    """

    text: str
    validator: Any
    draft: Draft
    subschemas: Subschemas

    @property
    def document(self) -> dict[str, Any] | bool:
        """The schema as a JSON value."""
        value: dict[str, Any] | bool = jsontext.decode(self.text)
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Subschemas:
    """Where subschemas are and what they refer to, by the ``id()`` of the parts of ``root``.

    root: the document without any ``$schema``; the validator has it, too.
    pointers: JSON pointer of each subschema that is an object. targets: what a reference stands for,
    by subschema and keyword. resolvers: of each subschema. dialects: pointers of subschemas that
    name their draft. embedded: whether a subschema has an identifier of its own. live: the subschemas
    that apply to some value. unused: why others would be refused, by pointer.
    """

    root: dict[str, Any] | bool
    pointers: dict[int, str]
    targets: dict[tuple[int, str], Any]
    resolvers: dict[int, Any]
    dialects: frozenset[str]
    embedded: bool
    live: tuple[dict[str, Any], ...] = ()
    unused: tuple[tuple[str, str], ...] = ()


def check_json_schema(
    text: str, limits: SchemaLimits = DEFAULT_LIMITS, field: str = FIELD
) -> dict[str, Any] | bool:
    """The schema as a JSON value; ``GrammarError`` on ``field`` says where it cannot be used and
    why."""
    try:
        return checked_schema(text, limits).document
    except GrammarError as error:
        description = error.violations[0].description
        raise GrammarError(
            field, description, reason=error.reason, metadata=error.metadata
        ) from None


_CACHE: SingleFlightCache[CheckedSchema] = SingleFlightCache(128, max_characters=1 << 20)


def checked_schema(text: str, limits: SchemaLimits = DEFAULT_LIMITS) -> CheckedSchema:
    """Check a schema and make its validator; a schema seen before costs a dictionary look-up."""
    return _CACHE.get((text, limits), len(text), lambda: _checked(text, limits))


def is_known(text: str, limits: SchemaLimits = DEFAULT_LIMITS) -> bool:
    """Whether `checked_schema` finds the schema in its cache, and takes microseconds."""
    return (text, limits) in _CACHE


def _checked(text: str, limits: SchemaLimits) -> CheckedSchema:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limits.max_bytes:
        raise GrammarError(
            FIELD,
            f"has {size} bytes, at most {limits.max_bytes} are allowed",
            reason="SCHEMA_TOO_LARGE",
            metadata={"limit": str(limits.max_bytes), "actual": str(size)},
        )
    document = _decode(text, limits)
    if isinstance(document, bool):
        nowhere = Subschemas(document, {}, {}, {}, frozenset(), False)
        return CheckedSchema(text, DEFAULT_DRAFT.of(document), DEFAULT_DRAFT, nowhere)
    if not isinstance(document, dict):
        raise _invalid("", "must be an object, true or false")
    _refuse_envelope(document)
    draft = _draft(document)
    _check_metaschema(document, draft)
    subschemas = _Walk(document, draft, limits).run()
    return CheckedSchema(text, draft.of(document), draft, subschemas)


def _decode(text: str, limits: SchemaLimits) -> Any:
    try:
        return jsontext.decode(text, max_depth=limits.max_depth, exact=True)
    except jsontext.JsonTooDeep:
        deep = str(jsontext.depth(text))
        raise GrammarError(
            FIELD,
            f"is nested {deep} levels deep, at most {limits.max_depth} are allowed",
            reason="SCHEMA_TOO_DEEP",
            metadata={"limit": str(limits.max_depth), "actual": deep},
        ) from None
    except jsontext.JsonTextError as error:
        raise GrammarError(FIELD, f"is not JSON: {error}", reason="SCHEMA_NOT_JSON") from None


def _invalid(pointer: str, what: str, reason: str = "SCHEMA_INVALID") -> GrammarError:
    where = f"at {jsontext.short(pointer, 200)}: " if pointer else ""
    return GrammarError(FIELD, f"{where}{what}", reason=reason, metadata={"pointer": pointer[:500]})


def _refuse_envelope(document: dict[str, Any]) -> None:
    """What wraps a schema would be taken for a schema that allows everything."""
    inner = enveloped(document)
    if inner:
        at = jsontext.pointer(inner)
        what = f"is no schema but holds one at {jsontext.short(at, 200)}: send that member alone"
        raise GrammarError(FIELD, what, reason="SCHEMA_ENVELOPE", metadata={"pointer": at[:500]})


def _draft(document: dict[str, Any]) -> Draft:
    if "$schema" not in document:
        return _common_dialect(document)
    draft = draft_named(document["$schema"])
    if draft is None:
        known = ", ".join(DRAFTS)
        raise _invalid("/$schema", f"unknown draft; known are {known}")
    return draft


def _common_dialect(document: dict[str, Any]) -> Draft:
    """The draft that subschemas name, where those that name one agree: a schema put together from
    several files keeps theirs. Else the default, and the walk refuses what differs."""
    found: dict[str | None, Draft | None] = {}
    pending = [document]
    while pending:
        schema = pending.pop()
        if isinstance(schema.get("$schema"), str):
            draft = draft_named(schema["$schema"])
            found[draft.name if draft else None] = draft
        pending += [child for _, _, child in children(schema)]
    only = found.popitem()[1] if len(found) == 1 else None
    return only or DEFAULT_DRAFT


def _check_metaschema(document: Any, draft: Draft, base: str = "") -> None:
    """Refuse what the metaschema of the draft refuses; the message is ours, so that it quotes
    nothing large."""
    if plainly_valid(document, draft.name, older_forms=draft.older_forms):
        return
    try:
        with bounded(Budget(seconds=SCHEMA_CHECK_SECONDS)):
            error = exceptions.best_match(draft.metaschema.iter_errors(document))
    except BudgetExceeded:
        raise _invalid(base, "takes too long to check", "SCHEMA_TOO_LARGE") from None
    if error is None:
        return
    pointer = base + jsontext.pointer(error.absolute_path)
    hint = _other_form(pointer.rpartition("/")[2], error.instance)
    raise _invalid(pointer, f"{_expectation(error)} (JSON Schema {draft.name}){hint}")


def _other_form(keyword: str, value: Any) -> str:
    """What to write in place of a form that another draft has."""
    if keyword == "items" and isinstance(value, list):
        return "; a list of schemas belongs into prefixItems"
    if keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
        return f"; write the bound itself as {keyword}"
    return ""


def _expectation(error: exceptions.ValidationError) -> str:
    keyword, value = str(error.validator), error.validator_value
    if keyword == "type":
        names = value if isinstance(value, list) else [value]
        return "must be of type " + " or ".join(str(n) for n in names)
    if keyword in ("minimum", "exclusiveMinimum", "minItems", "minLength", "pattern", "enum"):
        return f"must satisfy {keyword} {jsontext.short(str(value))}"
    return f"does not satisfy {keyword}"


_LATER = ("$defs", "contentSchema")
"""Keywords with subschemas that the metaschemas of earlier drafts do not look into."""
_EARLIER = frozenset(("draft-04", "draft-06", "draft-07"))


class _Walk:
    """Visits every subschema once: first those that apply to some value, in place or by reference,
    then the others, of which nothing is refused."""

    def __init__(self, root: dict[str, Any], draft: Draft, limits: SchemaLimits) -> None:
        self.draft = draft
        self.limits = limits
        self.edges: dict[int, list[int]] = {}
        self.pointers: dict[int, str] = {}
        self.targets: dict[tuple[int, str], Any] = {}
        self.resolvers: dict[int, Any] = {}
        self.dialects: list[str] = []
        self.named: dict[int, Any] = {}
        self.embedded = False
        self.unchecked: set[int] = set()
        self.places: dict[int, str] | None = None
        self.effort = 0
        self._children: dict[int, list[Child]] = {}
        self.root = root
        resolver = Registry().resolver_with_root(draft.specification.create_resource(root))
        self._note(root, "", resolver)

    def run(self) -> Subschemas:
        live = self._live()
        self._refuse_loops()
        return Subschemas(
            self.root,
            self.pointers,
            self.targets,
            self.resolvers,
            frozenset(self.dialects),
            self.embedded,
            tuple(live),
            tuple(self._unused({id(schema) for schema in live})),
        )

    def _children_of(self, schema: dict[str, Any]) -> list[Child]:
        found = self._children.get(id(schema))
        if found is None:
            found = self._children[id(schema)] = children(schema)
        return found

    def _note(self, schema: dict[str, Any], pointer: str, resolver: Any) -> None:
        """Remember a subschema and those within, wherever they are written."""
        pending = [(schema, pointer, resolver)]
        while pending:
            schema, pointer, resolver = pending.pop()
            if id(schema) in self.pointers:
                continue
            self.pointers[id(schema)] = pointer
            self.resolvers[id(schema)] = resolver
            if pointer and any(isinstance(schema.get(key), str) for key in ("$id", "id")):
                self.embedded = True
            self._dialect(schema, pointer)
            for keyword, path, child in self._children_of(schema):
                late = keyword in _LATER and self.draft.name in _EARLIER
                if late or id(schema) in self.unchecked:
                    self.unchecked.add(id(child))
                inner = resolver.in_subresource(self.draft.specification.create_resource(child))
                pending.append((child, pointer + jsontext.pointer(path), inner))

    def _dialect(self, schema: dict[str, Any], pointer: str) -> None:
        """Drop the name of the draft from the working copy: where the library meets ``$schema``
        again, through a reference, it would go on with its own, unbounded validator."""
        if "$schema" in schema:
            self.dialects.append(pointer)
            self.named[id(schema)] = schema.pop("$schema")

    def _live(self) -> list[dict[str, Any]]:
        """The subschemas that apply to some value, checked."""
        live: list[dict[str, Any]] = []
        seen = {id(self.root)}
        pending = [self.root]
        while pending:
            schema = pending.pop()
            live.append(schema)
            self._check(schema)
            followed = [t for t in self._follow(schema) if isinstance(t, dict)]
            edges = self.edges[id(schema)] = [id(target) for target in followed]
            for keyword, child in self._applied(schema):
                followed.append(child)
                if KEYWORDS[keyword].applies is Applies.SAME_VALUE:
                    edges.append(id(child))
            for child in reversed(followed):
                if id(child) not in seen:
                    seen.add(id(child))
                    pending.append(child)
        return live

    def _applied(self, schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        if self.draft.ignores_siblings and "$ref" in schema:
            return []
        return [
            (k, child)
            for k, _, child in self._children_of(schema)
            if KEYWORDS[k].applies is not Applies.BY_REFERENCE
        ]

    def _unused(self, live: set[int]) -> list[tuple[str, str]]:
        """Why subschemas that nothing applies would be refused, by pointer."""
        found: list[tuple[str, str]] = []
        pending: list[Any] = [self.root]
        while pending:
            schema = pending.pop()
            if id(schema) not in live:
                try:
                    self._check(schema)
                    self._follow(schema)
                except GrammarError as error:
                    at, what = error.metadata["pointer"], error.violations[0].description
                    found.append((at, what.removeprefix(f"at {jsontext.short(at, 200)}: ")))
            pending += [child for _, _, child in self._children_of(schema)]
        return found

    def _check(self, schema: dict[str, Any]) -> None:
        pointer = self.pointers[id(schema)]
        name = self.named.get(id(schema))
        named = self.draft if name is None else draft_named(name)
        if named is None or named.name != self.draft.name:
            raise _invalid(f"{pointer}/$schema", "a subschema cannot use another draft")
        self._foreign(schema, pointer)
        self._forms(schema, pointer)
        self._patterns(schema, pointer)
        # The metaschema of draft-04 says nothing of references.
        if not isinstance(schema.get("$ref", ""), str):
            raise _invalid(f"{pointer}/$ref", "must be of type string")

    def _foreign(self, schema: dict[str, Any], pointer: str) -> None:
        """A keyword that has no effect here would leave the schema weaker than it looks."""
        draft = self.draft
        beside_reference = draft.ignores_siblings and "$ref" in schema
        for keyword in schema:
            if keyword in draft.foreign:
                what = f"has no meaning in {draft.name}; name another draft in $schema"
            elif beside_reference and keyword in draft.newer:
                what = (
                    f"stands beside $ref, where {draft.name} ignores everything; "
                    "put the reference into allOf, or name 2020-12 in $schema"
                )
            else:
                continue
            raise _invalid(f"{pointer}/{keyword}", what, "SCHEMA_UNSUPPORTED")

    def _forms(self, schema: dict[str, Any], pointer: str) -> None:
        """Refuse keywords whose form needs another keyword that is not there, or is."""
        for keyword, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if schema.get(keyword) is True and bound not in schema:
                what = f"is true, which needs {bound} beside it; or write the bound itself here"
                raise _invalid(f"{pointer}/{keyword}", what)
        if isinstance(schema.get("items"), list) and "prefixItems" in schema:
            what = "is a list beside prefixItems; make it one schema, that of the items behind"
            raise _invalid(f"{pointer}/items", what)

    def _patterns(self, schema: dict[str, Any], pointer: str) -> None:
        found = [("pattern", schema["pattern"])] if isinstance(schema.get("pattern"), str) else []
        named = schema.get("patternProperties")
        found += [("patternProperties", key) for key in named] if isinstance(named, dict) else []
        for keyword, pattern in found:
            try:
                effort = compile_pattern(pattern, max_length=self.limits.max_regex_length).effort
            except PatternError as error:
                what = f"the pattern {jsontext.short(pattern)} {error}"
                where = f"{pointer}/{keyword}"
                raise _invalid(where, what, "SCHEMA_PATTERN_UNSUPPORTED") from None
            self.effort += effort
            if self.effort > MAX_PATTERN_EFFORT:
                what = "the patterns with look-aheads are too large together"
                raise _invalid(f"{pointer}/{keyword}", what, "SCHEMA_PATTERN_UNSUPPORTED")

    def _follow(self, schema: dict[str, Any]) -> list[Any]:
        """What the references of a subschema stand for."""
        pointer, resolver = self.pointers[id(schema)], self.resolvers[id(schema)]
        targets = []
        for keyword in REFERENCES:
            reference = schema.get(keyword)
            if not isinstance(reference, str):
                continue
            where = f"{pointer}/{keyword}"
            try:
                resolved = resolver.lookup(reference)
            except (reference_errors.Unresolvable, ValueError, KeyError, IndexError, TypeError):
                raise self._unresolved(reference, where) from None
            target = resolved.contents
            self.targets[id(schema), keyword] = target
            targets.append(target)
            if isinstance(target, bool):
                continue
            if not isinstance(target, dict):
                raise _invalid(where, "points to something that is not a schema")
            known = id(target) in self.pointers
            if not known or id(target) in self.unchecked:  # where no schemas of the draft live
                _check_metaschema(target, self.draft, self.pointers.get(id(target), where))
                self.unchecked.discard(id(target))
            if not known:
                self._note(target, self._place(target), resolved.resolver)
        return targets

    def _place(self, target: dict[str, Any]) -> str:
        """The pointer of a part of the document where no schema is expected."""
        if self.places is None:
            self.places = {}
            pending: list[tuple[Any, str]] = [(self.root, "")]
            while pending:
                part, pointer = pending.pop()
                self.places[id(part)] = pointer
                members = part.items() if isinstance(part, dict) else enumerate(part)
                pending += [
                    (member, pointer + jsontext.pointer((key,)))
                    for key, member in members
                    if isinstance(member, (dict, list))
                ]
        return self.places.get(id(target), "")

    def _unresolved(self, reference: str, where: str) -> GrammarError:
        if reference.startswith("#"):
            return _invalid(where, "points to nothing in this schema")
        return _invalid(
            where,
            "points outside this schema; nothing is fetched, put the target under $defs",
            "SCHEMA_REMOTE_REF",
        )

    def _refuse_loops(self) -> None:
        """A schema that applies itself to the same value never ends. Depth-first, without
        recursion."""
        done: set[int] = set()
        for start in self.edges:
            path, stack = [start], [iter(self.edges[start])]
            on_path = {start}
            while stack and start not in done:
                child = next(stack[-1], None)
                if child is None:
                    stack.pop()
                    done.add(path[-1])
                    on_path.discard(path.pop())
                elif child in on_path:
                    what = "applies itself to the same value without end"
                    raise _invalid(self.pointers[child], what)
                elif child not in done:
                    path.append(child)
                    on_path.add(child)
                    stack.append(iter(self.edges.get(child, ())))
