"""Clients in other languages and frameworks, run as their pages say, against the bundled model.

Each one is asked about drawings that the model has never seen, and has to print what is in them.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.drawings.analysis import analysis
from examples.drawings.scenes import HELD_OUT_SEED, Scene, draw, scene
from tests.examples.programs import shell
from tests.pages import blocks
from tests.service.harness import ROOT

pytestmark = pytest.mark.slow

DRAWINGS = (2, 5)
"""Offsets of held-out seeds: two objects in a field by day, four in a desert by night."""
START_LIMIT_S = 300
INSTALL_LIMIT_S = 600
CONSOLE = re.compile(r"^\$ (.*)$", re.MULTILINE)
SERVING = re.compile(r"SERVING on port (\d+), (http://[\d.]+:\d+)")
REQUEST_ID = re.compile("request id [0-9a-f]{16}")


# The server, and what is installed beside it


@dataclass(frozen=True)
class Started:
    """The addresses of the server, HOST:PORT of gRPC and the URL of HTTP."""

    grpc: str
    http: str

    def insert(self, command: str) -> str:
        """The command of a page, with the addresses of this server."""
        found = command.replace("localhost:50051", self.grpc)
        found = found.replace("http://localhost:8000", self.http)
        assert found != command
        return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the proto files and the examples, for what is installed and generated."""
    root = tmp_path_factory.mktemp("copy")
    built = shutil.ignore_patterns("node_modules", "__pycache__", "build", "dist", "gen")
    shutil.copytree(ROOT / "protos", root / "protos")
    shutil.copytree(ROOT / "examples", root / "examples", ignore=built)
    return root


@pytest.fixture(scope="module")
def pages(root: Path) -> Iterator[str]:
    """The origin of a web server for the pages of the examples."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    Quiet.extensions_map = {**Quiet.extensions_map, ".mjs": "text/javascript"}
    handler = functools.partial(Quiet, directory=str(root / "examples"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def server(pages: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """`qwen3vl serve` on the bundled model, in a process of its own."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = ["serve", "--port", "0", "--http-port", "0", "--http-origins", pages]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [sys.executable, "-m", "service", *command], cwd=ROOT, stdout=out, stderr=out
        ) as process,
    ):
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while (found := SERVING.search(log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield Started(f"localhost:{found[1]}", found[2])
        finally:
            process.terminate()


def programs(*names: str) -> None:
    """Skip the test where one of these programs is missing."""
    for name in names:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


@functools.cache
def install(folder: Path) -> tuple[str, str]:
    """Run the commands of the page of an example but the last one.

    Returns the last one, which runs the example, and why the commands failed: "" if they did not.
    """
    *prepare, run = CONSOLE.findall((folder / "README.md").read_text())
    if prepare[:1] == ["pip install -r requirements.txt"]:
        done = _into_an_environment(folder)
        run = run.replace("python ", "venv/bin/python ", 1)
    else:
        done = _run(" && ".join(prepare), folder)
    return run, f"{done.stdout}\n{done.stderr}" if done.returncode else ""


def _into_an_environment(folder: Path) -> subprocess.CompletedProcess[str]:
    """The requirements of an example, in a virtual environment: some need other versions than we."""
    return _run(
        f"{sys.executable} -m venv venv && venv/bin/pip install -q -r requirements.txt", folder
    )


def _run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**environment, "PATH": tools, "npm_config_audit": "false"},
        capture_output=True,
        text=True,
        timeout=INSTALL_LIMIT_S,
    )


def installed(folder: Path, package_manager: str) -> str:
    """The command that runs an example; skips where its packages cannot be had."""
    run, problem = install(folder)
    if problem:
        pytest.skip(
            f"{package_manager} cannot install the packages of the example: {problem[-300:]}"
        )
    return run


def built(folder: Path) -> str:
    """The command that runs an example whose toolchain is installed: it has to build."""
    run, problem = install(folder)
    assert problem == ""
    return run


# What is right


@dataclass(frozen=True)
class Drawing:
    """A file, and the right answers about it."""

    path: Path
    facts: Scene

    @property
    def objects(self) -> dict[str, Any]:
        names = ("position", "shape", "color", "size")
        return {"objects": [{n: getattr(one, n) for n in names} for one in self.facts.objects]}

    @property
    def analysis(self) -> dict[str, Any]:
        return analysis(self.facts)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> list[Drawing]:
    folder = tmp_path_factory.mktemp("drawings")
    found = []
    for offset in DRAWINGS:
        facts = scene(HELD_OUT_SEED + offset)
        path = folder / f"{offset}.png"
        draw(facts, HELD_OUT_SEED + offset, (320, 240)).save(path)
        found.append(Drawing(path, facts))
    return found


def read(line: str, name: str) -> Any:
    """The JSON after ``NAME: `` in a line."""
    assert line.startswith(f"{name}: "), line
    return json.loads(line.removeprefix(f"{name}: "))


def check(name: str, lines: list[str], drawing: Drawing) -> None:
    """What the example of this name printed is right."""
    *answers, error = LINES[name]
    for line, kind in zip(lines, answers, strict=False):
        if kind.startswith("Objects"):
            assert read(line, kind) == drawing.objects
        elif kind == "Analysis":
            assert read(line, kind) == drawing.analysis
        elif kind == "Description":
            assert line == f"Analysis: {drawing.analysis['description']}"
        elif kind == "Scene":
            expected = {"scene": drawing.facts.place, "lighting": drawing.facts.lighting}
            assert read(line, "Place") == expected
        else:
            assert line == f"Place: {drawing.facts.place}"
    rest = "\n".join(lines[len(answers) :])
    assert re.fullmatch(f"An error: {error}", REQUEST_ID.sub("request id ID", rest)), rest


HOT = r"sampling\.temperature: must be a finite number from 0 to 2, not 3\.0"
LINES = {
    "openai-python": ("Objects", "Place", "Analysis", "400 INVALID_FIELD in n"),
    "instructor": ("Objects", "Scene", "422 OUTPUT_TRUNCATED"),
    "langchain": (
        *("Objects by json_schema", "Objects by function_calling", "Place"),
        "400 INVALID_FIELD in n",
    ),
    "openai-node": ("Objects", "Place", "Analysis", "400 INVALID_FIELD in n"),
    "ai-sdk": ("Objects", "Place", "400 INVALID_FIELD in presence_penalty"),
    "connect-typescript": (
        *("Description", "Objects", "Place"),
        f"InvalidArgument SAMPLING_OPTION_INVALID: {HOT}",
    ),
    "go": (
        *("Description", "Objects", "Place"),
        f"InvalidArgument: {HOT}\n  reason SAMPLING_OPTION_INVALID, request id ID\n.*",
    ),
    "java": (
        *("Description", "Objects", "Place"),
        f"INVALID_ARGUMENT: {HOT}\n  reason SAMPLING_OPTION_INVALID, request id ID\n.*",
    ),
}
"""Folder of an example -> what its lines are about; the last entry is the text of its error."""


async def is_right(
    name: str, root: Path, run: str, server: Started, drawings: list[Drawing]
) -> None:
    """The example is right about every drawing, and about the sample prints what its page says."""
    folder = root / "examples" / name
    command = server.insert(run)
    code, out, err = await shell(command, folder, PYTHONPATH="")
    assert (code, "Traceback" in err) == (0, False), err
    (expected,) = blocks((folder / "README.md").read_text(), "text")
    assert REQUEST_ID.sub("request id ID", out) == REQUEST_ID.sub("request id ID", expected)
    for drawing in drawings:
        asked = command.replace("../drawings/samples/day-sea.png", str(drawing.path))
        assert asked != command
        code, out, err = await shell(asked, folder, PYTHONPATH="")
        assert code == 0, err
        check(name, out.splitlines(), drawing)


# Over HTTP


async def test_the_openai_package(root: Path, server: Started, drawings: list[Drawing]) -> None:
    """With the package of this environment, which is that of its page."""
    folder = root / "examples" / "openai-python"
    install_, run = CONSOLE.findall((folder / "README.md").read_text())
    assert install_ == "pip install -r requirements.txt"
    await is_right(folder.name, root, run, server, drawings)
    code, _, err = await shell(f"python client.py {drawings[0].path} http://localhost:1/v1", folder)
    assert (code, err.startswith("APIConnectionError: ")) == (1, True), err


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["instructor", "langchain"])
async def test_a_framework_of_python(
    name: str, root: Path, server: Started, drawings: list[Drawing]
) -> None:
    run = installed(root / "examples" / name, "pip")
    await is_right(name, root, run, server, drawings)


@pytest.mark.parametrize("name", ["openai-node", "ai-sdk"])
async def test_a_package_of_node(
    name: str, root: Path, server: Started, drawings: list[Drawing]
) -> None:
    programs("node", "npm")
    run = installed(root / "examples" / name, "npm")
    await is_right(name, root, run, server, drawings)


@pytest.mark.parametrize("name", ["openai-node", "ai-sdk", "connect-typescript"])
def test_a_page_names_the_versions_of_the_lock_file(name: str) -> None:
    folder = ROOT / "examples" / name
    page = " ".join((folder / "README.md").read_text().split())
    named = re.findall(r"([@\w/-]+) (\d+\.\d+\.\d+)", page.partition("Tried with ")[2])
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert named
    assert dict(named) == {one: locked[f"node_modules/{one}"]["version"] for one, _ in named}


# TypeScript with Connect


async def test_connect_in_node(root: Path, server: Started, drawings: list[Drawing]) -> None:
    programs("node", "npm")
    run = installed(root / "examples" / "connect-typescript", "npm")
    await is_right("connect-typescript", root, run, server, drawings)


BROWSE = """
import { chromium } from "playwright-core";
const [, , page_url, server, executablePath, ...images] = process.argv;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
await page.goto(page_url);
await page.fill("#address", server);
const found = [];
for (const image of images) {
  await page.evaluate(() => delete document.querySelector("#output").dataset.done);
  await page.setInputFiles("#image", image);
  await page.waitForSelector("#output[data-done]");
  found.push((await page.textContent("#output")).trimEnd().split("\\n"));
}
console.log(JSON.stringify(found));
await browser.close();
"""


async def test_connect_in_a_browser(
    root: Path, server: Started, pages: str, drawings: list[Drawing], tmp_path: Path
) -> None:
    """From a page of another origin, which `--http-origins` names."""
    programs("node", "npm", "chromium")
    folder = root / "examples" / "connect-typescript"
    installed(folder, "npm")
    code, _, err = await shell("npm install --no-save --silent playwright-core@1", folder)
    if code:
        pytest.skip(f"npm cannot install playwright-core: {err}")
    (folder / "browse.mjs").write_text(BROWSE)
    paths = " ".join(str(drawing.path) for drawing in drawings)
    command = (
        f"node browse.mjs {pages}/connect-typescript/index.html {server.http} "
        f"{shutil.which('chromium')} {paths}"
    )
    code, out, err = await shell(command, folder)
    assert code == 0, err
    for lines, drawing in zip(json.loads(out), drawings, strict=True):
        check("connect-typescript", lines, drawing)


# Over gRPC


async def test_grpcurl(
    root: Path, server: Started, drawings: list[Drawing], tmp_path: Path
) -> None:
    """With grpcurl where it is installed, else with the same calls of buf."""
    folder = root / "examples" / "grpcurl"
    (run,) = CONSOLE.findall((folder / "README.md").read_text())
    if shutil.which("grpcurl") is None:
        shutil.copy(Path(__file__).with_name("grpcurl_by_buf.sh"), tmp_path / "grpcurl")
    tools = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for drawing in drawings:
        command = server.insert(run).replace("../drawings/samples/day-sea.png", str(drawing.path))
        code, out, err = await shell(f"PATH={tools} {command}", folder)
        assert code == 0, err
        assert "task.inline.user" in err, "the error of the last call"
        services, *calls = re.split(r"^(?=\w+:$)", out, flags=re.MULTILINE)
        assert "qwen3vl.v1.VisionService" in services.split()
        answers = [
            (name, json.loads(text) if text.strip() else None)
            for name, _, text in (call.partition(":\n") for call in calls if "Stream" not in call)
        ]
        assert [name for name, _ in answers] == [
            *("GetModel", "ValidateSchema", "AnalyzeImage", "RunTask", "RunTask")
        ]
        assert answers[0][1]["capabilities"]["vision"] is True
        assert answers[1][1]["enforcement"] == "ENFORCEMENT_ENFORCED"
        assert answers[2][1]["analysis"]["description"] == drawing.analysis["description"]
        assert answers[3][1]["result"]["text"] == drawing.facts.lighting
        (stream,) = (call for call in calls if call.startswith("StreamTask"))
        assert f'"text": "{drawing.facts.place}"' in stream


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_go(root: Path, server: Started, drawings: list[Drawing]) -> None:
    programs("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
    if not Path("/usr/share/gocode/src/google.golang.org/grpc").is_dir():
        pytest.skip("the package golang-google-grpc-dev is not installed")
    run = built(root / "examples" / "go")
    await is_right("go", root, run, server, drawings)
    await fails_without_a_server("build/client", root / "examples" / "go", "Unavailable: ")


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_java(root: Path, server: Started, drawings: list[Drawing]) -> None:
    programs("java", "javac", "protoc", "grpc_java_plugin")
    if not Path("/usr/share/java/grpc-netty.jar").is_file():
        pytest.skip("the package libgrpc-java is not installed")
    run = built(root / "examples" / "java")
    await is_right("java", root, run, server, drawings)
    await fails_without_a_server("build/client", root / "examples" / "java", "UNAVAILABLE: ")


async def fails_without_a_server(program: str, folder: Path, begin: str) -> None:
    code, out, err = await shell(f"{program} ../drawings/samples/day-sea.png localhost:1", folder)
    assert (code, out, err[: len(begin)]) == (1, "", begin)
