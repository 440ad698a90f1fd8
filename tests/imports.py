"""Reads from the source who imports whom; ``tests/test_boundaries.py`` says who may."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

Sources = Mapping[str, str]
"""Text of every module by its path in the repository: ``service/tasks/files.py``."""


def sources_of(root: Path, *packages: str) -> dict[str, str]:
    """The modules of packages, without generated code."""
    found = (path for package in packages for path in sorted((root / package).rglob("*.py")))
    paths = (path for path in found if "pb" not in path.relative_to(root).parts)
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def _names_of(node: ast.AST) -> Iterator[str]:
    """The module names of an import statement; of ``from a import b`` both ``a`` and ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports(text: str) -> frozenset[str]:
    """Every module name that a module imports, also inside functions and under TYPE_CHECKING."""
    return frozenset(name for node in ast.walk(_tree(text)) for name in _names_of(node))


def _functions(text: str) -> Iterator[ast.AST]:
    for node in ast.walk(_tree(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _type_checking(text: str) -> Iterator[ast.AST]:
    for node in ast.walk(_tree(text)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield node


@cache
def imports_at_module_level(text: str) -> frozenset[str]:
    """What is imported when the module is: not inside functions, not for type checkers alone."""
    later = {
        id(one) for scope in (*_functions(text), *_type_checking(text)) for one in ast.walk(scope)
    }
    found = (node for node in ast.walk(_tree(text)) if id(node) not in later)
    return frozenset(name for node in found for name in _names_of(node))


@cache
def imports_inside_functions(text: str) -> bool:
    return any(list(_names_of(node)) for scope in _functions(text) for node in ast.walk(scope))


def below(file: str, *folders: str) -> bool:
    """Whether a path is one of the others or below it."""
    return any(file == folder or file.startswith(f"{folder}/") for folder in folders)


def importers(sources: Sources, package: str, *prefixes: str) -> set[str]:
    """The modules of a package that import one of the prefixes."""
    return {
        file
        for file, text in sources.items()
        if below(file, package)
        and any(name == p or name.startswith(p + ".") for name in imports(text) for p in prefixes)
    }


def deferring(sources: Sources) -> set[str]:
    """The modules that import inside functions."""
    return {file for file, text in sources.items() if imports_inside_functions(text)}


def unit_of(file: str) -> str:
    """The first part below ``service/``: ``service/tasks/files.py`` is of ``tasks``."""
    return file.split("/")[1].removesuffix(".py")


def directions(sources: Sources, unit: str) -> dict[str, list[str]]:
    """The other units of the service that a unit imports, and in which modules."""
    found: dict[str, list[str]] = {}
    for file, text in sources.items():
        if below(file, "service") and unit_of(file) == unit:
            names = {name.split(".")[1] for name in imports(text) if name.startswith("service.")}
            for other in names - {unit, "__version__"}:
                found.setdefault(other, []).append(file)
    return found


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def cycle(sources: Sources) -> list[str]:
    """Modules that import each other at module level, in a circle; empty where none do."""
    files = {module_name(file): text for file, text in sources.items()}
    graph: dict[str, set[str]] = {}
    for name, text in files.items():
        found = imports_at_module_level(text) & files.keys()
        # A module inside a package imports its neighbours by the name of the package.
        graph[name] = {one for one in found if not f"{name}.".startswith(f"{one}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
