"""The example clients, run as their pages say, in a copy of them, the light client and the protos."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engines.fake import FakeEngine
from tests.examples.programs import shell
from tests.service.certificates import Authority
from tests.service.harness import ROOT, running

pytestmark = pytest.mark.slow

CONSOLE = re.compile(r"^\$ (?P<command>.*)$", re.MULTILINE)
KEY = "secret"


def steps(page: Path) -> tuple[str, str, str]:
    """Install, prepare (may be empty) and run, as the page of an example says."""
    install, *prepare, run = CONSOLE.findall(page.read_text())
    assert "localhost:50051" in run
    return install, " && ".join(prepare), run


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The protos, a sample image and the clients, in a folder of their own."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "protos", root / "protos")
    shutil.copytree(ROOT / "clients", root / "clients")
    shutil.copytree(ROOT / "examples/drawings/samples", root / "examples/drawings/samples")
    for name in ("python", "node"):
        shutil.copytree(
            ROOT / "examples" / name,
            root / "examples" / name,
            ignore=shutil.ignore_patterns("node_modules", "__pycache__"),
        )
    return root / "examples"


@pytest.fixture(scope="module")
def python_client(copy: Path) -> tuple[Path, str]:
    folder = copy / "python"
    install, nothing, run = steps(folder / "README.md")
    assert (install, nothing) == ("pip install -r requirements.txt", "")
    # What that needs of others is in this environment already.
    install += " --no-deps --no-build-isolation --no-index --target ."
    code, _, err = asyncio.run(shell(f"python -m {install}", folder, PYTHONWARNINGS="default"))
    assert code == 0, err
    assert (folder / "qwen3vl/v1/vision_pb2.py").is_file()
    return folder, run


@pytest.fixture(scope="module")
def node_client(copy: Path) -> tuple[Path, str]:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = copy / "node"
    install, nothing, run = steps(folder / "README.md")
    assert (install, nothing) == ("npm install", "")
    code, _, err = asyncio.run(shell(f"{install} --no-audit --no-fund", folder))
    if code:
        pytest.skip(f"npm cannot install the packages of the example: {err.splitlines()[0]}")
    return folder, run


@pytest.fixture(params=["python", "node"])
def client(request: pytest.FixtureRequest) -> tuple[Path, str]:
    found: tuple[Path, str] = request.getfixturevalue(f"{request.param}_client")
    return found


def says(*parts: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert [part for part in parts if part not in text] == [], text

    return check


async def test_every_call_and_an_error(client: tuple[Path, str]) -> None:
    folder, run = client
    async with running() as started:
        code, out, err = await shell(run.replace("localhost:50051", started.address), folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("AnalyzeImage: scene; objects: [")
    says("RunTask:", "objects")(lines[1])
    assert lines[2] == "  4 tokens from fake"
    assert lines[3] == 'StreamTask: {"objects": ["objects"]}'
    says("An error: INVALID_ARGUMENT: sampling.temperature: must be a finite number")(lines[4])
    says("reason SAMPLING_OPTION_INVALID, request id ")(lines[5])
    says("sampling.temperature must be")(lines[6])


async def test_tls_and_a_key(client: tuple[Path, str], tmp_path: Path) -> None:
    folder, run = client
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    keys = tmp_path / "keys"
    keys.write_text(f"me:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    async with running(tls_cert=cert, tls_key=key, api_keys_file=keys) as started:
        command = run.replace("50051", str(started.server.port))
        ca = str(authority.cert)
        code, out, err = await shell(command, folder, QWEN3VL_CA=ca, QWEN3VL_API_KEY=KEY)
        assert (code, err) == (0, "")
        assert out.startswith("AnalyzeImage: scene")
        code, _, err = await shell(command, folder, QWEN3VL_CA=ca)
        assert code == 1
        says("UNAUTHENTICATED", "reason API_KEY_MISSING, request id ")(err)


async def test_errors_are_printed_with_their_reason(client: tuple[Path, str]) -> None:
    folder, run = client
    async with running(FakeEngine(vision=False)) as started:
        code, _, err = await shell(run.replace("localhost:50051", started.address), folder)
    assert code == 1
    says("FAILED_PRECONDITION", "reason VISION_DISABLED")(err)
    code, _, err = await shell(run.replace("localhost:50051", "localhost:1"), folder)
    assert code == 1
    assert err.startswith("UNAVAILABLE: ")
    assert "Traceback" not in err
    assert "at explain" not in err
