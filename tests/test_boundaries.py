"""Who may import whom: read from the source, and checked in a fresh interpreter for what must stay light.

``ARCHITECTURE.md`` shows the same directions.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from docs.generate import ARCHITECTURE, architecture_page

ROOT = Path(__file__).parents[1]

VALUES = {"types", "errors"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "error_table": {"errors"},
    "observation": {*VALUES, "error_table"},
    "deadlines": set(),
    "logs": set(),
    "web": set(),
    "compile_errors": VALUES,
    "engine": {"types"},
    "metrics": {"types", "error_table", "observation"},
    "lifecycle": {"errors"},
    "heartbeat": {*VALUES, "engine", "lifecycle", "logs", "settings"},
    "schema_compiler": VALUES,
    "structured_output": {*VALUES, "schema_compiler", "engine", "deadlines", "logs", "metrics", "compile_errors"},
    "tasks": {*VALUES, "schema_compiler", "structured_output"},
    "engines": {*VALUES, "engine", "metrics", "compile_errors"},
    "settings": {"engines"},
    "quotas": set(),
    "auth": {"errors", "quotas", "settings"},
    "inference": {
        *VALUES, "tasks", "structured_output", "schema_compiler", "engine", "deadlines", "logs", "settings",
        "quotas", "observation",
    },
    "runtime": {
        "errors", "auth", "inference", "tasks", "structured_output", "engine", "settings", "lifecycle", "heartbeat",
        "logs", "metrics", "observation",
    },
    "grpc_api": {
        *VALUES, "error_table", "runtime", "inference", "tasks", "structured_output", "schema_compiler", "engine",
        "settings", "lifecycle", "logs", "auth", "quotas", "deadlines", "observation", "metrics",
    },
}  # fmt: skip
"""Module or package below ``service/`` -> what it may import of the service. The command line, the
wiring and the client are the outer layer and may import everything."""

OUTER = {"__main__", "cli", "client", "wiring", "pb"}
REGISTRY = {"service.engines.kind", "service.engines.registry"}

DEFERRED = {
    "service/cli": "the command line answers --help without loading what a command needs",
    "service/engines": "torch, LMDeploy and the hub are imported when an engine starts",
    "service/schema_compiler/regexes.py": "look-aheads need automata, which ask the matcher for sets",
    "service/structured_output/trial.py": "xgrammar is imported by the process that may crash",
    "service/structured_output/worker.py": "the process tells that it is there before it imports",
    "lmdeploy_ext": "LMDeploy and torch are imported when the extension is installed or used",
}
"""Where imports stand inside functions, and why."""


def modules(package: str) -> Iterator[Path]:
    yield from sorted(
        path for path in (ROOT / package).rglob("*.py") if "pb" not in path.relative_to(ROOT).parts
    )


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def names_of(node: ast.AST) -> Iterator[str]:
    """The module names of an import statement; of ``from a import b`` both ``a`` and ``a.b``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> set[str]:
    """Every module name that the file imports, also inside functions and under TYPE_CHECKING."""
    return {name for node in ast.walk(tree(path)) for name in names_of(node)}


def functions(path: Path) -> Iterator[ast.AST]:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def type_checking(path: Path) -> Iterator[ast.AST]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield node


def imports_at_module_level(path: Path) -> set[str]:
    """What is imported when the module is: not inside functions, not for type checkers alone."""
    later = {
        id(one) for scope in (*functions(path), *type_checking(path)) for one in ast.walk(scope)
    }
    found = (node for node in ast.walk(tree(path)) if id(node) not in later)
    return {name for node in found for name in names_of(node)}


def importers(package: str, *prefixes: str) -> set[str]:
    """The files of a package that import one of the prefixes, relative to the repository."""
    return {
        str(path.relative_to(ROOT))
        for path in modules(package)
        if any(name == p or name.startswith(p + ".") for name in imports(path) for p in prefixes)
    }


def within(found: set[str], *allowed: str) -> bool:
    return all(any(name == a or name.startswith(a + "/") for a in allowed) for name in found)


def unit_of(path: Path) -> str:
    """The first part below ``service/``: ``service/tasks/files.py`` is of ``tasks``."""
    return path.relative_to(ROOT / "service").parts[0].removesuffix(".py")


def units_imported(path: Path) -> set[str]:
    """The units of the service that a file imports, without its own."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("service.")}
    return {unit for unit in found if unit != unit_of(path) and unit != "__version__"}


def test_the_scan_sees_imports() -> None:
    assert "service/engine.py" in importers("service", "service.types")


def test_every_unit_has_its_directions() -> None:
    units = {unit_of(path) for path in modules("service")} - {"__init__"}
    assert units == ALLOWED.keys() | (OUTER - {"pb"})


def test_the_architecture_page_shows_the_directions() -> None:
    shown = ARCHITECTURE.read_text(encoding="utf-8") == architecture_page(ALLOWED)
    assert shown, (
        "the table in ARCHITECTURE.md is out of date: run `make docs` (python -m docs.generate)"
    )


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/extending.md"])
def test_the_pages_name_files_that_exist(page: str) -> None:
    """So whoever moves a module corrects the page that sends a newcomer to it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(\.?\w[\w.-]*/[\w./-]*)`", text))
    assert len(named) > 5
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("unit", ALLOWED)
def test_directions(unit: str) -> None:
    """No arrow that is not allowed, and no allowance that nothing uses."""
    found: dict[str, list[str]] = {}
    for path in modules("service"):
        if unit_of(path) == unit:
            for other in units_imported(path) - {"pb"}:
                found.setdefault(other, []).append(path.name)
    assert found.keys() == ALLOWED[unit], found


def test_no_cycles_at_module_level() -> None:
    graph: dict[str, set[str]] = {}
    for package in ("service", "lmdeploy_ext"):
        files = {module_name(path): path for path in modules(package)}
        for name, path in files.items():
            found = imports_at_module_level(path) & files.keys()
            # A module inside a package imports its neighbours by the name of the package.
            graph[name] = {one for one in found if not f"{name}.".startswith(f"{one}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_inside_functions_have_a_reason() -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in ("service", "lmdeploy_ext")
        for path in modules(package)
        if any(list(names_of(node)) for scope in functions(path) for node in ast.walk(scope))
    }
    assert within(found, *DEFERRED), found
    unused = {
        place
        for place in DEFERRED
        if not any(one == place or one.startswith(f"{place}/") for one in found)
    }
    assert unused == set()


def test_front_ends_know_no_engine_and_not_each_other() -> None:
    fronts = [path.name for path in (ROOT / "service").glob("*_api")]
    assert "grpc_api" in fronts
    for front in fronts:
        others = [f"service.{one}" for one in fronts if one != front]
        assert importers(f"service/{front}", "service.engines", *others) == set()


def test_the_extension_never_imports_the_service() -> None:
    assert importers("lmdeploy_ext", "service") == set()


def test_only_the_lmdeploy_engine_imports_lmdeploy() -> None:
    assert within(importers("service", "lmdeploy"), "service/engines/lmdeploy")


def test_only_engines_import_the_extension() -> None:
    assert within(importers("service", "lmdeploy_ext"), "service/engines")


def test_only_engines_import_torch_and_transformers() -> None:
    assert within(importers("service", "torch", "transformers", "tokenizers"), "service/engines")


def test_xgrammar_runs_in_engines_and_in_processes_that_can_be_killed() -> None:
    trial = "service/structured_output/trial.py"
    assert within(importers("service", "xgrammar"), "service/engines", trial)
    assert importers("service", "service.structured_output.trial") == {
        "service/structured_output/worker.py"
    }


def test_only_the_wiring_picks_an_engine() -> None:
    found = importers("service", "service.engines")
    assert within(found, "service/engines", "service/wiring.py", "service/settings.py"), found
    known = {one for one in imports(ROOT / "service/settings.py") if "service.engines" in one}
    assert {one.rpartition(".")[0] for one in known if one.count(".") == 3} == REGISTRY


def test_generated_code_stays_at_the_edge() -> None:
    found = importers("service", "service.pb")
    assert "service/grpc_api/codec.py" in found
    assert within(found, "service/grpc_api", "service/client.py", "service/cli"), found


def test_encoder_and_packing_stand_alone() -> None:
    allowed = {"torch", "timm", "numpy", "safetensors", "lmdeploy_ext"}
    files = [*modules("lmdeploy_ext/encoder"), ROOT / "lmdeploy_ext/mrope.py"]
    for path in files:
        foreign = {
            name.partition(".")[0]
            for name in imports(path)
            if name.partition(".")[0] not in sys.stdlib_module_names
        }
        assert foreign <= allowed, f"{path}: {foreign - allowed}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lmdeploy_ext", ("torch", "timm", "transformers", "lmdeploy", "numpy")),
        ("lmdeploy_ext.families", ("torch", "timm", "transformers", "lmdeploy", "numpy")),
        ("lmdeploy_ext.mrope", ("torch", "timm", "transformers", "lmdeploy")),
        ("lmdeploy_ext.packing", ("torch", "timm", "transformers", "lmdeploy")),
        ("service", ("torch", "grpc", "transformers", "lmdeploy", "numpy")),
        ("service.errors", ("torch", "grpc", "transformers", "lmdeploy", "numpy")),
        ("service.grpc_api.server", ("torch", "transformers", "lmdeploy")),
        ("service.runtime", ("torch", "transformers", "lmdeploy", "grpc")),
        ("service.wiring", ("torch", "transformers", "lmdeploy", "grpc")),
        ("service.engines.registry", ("torch", "transformers", "lmdeploy", "grpc")),
        (
            "service.schema_compiler.analysis",
            ("torch", "grpc", "transformers", "lmdeploy", "xgrammar"),
        ),
        ("service.__main__", ("torch", "transformers", "lmdeploy")),
    ],
)
def test_imports_stay_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
