"""Whether a grammar, its report and the validators agree on a schema."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import event
from jsonschema import Draft4Validator, Draft6Validator, Draft7Validator, Draft202012Validator
from jsonschema.validators import extend, validator_for

from benchmarks import judge
from service.errors import GrammarError, OutputInvalid
from service.schema_compiler import jsontext
from service.schema_compiler.api import analyse
from service.schema_compiler.budget import Budget, bounded
from service.schema_compiler.frontend.checked_schema import (
    CheckedSchema,
    Subschemas,
    check_json_schema,
    checked_schema,
)
from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.jsontext import pointer
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.lower.format_patterns import FORMAT_PATTERNS
from service.schema_compiler.lower.objects import LASTS
from service.schema_compiler.regex.matching import compile_pattern
from service.schema_compiler.report import Analysed
from service.structured_output.answers import AnswerValidator
from service.types import Grammar, GrammarKind, PropertyOrder
from tests.service.schema_compiler import schemas

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def analysed(
    schema: Any, order: PropertyOrder = PropertyOrder.DECLARED, *, lengths_beside: bool = False
) -> Analysed | None:
    """None where the schema is refused; of schemas that no value fits, there is no grammar."""
    grammar = Grammar(
        GrammarKind.JSON_SCHEMA,
        json.dumps(schema),
        property_order=order,
        lengths_beside=lengths_beside,
    )
    try:
        return analyse(grammar, DEFAULT_LIMITS)
    except GrammarError as error:
        if error.reason not in ("SCHEMA_UNSATISFIABLE", "SCHEMA_INVALID", "SCHEMA_UNSUPPORTED"):
            raise
        return None


def admitted(schema: Any) -> bool:
    try:
        check_json_schema(json.dumps(schema))
    except GrammarError:
        return False
    return True


def valid(schema: Any, text: str) -> bool:
    """Whether the final validation gives an answer out."""
    try:
        AnswerValidator(json.dumps(schema)).parse(text)
    except OutputInvalid:
        return False
    return True


def check_texts(
    schema: Any, seed: int, number: int = 8, order: PropertyOrder = PropertyOrder.DECLARED
) -> list[Any]:
    """Texts of the grammar are JSON, and violate nothing but what the report says is only checked;
    without that, ``jsonschema`` on fractions finds them valid, too. Returns their values."""
    found = analysed(schema, order)
    if found is None:
        return []
    grammar = schemas.compiled(found.grammar.ebnf)
    places = {one.pointer for one in found.report.checked}
    rng = random.Random(seed)
    values = []
    for _ in range(number):
        text = schemas.walk(grammar, rng)
        if text is None:
            continue
        document = jsontext.without_repeats(text)
        values.append(jsontext.decode(document))
        compiled = checked_schema(json.dumps(schema), DEFAULT_LIMITS)
        with bounded(Budget()):
            violations = list(compiled.validator.iter_errors(jsontext.decode(document, exact=True)))
        for violation in violations:
            assert _is_said(compiled, violation, places), (text, violation, places)
        event("a text")
        if not places:
            event("a text of a grammar that enforces everything")
            assert valid(schema, text), text
            # Its patterns are Python's, which read ends of lines and letters beyond ASCII otherwise,
            # and it does not assert formats.
            other = not text.isascii() or "\\n" in text or "\\r" in text
            if not other and '"format"' not in json.dumps(schema):
                _plain(schema).validate(judge.exact(document))
    return values


def _plain(schema: Any) -> Any:
    """The library's own validator on fractions, with the keywords of later drafts, which it would
    ignore in an earlier one."""
    cls = validator_for(schema, default=Draft202012Validator)
    own = cls.VALIDATORS
    if cls in (Draft4Validator, Draft6Validator, Draft7Validator):
        later = {**Draft7Validator.VALIDATORS, **Draft202012Validator.VALIDATORS}
        added = {name: later[name] for name in later if name not in (*own, *_REFERENCES)}
        added["contains"] = later["contains"]  # which reads minContains and maxContains
        if cls is Draft4Validator:
            added["items"] = Draft7Validator.VALIDATORS["items"]  # which takes booleans
            for bound, exclusive in (
                ("minimum", "exclusiveMinimum"),
                ("maximum", "exclusiveMaximum"),
            ):
                added[bound] = _bound(own[bound], later[bound], exclusive)
                added[exclusive] = _number(later[exclusive])
        cls = extend(cls, added)
    return judge.on_fractions(cls)(judge.exact(json.dumps(schema)))


def _bound(earlier: Any, later: Any, exclusive: str) -> Any:
    """The keyword of draft-04 where the exclusive one is its boolean, else of the later drafts."""

    def bound(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        keyword = earlier if isinstance(schema.get(exclusive), bool) else later
        return keyword(validator, value, instance, schema)

    return bound


def _number(keyword: Any) -> Any:
    def bound(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        return () if isinstance(value, bool) else keyword(validator, value, instance, schema)

    return bound


def check_value(schema: Any, value: Any) -> None:
    """A valid value is one of the grammar, with whole numbers in the spelling of integers, and unless
    it has an additional name that begins with a declared one (``test_property_order`` looks at
    these), or its names come in an order of which the report says that it matters,
    or a string looks like a format of the schema that it does not have."""
    value = _whole(value)
    if not admitted(schema) or not valid(schema, json.dumps(value)):
        return
    event("a valid value")
    found = analysed(schema)
    assert found is not None, "no value fits, it says"
    compiled = schemas.compiled(found.grammar.ebnf)
    accepted = schemas.accepts_value(compiled, value)
    if not accepted and any(LASTS in one.why for one in found.report.keywords):
        event("the order matters")
        return
    if not accepted and _looks_like_a_format(value, _formats(schema)):
        event("it looks like a format")
        return
    assert accepted or _begins_with_a_name(schema, value), (value, found.grammar.ebnf)


def _formats(schema: Any) -> dict[str, str]:
    """Patterns of texts that look like a format, of the formats that a schema names."""
    text = json.dumps(schema)
    wide = ((name, one.wide) for name, one in FORMAT_PATTERNS.items() if json.dumps(name) in text)
    return {name: pattern for name, pattern in wide if pattern}


def _looks_like_a_format(value: Any, wide: dict[str, str]) -> bool:
    """Whether a text is excluded with a format that it does not have."""
    if isinstance(value, str):
        return any(
            compile_pattern(pattern, max_length=10_000).found(value) and not FORMATS[name](value)
            for name, pattern in wide.items()
        )
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(parts, list) and any(_looks_like_a_format(part, wide) for part in parts)


def _begins_with_a_name(schema: Any, value: Any) -> bool:
    """Whether an object has a name that begins with another one, which the schema declares or which
    one of its patterns matches."""
    text = json.dumps(schema)
    patterns = _patterns(schema)
    names = [
        name
        for name in schemas.NAMES
        if json.dumps(name) in text or any(re.search(pattern, name) for pattern in patterns)
    ]
    pending = [value]
    for part in pending:
        pending += (
            part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        )
        if isinstance(part, dict) and any(
            own != name and own.startswith(name) for own in part for name in names
        ):
            return True
    return False


def _patterns(schema: Any) -> set[str]:
    """Every pattern of ``patternProperties`` anywhere in the schema."""
    found: set[str] = set()
    pending = [schema]
    for part in pending:
        if isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
            declared = part.get("patternProperties")
            found.update(declared if isinstance(declared, dict) else ())
    return found


def _whole(value: Any) -> Any:
    """The value with 0 for 0.0, which is as valid; a grammar of integers has no points."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {name: _whole(member) for name, member in value.items()}
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole else value


def check(schema: Any, seed: int, values: Iterable[Any] = ()) -> None:
    """Both, for texts of the grammar, values near theirs, and further values."""
    grown = check_texts(schema, seed, 5)
    check_texts(schema, seed, 3, PropertyOrder.ANY)
    rng = random.Random(seed)
    near = [changed(value, rng) for value in grown[:3] for _ in range(4)]
    for value in [*near, *values]:
        check_value(schema, value)


def changed(value: Any, rng: random.Random) -> Any:
    """A value with one part of it changed, taken out or added."""
    holder = [copy.deepcopy(value)]
    containers: list[Any] = [holder]
    for one in containers:
        inner = one.values() if isinstance(one, dict) else one
        containers += [part for part in inner if isinstance(part, (dict, list))]
    container = rng.choice(containers)
    fresh = rng.choice((None, True, 0, 1, 2, 3, 1.5, "a", "b", "ab", "", [], [1], {}, {"a": 1}))
    keys = list(container if isinstance(container, dict) else range(len(container)))
    action = rng.randrange(3)
    if action == 0 and keys:
        container[rng.choice(keys)] = fresh
    elif action == 1 and keys and container is not holder:
        del container[rng.choice(keys)]
    elif isinstance(container, dict):
        container[rng.choice(schemas.NAMES)] = fresh
    elif container is not holder:
        container.insert(rng.randrange(len(container) + 1), fresh)
    return holder[0]


def _is_said(compiled: CheckedSchema, violation: Any, checked: set[str]) -> bool:
    """Whether the report names the keyword of a violation, one that applies it, or one that decides
    whether it is violated."""
    path = list(violation.absolute_schema_path)
    for passed, deciding in _ways(compiled.subschemas, compiled.subschemas.root, "", path):
        inside = {*passed[-1:], *_applied(compiled, deciding)}
        if not checked.isdisjoint(passed) or any(
            one == place or one.startswith(place + "/") for one in checked for place in inside
        ):
            return True
    return False


def _ways(
    places: Subschemas, part: Any, at: str, path: list[Any]
) -> Iterator[tuple[list[str], list[Any]]]:
    """Pointers along the library's path into a schema, from a part on, and what decides there.

    The path leaves out references and ``if``.
    """
    if not path:
        yield [], [part]
        return
    step, *rest = path
    if isinstance(part, dict):
        for keyword in _REFERENCES:
            target = places.targets.get((id(part), keyword))
            if target is not None:
                here = at + pointer((keyword,))
                for passed, deciding in _ways(
                    places, target, places.pointers.get(id(target), at), path
                ):
                    yield [here, *passed], deciding
    if step in part if isinstance(part, dict) else isinstance(part, list):
        here = at + pointer((step,))
        for passed, deciding in _ways(places, part[step], here, rest):
            yield [here, *passed], deciding


def _applied(compiled: CheckedSchema, part: Any) -> Iterator[str]:
    """Pointers of all subschemas in a part of a schema, and of those that they refer to."""
    places, seen, pending = compiled.subschemas, set(), [part]
    while pending:
        part = pending.pop()
        if id(part) in seen or not isinstance(part, (dict, list)):
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            if id(part) in places.pointers:
                yield places.pointers[id(part)]
            pending += [places.targets.get((id(part), keyword)) for keyword in _REFERENCES]
        pending += part.values() if isinstance(part, dict) else part
