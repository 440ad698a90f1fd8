"""The types of the intermediate representation.

A ``Document`` has numbered values. A value is a list of alternatives, each of one JSON type; parts of
objects and arrays refer to other values by number, so a value can contain itself.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

from service.schema_compiler.regex.dfa import Dfa
from service.schema_compiler.regex.syntax import Node

Reference = int
"""Number of a value in its document."""


# Sets of strings, without quotes and escapes


@dataclass(frozen=True, slots=True)
class AnyText:
    """Texts of ``minimum`` to ``maximum`` characters; maximum None: any number."""

    minimum: int = 0
    maximum: int | None = None


@dataclass(frozen=True, slots=True)
class OtherText:
    """Texts of a length within bounds that are none of ``texts`` and begin with none of ``prefixes``."""

    minimum: int
    maximum: int | None
    texts: frozenset[str]
    prefixes: frozenset[str]


@dataclass(frozen=True, slots=True)
class PrefixedText:
    """Texts that consist of ``prefix`` and a text of ``rest``."""

    prefix: str
    rest: AnyText | OtherText


@dataclass(frozen=True, slots=True)
class AcceptedText:
    """Texts that a minimal automaton accepts; it accepts at least one."""

    automaton: Dfa


@dataclass(frozen=True, slots=True)
class MatchedText:
    """Texts that a regular expression without assertions matches from end to end. At each character,
    a reader of the expression has one way to go on, or a few."""

    expression: Node


@dataclass(frozen=True, slots=True)
class ExpressionText:
    """Texts that are regular expressions themselves, in forms that are common. may_be_empty: whether the empty
    one is among them."""

    may_be_empty: bool = True


TextSet = AnyText | OtherText | PrefixedText | AcceptedText | MatchedText | ExpressionText


# Sets of numbers, as they are written


class Tail(enum.Enum):
    """The rest of a number behind the digits that an automaton has read."""

    NOTHING = enum.auto()
    DIGITS = enum.auto()
    """Any digits."""
    DIGITS_AND_FRACTION = enum.auto()
    """Any digits, and perhaps a point with digits."""
    FRACTION = enum.auto()
    """At least one digit of a fraction."""
    MORE_FRACTION = enum.auto()
    """Any further digits of a fraction."""


@dataclass(frozen=True, slots=True)
class DigitState:
    """A state of an automaton over digits and the point.

    tail: the text with which a number can end here; None: no number ends here. edges: characters, and
    the state to which they lead.
    """

    tail: Tail | None
    edges: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Digits:
    """Numbers that an acyclic automaton reads. unsigned, negative: its first state for numbers without
    a sign, and for those with one behind it; None: there are none."""

    states: tuple[DigitState, ...]
    unsigned: int | None
    negative: int | None


class Suffix(enum.Enum):
    """What can follow the digits of a number."""

    EXPONENT = enum.auto()
    """Perhaps an exponent."""
    ZERO_FRACTION = enum.auto()
    """A point with zeros."""


@dataclass(frozen=True, slots=True)
class WithSuffix:
    """Numbers of a set, each followed by a suffix or by a number of zeros."""

    numbers: NumberSet
    suffix: Suffix | int


@dataclass(frozen=True, slots=True)
class Zero:
    """The number 0."""


@dataclass(frozen=True, slots=True)
class Scientific:
    """Numbers with an exponent as Python writes them: ``small`` ones below 0.0001, else from 10**16."""

    small: bool
    negative: bool


@dataclass(frozen=True, slots=True)
class AnyNumber:
    """Numbers of any of several sets, at least two."""

    sets: tuple[NumberSet, ...]


NumberSet = Digits | WithSuffix | Zero | Scientific | AnyNumber


# Alternatives of a value


@dataclass(frozen=True, slots=True)
class Constant:
    """One JSON text, such as ``null`` or ``"red"``."""

    text: str


@dataclass(frozen=True, slots=True)
class String:
    """JSON strings.

    shortest: characters of a shortest one as JSON, never underestimated. minimum, maximum: bounds on the
    number of characters, which ``texts`` may leave out; maximum None: any number. minimum_by,
    maximum_by: JSON pointers of the keywords behind a bound that ``texts`` leaves to the decoder; empty
    for a bound that it has. automaton: of the texts where the decoder has to know how many characters
    they need to end.
    """

    texts: TextSet
    shortest: int = 2
    minimum: int = 0
    maximum: int | None = None
    minimum_by: tuple[str, ...] = field(default=(), compare=False)
    maximum_by: tuple[str, ...] = field(default=(), compare=False)
    automaton: Dfa | None = None

    @property
    def is_limited(self) -> bool:
        """Whether the decoder has to keep a bound."""
        return bool(self.minimum_by or self.maximum_by)


@dataclass(frozen=True, slots=True)
class Number:
    """JSON numbers."""

    numbers: NumberSet


@dataclass(frozen=True, slots=True)
class PropertyValue:
    """A value that a property can have. meets: the obligations of the object that it meets, as bits."""

    value: Reference
    meets: int = 0


@dataclass(frozen=True, slots=True)
class Property:
    """A declared property. values: the value is one of them."""

    name: str
    required: bool
    values: tuple[PropertyValue, ...]


@dataclass(frozen=True, slots=True)
class NameSet:
    """Names of additional properties of one kind.

    A model that has begun to write a declared name could only be stopped at its last quote, and would
    go on with letters that nobody meant. So an additional name begins with a declared one only where
    that one may be written as well.

    apart: names that may be written everywhere; None: there are none. In the declared order they begin
    with no declared name. In any order, declared names may be written everywhere, so these are all other
    names, where one automaton can tell them. extending: names that begin with a declared one and are longer,
    by the longest such. They may be written where that one, and each declared name with which it begins,
    may be written.

    maximum: of the characters of all of them, which the decoder keeps; maximum_by: JSON pointers of the
    keywords behind it, empty where the grammar has all that is said of lengths. None with pointers: the
    decoder would have to keep it of some of the names only.
    """

    apart: TextSet | None
    extending: Mapping[str, TextSet] = field(default_factory=dict)
    maximum: int | None = None
    maximum_by: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class AdditionalProperties:
    """Properties whose names are of one kind. values: the value is one of them."""

    names: NameSet
    values: tuple[PropertyValue, ...]

    @property
    def can_meet(self) -> int:
        """The obligations that one of the values meets."""
        return reduce(or_, (value.meets for value in self.values), 0)


@dataclass(frozen=True, slots=True)
class AnyOrder:
    """How the declared properties of an object may come that keep no order.

    A grammar has a state for each set of properties that are there, as far as it tells these apart: the
    required ones, or all of them. A declared property may come again where its set does not tell, or
    where additional ones may come.

    all_told: whether all properties are told apart, not only the required ones. ahead: how many places a
    required property may come before its turn in one of the ``orders``, which are of the names that are
    told apart.
    """

    all_told: bool
    ahead: int
    orders: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Object:
    """JSON objects.

    properties: the declared ones, in order. additional: may stand between them, any number of each.
    minimum, maximum: number of properties; maximum None: any number. obligations: how many there are;
    each must be met by at least one property. any_order: None: the declared properties keep their order.

    lasting: obligations, as bits, that an additional property meets by its value. Another one may repeat its
    name, and only the last one counts. So once such an obligation is met, each additional property of a
    kind that can meet it has to meet it. lasting_by: JSON pointers of the keywords behind them.
    """

    properties: tuple[Property, ...]
    additional: tuple[AdditionalProperties, ...] = ()
    minimum: int = 0
    maximum: int | None = None
    obligations: int = 0
    any_order: AnyOrder | None = None
    lasting: int = 0
    lasting_by: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Array:
    """JSON arrays: first items by position, then the others.

    rest: value of the others; None: there are none. minimum, maximum: number of items; maximum None:
    any number.
    """

    prefix: tuple[Reference, ...]
    rest: Reference | None
    minimum: int = 0
    maximum: int | None = None


@dataclass(frozen=True, slots=True)
class ItemCount:
    """So many items have to be of some kind. maximum None: any number."""

    minimum: int
    maximum: int | None

    @property
    def cap(self) -> int:
        """The number from which on counting makes no difference."""
        return self.minimum if self.maximum is None else self.maximum


@dataclass(frozen=True, slots=True)
class ItemValue:
    """A value that an item can have. counts_for: indices of the counts to which it adds one."""

    value: Reference
    counts_for: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CountedArray:
    """JSON arrays whose items are counted by kind.

    items: by position the values that an item can have; the last entry is for all further positions.
    """

    items: tuple[tuple[ItemValue, ...], ...]
    counts: tuple[ItemCount, ...]
    minimum: int = 0
    maximum: int | None = None

    @property
    def positions(self) -> int:
        """The position from which on all positions are alike."""
        if self.maximum is not None:
            return self.maximum
        return max(len(self.items) - 1, self.minimum, 1)


@dataclass(frozen=True, slots=True)
class DistinctArray:
    """JSON arrays of different items out of a few. texts: of the items, as JSON."""

    texts: tuple[str, ...]
    minimum: int = 0
    maximum: int | None = None


Alternative = Constant | String | Number | Object | Array | CountedArray | DistinctArray


@dataclass(frozen=True, slots=True)
class Document:
    """The values that a schema allows. root: the value of a whole text. values: by number."""

    root: Reference
    values: Mapping[Reference, tuple[Alternative, ...]]


def references(alternative: Alternative) -> list[Reference]:
    """The values that an alternative refers to, in the order in which they are written."""
    if isinstance(alternative, Object):
        found = [value.value for prop in alternative.properties for value in prop.values]
        return found + [value.value for kind in alternative.additional for value in kind.values]
    if isinstance(alternative, CountedArray):
        return [value.value for values in alternative.items for value in values]
    if isinstance(alternative, Array):
        rest = [] if alternative.rest is None else [alternative.rest]
        return [*alternative.prefix, *rest]
    return []


def names_by_position(
    properties: tuple[Property, ...], names: NameSet
) -> tuple[list[TextSet], dict[int, list[TextSet]]]:
    """Extending names: those that may stand anywhere, and the others by the last position where they
    may begin to stand. A position is the number of the declared property that comes next at the
    earliest.

    A name that extends declared ones may stand only while all of these can still come next.
    """
    last = len(properties)
    reaches = [last - 1] * (last + 1)  # the last property that may come next
    for i in range(last - 1, -1, -1):
        reaches[i] = i if properties[i].required else reaches[i + 1]
    positions = {one.name: i for i, one in enumerate(properties)}
    anywhere: list[TextSet] = []
    found: dict[int, list[TextSet]] = {}
    for name, texts in names.extending.items():
        extended = [positions[one] for one in beginnings(name) if one in positions]
        if not extended:
            anywhere.append(texts)
        elif max(extended) <= reaches[min(extended)]:
            found.setdefault(min(extended), []).append(texts)
    return anywhere, found


def beginnings(name: str) -> Iterator[str]:
    """All texts with which a name begins, but the empty one, and the name."""
    return (name[:size] for size in range(1, len(name) + 1))
