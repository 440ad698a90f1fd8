"""Who may import whom: read from the source, and checked in a fresh interpreter for what must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(package: str) -> Iterator[Path]:
    yield from sorted(
        path for path in (ROOT / package).rglob("*.py") if "pb" not in path.relative_to(ROOT).parts
    )


def imports(path: Path) -> set[str]:
    """Every module name that the file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def importers(package: str, *prefixes: str) -> set[str]:
    """The files of a package that import one of the prefixes, relative to the repository."""
    return {
        str(path.relative_to(ROOT))
        for path in modules(package)
        if any(name == p or name.startswith(p + ".") for name in imports(path) for p in prefixes)
    }


def within(found: set[str], *allowed: str) -> bool:
    return all(any(name == a or name.startswith(a + "/") for a in allowed) for name in found)


def test_the_scan_sees_imports() -> None:
    assert "service/engine.py" in importers("service", "service.types")


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
    assert {one.rpartition(".")[0] for one in known if one.count(".") == 3} == {
        "service.engines.kind",
        "service.engines.registry",
    }


def test_generated_code_stays_at_the_edge() -> None:
    edge = (
        "service/grpc_api/codec.py",
        "service/grpc_api/grammar_codec.py",
        "service/grpc_api/conversation_codec.py",
        "service/grpc_api/image_codec.py",
        "service/grpc_api/servicer.py",
        "service/grpc_api/server.py",
        "service/grpc_api/interceptors.py",
        "service/client.py",
        "service/cli",
        "service/engines/fake.py",
    )
    found = importers("service", "service.pb")
    assert "service/grpc_api/codec.py" in found
    assert within(found, *edge[:-1]), found


def test_values_and_errors_know_neither_proto_nor_engines() -> None:
    for name in ("types.py", "errors.py"):
        names = imports(ROOT / "service" / name)
        assert not any(n.startswith(("service.pb", "service.engines", "torch")) for n in names)


def test_tasks_know_neither_proto_nor_engines() -> None:
    assert (
        importers("service/tasks", "service.pb", "service.engines", "service.grpc_api.servicer")
        == set()
    )


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


def test_the_light_client_needs_grpc_alone() -> None:
    files = list((ROOT / "clients/python/qwen3vl").glob("*.py"))
    assert {path.name for path in files} == {"__init__.py", "client.py"}
    roots = {name.partition(".")[0] for path in files for name in imports(path)}
    assert roots - sys.stdlib_module_names == {"grpc", "google", "qwen3vl"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lmdeploy_ext", ("torch", "timm", "transformers", "lmdeploy", "numpy")),
        ("lmdeploy_ext.mrope", ("torch", "timm", "transformers", "lmdeploy")),
        ("lmdeploy_ext.packing", ("torch", "timm", "transformers", "lmdeploy")),
        ("service", ("torch", "grpc", "transformers", "lmdeploy", "numpy")),
        ("service.grpc_api.server", ("torch", "transformers", "lmdeploy")),
        ("service.engines.reference", ("transformers", "lmdeploy")),
        ("service.engines.lmdeploy", ("torch", "transformers", "lmdeploy")),
        ("service.__main__", ("torch", "transformers", "lmdeploy")),
    ],
)
def test_imports_stay_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
