"""The tasks of a server by name: built in, from Python packages, and from an operator's folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from service.errors import GrammarError, UnknownTask
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.structured_output.analyser import Analyser
from service.tasks.contract import Task
from service.tasks.files import NAME, load_tasks
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.types import PropertyOrder

ENTRY_POINTS = "qwen3vl.tasks"
"""Group of entry points; each names a ``Task``, or a function without arguments that returns
one."""


class TaskSourceError(ValueError):
    """Some tasks of the operator cannot be used. The message lists every problem, one per line."""


class Registry:
    """Tasks by name; immutable."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = {task.name: task for task in tasks}

    def get(self, name: str) -> Task:
        """The task of this name. Raises ``UnknownTask``, which suggests similar names, or lists all
        names."""
        task = self._tasks.get(name)
        if task is not None:
            return task
        close = difflib.get_close_matches(name[:100], self._tasks, n=3)
        known = ", ".join(close or sorted(self._tasks))
        hint = f"Did you mean: {known}?" if close else f"Known tasks: {known}."
        raise UnknownTask(f"No task of this name. {hint}", metadata={"known": known})

    def list(self) -> tuple[Task, ...]:
        """All tasks in the order of their names."""
        return tuple(self._tasks[name] for name in sorted(self._tasks))


def load_registry(
    tasks_dir: Path | None,
    limits: SchemaLimits = DEFAULT_LIMITS,
    property_order: PropertyOrder = PropertyOrder.DECLARED,
    close_objects: bool = False,
) -> Registry:
    """All tasks of this server, with analysed grammars. Raises one ``TaskSourceError`` with all
    problems.

    property_order, close_objects: defaults for tasks that do not set them.
    """
    found: list[tuple[str, Task]] = [("built in", IMAGE_ANALYSIS)]
    problems: list[str] = []
    for loaded in (_load_entry_points(), load_tasks(tasks_dir) if tasks_dir else ([], [])):
        found += loaded[0]
        problems += loaded[1]
    tasks: list[Task] = []
    origins: dict[str, str] = {}
    for origin, task in found:
        try:
            tasks.append(_analysed(task, limits, property_order, close_objects))
        except GrammarError as error:
            problems.append(f"{origin}: {_problem(error)}")
        if task.name in origins:
            other = origins[task.name]
            problems.append(f"{origin}: name: {task.name} is already the name of a task ({other})")
        origins.setdefault(task.name, origin)
    if problems:
        raise TaskSourceError("Tasks cannot be loaded:\n" + "\n".join(f"  {p}" for p in problems))
    return Registry(tasks)


async def try_grammars(registry: Registry, analyser: Analyser, limits: SchemaLimits) -> None:
    """Compile the grammars of all tasks in the grammar workers. Raises one ``TaskSourceError`` with
    every failure; syntax errors of EBNF are only found here."""
    problems: list[str] = []
    for task in registry.list():
        if task.grammar is not None:
            try:
                await analyser(replace(task.grammar, ebnf=""), limits)
                if task.counted is not None:
                    await analyser(replace(task.counted.grammar, ebnf=""), limits)
            except GrammarError as error:
                problems.append(f"{task.name}: {_problem(error)}")
    if problems:
        raise TaskSourceError("Tasks cannot be used:\n" + "\n".join(f"  {p}" for p in problems))


def _analysed(
    task: Task, limits: SchemaLimits, property_order: PropertyOrder, close_objects: bool
) -> Task:
    if task.grammar is None:
        return task
    asked = task.grammar.with_defaults(property_order, close_objects, lengths_beside=True)
    found = analyse(asked, limits)
    counted = None
    if found.grammar.lengths:
        counted = analyse(replace(asked, lengths_beside=False), limits)
    return replace(task, grammar=found.grammar, report=found.report, counted=counted)


def _problem(error: GrammarError) -> str:
    """The error with the key of the task file (``choice[1]``) instead of the path in a message."""
    violation = error.violations[0]
    key = violation.field.removeprefix("grammar.").replace(".options", "")
    return f"{key}: {violation.description}"


def _load_entry_points() -> tuple[list[tuple[str, Task]], list[str]]:
    found: list[tuple[str, Task]] = []
    problems: list[str] = []
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        loaded = _load_entry_point(entry)
        if isinstance(loaded, Task):
            found.append((f"entry point {entry.name}", loaded))
        else:
            problems.append(f"entry point {entry.name}: {loaded}")
    return found, problems


def _load_entry_point(entry: EntryPoint) -> Task | str:
    """The task, or a description of the problem. Third-party code may raise any exception; the
    start-up error then names the entry point."""
    try:
        loaded = entry.load()
        task = loaded() if callable(loaded) else loaded
    except Exception as error:
        return f"cannot be loaded: {type(error).__name__}: {error}"
    if not isinstance(task, Task):
        return f"is a {type(task).__name__}, not a Task or a function that returns one"
    if not NAME.fullmatch(task.name):
        return f"name: {task.name!r} does not match {NAME.pattern}"
    if not task.user.strip():
        return "user: is empty"
    return task
