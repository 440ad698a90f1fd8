"""The declared dependencies are exactly what the code imports, and every one of them is pinned."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OURS = {"service", "lmdeploy_ext"}
OTLP = "opentelemetry-exporter-otlp-proto"
NAMESPACES = {
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.grpc": f"{OTLP}-grpc",
    "opentelemetry.exporter.otlp.proto.http": f"{OTLP}-http",
    "opentelemetry": "opentelemetry-api",
}
"""Packages that share the top-level names ``google`` and ``opentelemetry``."""


def project() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared() -> dict[str, Requirement]:
    found = [Requirement(text) for text in project()["dependencies"]]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def optional() -> set[str]:
    """What users can add: the extras but those of developers."""
    extras = project()["optional-dependencies"]
    ours = ("dev", "benchmarks", "mutants")
    texts = [text for extra, texts in extras.items() if extra not in ours for text in texts]
    return {canonicalize_name(Requirement(text).name) for text in texts}


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


def test_declared_dependencies_equal_imports() -> None:
    absent = {name for name, one in declared().items() if one.marker and not one.marker.evaluate()}
    modules = {name for name in foreign_modules() if name.partition(".")[0] not in absent}
    imported = {distribution(module) for module in modules}
    assert {"grpcio", "jsonschema", "torch"} <= imported
    assert imported == (declared().keys() - absent) | optional()


def test_every_dependency_has_a_lower_bound() -> None:
    for name, requirement in declared().items():
        assert any(part.operator == ">=" for part in requirement.specifier), name


@pytest.mark.parametrize("extra", ["", "dev", "otel", "batch", "benchmarks", "mutants"])
def test_every_dependency_is_pinned_within_its_range(extra: str) -> None:
    texts = project()["optional-dependencies"][extra] if extra else project()["dependencies"]
    pins: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
            pins.setdefault(canonicalize_name(match[1]), set()).add(match[2])
    for requirement in map(Requirement, texts):
        if requirement.name == project()["name"]:  # an extra of ours
            continue
        versions = pins.get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement.name} has no pin"
        assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "arm64", False)],
)
def test_lmdeploy_is_only_where_it_has_wheels(system: str, machine: str, expected: bool) -> None:
    """And only there the pins have what it brings."""
    place = {"sys_platform": system, "platform_machine": machine}
    marker = declared()["lmdeploy"].marker
    assert marker is not None
    assert marker.evaluate(place) is expected
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]]
    here = {one.name for one in pins if one.marker is None or one.marker.evaluate(place)}
    assert {"lmdeploy", "mmengine-lite", "openai-harmony"} & here == (
        {"lmdeploy", "mmengine-lite", "openai-harmony"} if expected else set()
    )
    assert {"torch", "xgrammar", "grpcio", "ray"} <= here
    assert ("nvidia-cublas" in here) is (system == "linux")


@pytest.mark.parametrize(
    ("name", "generated"),
    [
        ("grpcio", ("vision_pb2_grpc.py", r"GRPC_GENERATED_VERSION = '([\d.]+)'")),
        ("protobuf", ("vision_pb2.py", r"# Protobuf Python Version: ([\d.]+)")),
    ],
)
def test_the_runtime_is_not_older_than_the_generated_code(
    name: str, generated: tuple[str, str]
) -> None:
    file, pattern = generated
    found = re.search(pattern, (ROOT / "service/pb/qwen3vl/v1" / file).read_text())
    assert found is not None
    (lowest,) = [part.version for part in declared()[name].specifier if part.operator == ">="]
    assert Version(lowest) >= Version(found[1])


# Docker's cpu target

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def stage(name: str) -> str:
    """The lines of a stage of the Dockerfile, with those of a continued line as one."""
    found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found is not None
    return found[1].replace("\\\n", "")


def without_lmdeploy() -> list[Requirement]:
    """The dependencies that the cpu target installs, from the very command in the Dockerfile."""
    (program,) = re.findall(r'^RUN python -c "(.*?)" > requirements.txt', stage("build-cpu"), re.M)
    code = program if sys.version_info >= (3, 11) else program.replace("tomllib", "tomli")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Requirement(line) for line in done.stdout.splitlines()]


def test_the_cpu_image_takes_torch_for_the_cpu_and_no_lmdeploy() -> None:
    installs = re.findall(r"pip install .*", stage("build-cpu"))
    assert len(installs) == 3
    for line in installs[:2]:
        assert '-c constraints.txt --extra-index-url "$TORCH_INDEX"' in line
    assert installs[2] == "pip install --no-deps ."
    names = {canonicalize_name(one.name) for one in without_lmdeploy()}
    assert names == declared().keys() - {"lmdeploy"}
    assert "COPY --from=build-cpu /opt/venv /opt/venv" in stage("cpu")
    assert "COPY --from=build-cuda /opt/venv /opt/venv" in stage("cuda")


def test_nothing_in_the_cpu_image_needs_cuda() -> None:
    """Follows what the installed packages require; of torch, what its builds for the CPU do."""
    seen: set[str] = set()
    waiting = without_lmdeploy()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        for text in requires(name) or ():
            inner = Requirement(text)
            is_cuda = inner.name.startswith(("nvidia-", "cuda-"))
            if name != "torch" or not is_cuda:
                waiting.append(inner)
    assert {"torch", "xgrammar", "tokenizers"} <= seen
    assert sorted(name for name in seen if name.startswith(("nvidia-", "cuda-", "lmdeploy"))) == []
