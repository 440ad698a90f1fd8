"""The lock files with hashes, the SBOM, the CI job that installs from the lock, Docker's health check."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.attack.lifecycle import health_command
from deploy.sbom import version, with_root
from service import __version__
from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer
from service.settings import Settings
from service.tasks.registry import load_registry
from tests.service.certificates import Authority

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCKS: dict[str, list[str | None]] = {
    "requirements.lock": [None],
    "requirements-extras.lock": [None, "otel", "heif", "ray", "batch"],
}
"""Lock file -> the parts of pyproject.toml that it locks; None is what the service always needs."""
HASH = re.compile(r"\s*--hash=sha256:[0-9a-f]{64}")
PLACES = [
    {
        "python_full_version": f"{python}.7",
        "python_version": python,
        "sys_platform": system,
        "platform_machine": machine,
    }
    for python in ("3.10", "3.11", "3.12", "3.13")
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]


def locked(lock: str = "requirements.lock") -> dict[str, list[str]]:
    """Each requirement of a lock -> its hashes."""
    entries = re.sub(r"\\\n", " ", (ROOT / lock).read_text()).splitlines()[1:]
    found = {}
    for entry in entries:
        requirement, *hashes = re.split(r"\s+(?=--hash)", entry.strip())
        assert all(HASH.fullmatch(one) for one in hashes), entry
        found[requirement] = hashes
    return found


def declared(extra: str | None = None) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [Requirement(text) for text in texts]


def names_at(place: dict[str, str], lock: str) -> list[str]:
    """Names of what a lock installs on a system."""
    requirements = [Requirement(text) for text in locked(lock)]
    return [
        canonicalize_name(one.name)
        for one in requirements
        if one.marker is None or one.marker.evaluate({**place, "extra": ""})
    ]


each_lock = pytest.mark.parametrize("lock", LOCKS)


@each_lock
def test_every_package_of_a_lock_has_hashes(lock: str) -> None:
    assert len(locked(lock)) > 100
    assert [name for name, hashes in locked(lock).items() if not hashes] == []


@each_lock
def test_a_lock_has_the_versions_of_the_constraints(lock: str) -> None:
    """So that what CI tests is what the lock installs."""
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {line.partition(" ;")[0] for line in constraints}
    assert sorted({line.partition(" ;")[0] for line in locked(lock)} - tested) == []


def test_the_lock_of_the_extras_has_all_of_the_other() -> None:
    """On more systems, where an extra needs a package that the rest needs on some systems alone."""

    def versions(lock: str) -> dict[str, list[str]]:
        return {line.partition(" ;")[0]: hashes for line, hashes in locked(lock).items()}

    basic, extras = versions("requirements.lock"), versions("requirements-extras.lock")
    assert {version: extras.get(version) for version in basic} == basic


@each_lock
@pytest.mark.parametrize("place", PLACES, ids=lambda place: " ".join(list(place.values())[1:]))
def test_a_lock_has_every_dependency_once_on_every_system(place: dict[str, str], lock: str) -> None:
    found = names_at(place, lock)
    assert len(found) == len(set(found))
    wanted = {
        canonicalize_name(one.name)
        for part in LOCKS[lock]
        for one in declared(part)
        if one.marker is None or one.marker.evaluate(place)
    }
    assert sorted(wanted - set(found)) == []
    assert sorted({"pytest", "mypy", "ruff"} & set(found)) == []


@each_lock
def test_a_lock_names_no_index_and_no_file(lock: str) -> None:
    """Hashes are of releases, wherever they are fetched from."""
    text = (ROOT / lock).read_text()
    assert re.findall(r"https?:|file:|--find-links|--index|(?m:^\s*/)", text) == []


def test_ci_installs_from_each_lock() -> None:
    workflow: Any = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["locked"]
    assert job["strategy"]["matrix"]["lock"] == list(LOCKS)
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps == [
        "pip install --require-hashes -r ${{ matrix.lock }}",
        "pip install --no-deps -e .",
        "pip check",
        "qwen3vl check --port 0",
    ]


def test_the_pages_say_how_to_install_from_the_lock() -> None:
    page = (ROOT / "docs" / "platforms.md").read_text()
    assert "pip install --require-hashes -r requirements.lock\n" in page
    assert "pip install --no-deps -e .\n" in page
    assert all(f"[{lock}](../{lock})" in page for lock in LOCKS)


def test_the_gpu_image_installs_from_the_lock() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stage = text.split("FROM build AS build-cuda")[1].split("\nFROM ")[0]
    assert "RUN pip install --require-hashes -r requirements.lock\n" in stage
    assert "RUN pip install --no-deps .\n" in stage


# Docker's health check


@pytest.mark.slow
async def test_dockers_health_check_follows_readiness(tmp_path: Path) -> None:
    """Under mutual TLS and with a proxy: it asks the admin port of the container's own loopback."""
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    tls = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.cert}
    server = VisionServer(Settings(port=0, admin_port=0, **tls), FakeEngine(), load_registry(None))
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **proxies}

    async def exit_code() -> int:
        environment["QWEN3VL_ADMIN_PORT"] = str(server.admin_port)
        process = await asyncio.create_subprocess_exec(
            *health_command(), env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        return await process.wait()

    await server.start()
    try:
        assert await exit_code() == 1, "the model is not loaded"
        await server.load()
        assert await exit_code() == 0
    finally:
        await server.stop(0)
    assert await exit_code() == 1, "nobody answers"


def test_the_sbom_names_the_version_and_all_that_it_needs() -> None:
    content = {
        "metadata": {"component": {"bom-ref": "root", "name": "qwen3vl-grpc"}},
        "components": [{"bom-ref": "b", "name": "b"}, {"bom-ref": "a", "name": "a"}],
        "dependencies": [{"ref": "root"}, {"ref": "a"}, {"ref": "b"}],
    }
    found = with_root(content, version())
    assert found["metadata"]["component"]["version"] == __version__
    assert found["metadata"]["component"]["purl"] == f"pkg:pypi/qwen3vl-grpc@{__version__}"
    assert found["dependencies"] == [
        {"ref": "root", "dependsOn": ["a", "b"]},
        {"ref": "a"},
        {"ref": "b"},
    ]


@pytest.mark.long
def test_the_sbom_is_valid(tmp_path: Path) -> None:
    """Through cyclonedx-bom, which uv fetches; the script validates what it has made."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is not installed; `make sbom` installs it")
    output = tmp_path / "sbom.json"
    words = ["run", "--quiet", "--no-project", "--with", "cyclonedx-bom>=7.5,<8", "python"]
    done = subprocess.run(
        [uv, *words, "deploy/sbom.py", output], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"valid CycloneDX 1.6, {len(locked())} components" in done.stdout
