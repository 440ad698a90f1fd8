"""The declared dependencies are exactly what the code imports, and every one of them is pinned."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OURS = {"service", "lmdeploy_ext"}
NAMESPACES = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}
"""Packages that share the top-level name ``google``."""


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> dict[str, Requirement]:
    found = [Requirement(text) for text in project()["dependencies"]]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def foreign_modules() -> set[str]:
    """Full names of the modules of others that our code imports, also inside functions."""
    names: set[str] = set()
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module)
    known = sys.stdlib_module_names | OURS
    return {name for name in names if name.partition(".")[0] not in known}


@cache
def distributions() -> dict[str, list[str]]:
    """Top-level module -> the distributions that it belongs to."""
    return dict(packages_distributions())


def distribution(module: str) -> str:
    """Name of the distribution that a module belongs to."""
    for prefix, name in NAMESPACES.items():
        if module == prefix or module.startswith(prefix + "."):
            return name
    names = {canonicalize_name(n) for n in distributions()[module.partition(".")[0]]}
    assert len(names) == 1, f"{module} could be of {names}"
    return names.pop()


def test_declared_is_what_is_imported() -> None:
    imported = {distribution(module) for module in foreign_modules()}
    assert {"grpcio", "jsonschema", "torch"} <= imported
    assert imported == declared().keys()


def test_every_dependency_has_a_lower_bound() -> None:
    for name, requirement in declared().items():
        assert any(part.operator == ">=" for part in requirement.specifier), name


@pytest.mark.parametrize("extra", ["", "dev"])
def test_every_dependency_is_pinned_within_its_range(extra: str) -> None:
    texts = project()["optional-dependencies"][extra] if extra else project()["dependencies"]
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
            pins.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    for requirement in map(Requirement, texts):
        versions = pins.get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement.name} has no pin"
        assert all(requirement.specifier.contains(version) for version in versions), requirement
