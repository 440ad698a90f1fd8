"""docs/http.md: its programs and its calls by curl run against a server."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from service.engines.fake import FakeEngine
from service.types import GenerateRequest
from tests.pages import ROOT, blocks
from tests.service.http_api.harness import serving

PAGE = (ROOT / "docs/http.md").read_text()
pytestmark = pytest.mark.slow
PLACE = "http://127.0.0.1:8000"
ANALYSIS: dict[str, str | list[str]] = {
    "scene": "sea", "description": "Sand.", "subjects": [], "objects": ["ball"], "actions": [],
    "mood": [], "shot_type": "wide shot", "lighting": ["day"], "tags": ["sea"],
}  # fmt: skip


def answer(request: GenerateRequest) -> str:
    return "A drawing." if request.grammar is None else json.dumps(ANALYSIS)


async def test_the_programs_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    monkeypatch.chdir(ROOT)
    first, task, responses = blocks(PAGE, "python")
    shown = "\nprint(answer.choices[0].message.content)\n"
    async with serving(FakeEngine(answer)) as server:
        program = "".join((first, task, shown, responses)).replace(PLACE, server.http.place)
        await asyncio.to_thread(exec, f"{program}\nclient.close()", {})
    described, analysed, again = capsys.readouterr().out.splitlines()
    assert described == again == "A drawing."
    assert json.loads(analysed) == ANALYSIS


async def test_the_calls_by_curl_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("connectrpc")
    bash, curl = shutil.which("bash"), shutil.which("curl")
    if bash is None or curl is None:
        pytest.skip("needs bash and curl")
    monkeypatch.chdir(ROOT)
    (calls,) = (one for one in blocks(PAGE, "console") if one.startswith("$ curl"))
    found = []
    async with serving(FakeEngine(answer)) as server:
        for call in calls.removeprefix("$ ").split("\n$ "):
            process = await asyncio.create_subprocess_exec(
                bash, "-c", call.replace(PLACE, server.http.place),
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            output, problem = await process.communicate()
            assert process.returncode == 0, problem.decode()
            found.append(json.loads(output))
    analysis, report = found
    assert analysis["analysis"]["description"] == ANALYSIS["description"]
    assert report["enforcement"] == "ENFORCEMENT_ENFORCED"
