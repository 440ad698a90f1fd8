"""Changes to LMDeploy as records: the change, its reason, and the condition for its removal.

A `Patch` replaces one attribute, an `Entry` adds one key to a dict or an mmengine registry.
`apply_all` checks every record against the installed LMDeploy before it changes anything, and
`revert_all` undoes all changes. `lmdeploy_ext.patches` lists the records; this module does not
depend on LMDeploy.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

logger = logging.getLogger("lmdeploy_ext")

Undo = Callable[[], None]


class ExtensionError(RuntimeError):
    """The extension cannot be installed; the message says why and what to do. LMDeploy is
    unchanged."""


class HostDrift(ExtensionError):
    """The installed LMDeploy differs from the versions that the extension supports.

    Attributes:
        problems: one sentence for each difference.
    """

    def __init__(self, problems: Sequence[str], remedy: str = "") -> None:
        self.problems = tuple(problems)
        lines = ["LMDeploy is not what this extension was written for; nothing was changed:"]
        lines += [f"  - {problem}" for problem in self.problems]
        super().__init__("\n".join([*lines, remedy] if remedy else lines))


class Record(Protocol):
    """One intrusion."""

    @property
    def name(self) -> str:
        """A short, unique name for the log."""

    @property
    def target(self) -> str:
        """``module:attribute.attribute``."""

    @property
    def why(self) -> str:
        """The reason: what does not work without the record."""

    @property
    def remove_when(self) -> str:
        """The upstream change after which the record can be removed."""

    def problem(self) -> str | None:
        """The reason why the record cannot be applied; None if it can. Changes nothing."""

    def apply(self) -> Undo:
        """Make the change; returns a function that undoes it."""


def by(module: str, name: str) -> Callable[[Any], Any]:
    """What replaces a function: the result of the function ``name`` of a module for it. The module is
    imported when the record is applied."""

    def replace(original: Any) -> Any:
        return getattr(importlib.import_module(module), name)(original)

    return replace


@dataclass(frozen=True)
class Patch:
    """Replaces an attribute of a module or a class.

    Attributes:
        signature: parameters of the replaced function, without annotations, as in ``"(self,
        multimodal, *, limit=4)"``. None for a value that is not a function. replace: takes the
        original and returns the replacement. For a static or class method, both are the plain
        function; for a property, both are the getter. The kind of attribute does not change. own:
        the class itself must define the function, not a base class.
    """

    name: str
    target: str
    why: str
    remove_when: str
    replace: Callable[[Any], Any]
    signature: str | None = None
    own: bool = False

    def problem(self) -> str | None:
        return drift(self.target, self.signature, self.own)

    def apply(self) -> Undo:
        owner, attribute = _locate(self.target)
        original = inspect.getattr_static(owner, attribute)
        own = attribute in vars(owner)
        setattr(owner, attribute, _rewrap(original, self.replace(_unwrap(original))))

        def undo() -> None:
            if own:
                setattr(owner, attribute, original)
            else:  # it was inherited: a copy would hide later changes of the base class
                delattr(owner, attribute)

        return undo


@dataclass(frozen=True)
class Entry:
    """Adds a key to a dict or to an mmengine ``Registry``.

    Attributes:
        value: returns the value; called when the record is applied, so it may import LMDeploy.
    """

    name: str
    target: str
    key: str
    value: Callable[[], Any]
    why: str
    remove_when: str

    def problem(self) -> str | None:
        found = drift(self.target)
        if found is not None:
            return found
        entries = self._entries()
        if not isinstance(entries, dict):
            return f"{self.target} is neither a dict nor a registry"
        return f"{self.target} already has {self.key!r}" if self.key in entries else None

    def apply(self) -> Undo:
        entries = self._entries()
        entries[self.key] = self.value()

        def undo() -> None:
            entries.pop(self.key, None)

        return undo

    def _entries(self) -> Any:
        owner, attribute = _locate(self.target)
        found = getattr(owner, attribute)
        return getattr(found, "module_dict", found)


_lock = threading.RLock()
_applied: dict[str, Undo] = {}


def applied() -> tuple[str, ...]:
    """Names of the applied records, in the order of their application."""
    return tuple(_applied)


def apply_all(records: Sequence[Record], remedy: str = "", found: Sequence[str] = ()) -> None:
    """Apply every record that is not applied yet, or none.

    Args:
        remedy: advice for the user; the end of the error message.
        found: other known problems, which are raised together with those of the records.

    Raises:
        HostDrift: a target is missing, has another signature or already has the key. One error
        names all problems, each once.
    """
    names = [record.name for record in records]
    if len(set(names)) != len(names):
        raise ValueError(f"two records have one name: {names}")
    with _lock:
        new = [record for record in records if record.name not in _applied]
        problems = _problems(new, found)
        if problems:
            raise HostDrift(problems, remedy)
        done: list[str] = []
        try:
            for record in new:
                _applied[record.name] = record.apply()
                done.append(record.name)
        except BaseException:
            _revert(reversed(done))
            raise
        for record in new:
            logger.info("LMDeploy: %s (%s)", record.name, record.target)


def _problems(records: Sequence[Record], found: Sequence[str]) -> list[str]:
    needed_by: dict[str, list[str]] = {problem: [] for problem in found}
    for record in records:
        problem = record.problem()
        if problem is not None:
            needed_by.setdefault(problem, []).append(record.name)
    return [
        f"{problem}; needed by: {', '.join(names)}" if names else problem
        for problem, names in needed_by.items()
    ]


def revert_all() -> None:
    """Undo every applied record, in reverse order."""
    with _lock:
        _revert(reversed(list(_applied)))


def _revert(names: Iterator[str]) -> None:
    for name in names:
        _applied.pop(name)()


def drift(target: str, signature: str | None = None, own: bool = False) -> str | None:
    """The problem with ``module:attribute`` in one sentence; None if it exists as expected.

    Args:
        signature: as in `Patch`; None if the attribute only has to exist.
        own: a function with a signature must be defined in the named class, not in a base class.
    """
    try:
        owner, attribute = _locate(target)
        if signature is None:
            getattr(owner, attribute)  # also finds members of enums
            return None
        found = vars(owner).get(attribute) if own else inspect.getattr_static(owner, attribute)
        if found is None:
            raise AttributeError(f"{owner.__name__} does not define it")
        function = _unwrap(found)
    except (ImportError, AttributeError) as error:
        return f"{target} does not exist ({error})"
    if not callable(function):
        return f"{target} is no longer a function"
    actual = plain_signature(function)
    return None if actual == signature else f"{target} takes {actual}, not {signature}"


def plain_signature(function: Callable[..., Any]) -> str:
    """Parameters of a function without annotations: ``"(self, x, *, y=1)"``."""
    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def _locate(target: str) -> tuple[Any, str]:
    """The object with the attribute, and the attribute's name."""
    module, _, path = target.partition(":")
    *parents, attribute = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, attribute


def _unwrap(found: Any) -> Any:
    if isinstance(found, staticmethod | classmethod):
        return found.__func__
    if isinstance(found, property):
        return found.fget
    return found


def _rewrap(original: Any, replacement: Any) -> Any:
    """Wrap the replacement as the same kind of attribute as the original."""
    if isinstance(original, staticmethod | classmethod):
        return type(original)(replacement)
    if isinstance(original, property):
        return property(replacement, original.fset, original.fdel, original.__doc__)
    return replacement
