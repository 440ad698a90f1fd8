"""A client without stubs: everything it knows comes from the server, as with grpcurl."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import sys
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from tests.service import reflection_client
from tests.service.certificates import Authority
from tests.service.harness import ROOT, failure, image_bytes, running
from tests.service.reflection_client import ReflectionClient

SERVICE = "qwen3vl.v1.VisionService"
IMAGE = {"data": base64.b64encode(image_bytes()).decode()}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TASK = {"inline": {"user": "Where?", "grammar": {"json_schema": json.dumps(POINT)}}}


def explore(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        client = ReflectionClient(channel)
        assert client.services() == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            SERVICE,
        ]
        assert client.methods(SERVICE) == [
            "AnalyzeImage",
            "RunTask",
            "StreamTask",
            "ListTasks",
            "GetTask",
            "ValidateSchema",
            "GetModel",
            "ListModels",
        ]
        [model] = client.call(SERVICE, "GetModel", {})
        assert model["engine"] == "fake"
        assert "GRAMMAR_KIND_JSON_SCHEMA" in model["capabilities"]["grammar_kinds"]

        [analysis] = client.call(SERVICE, "AnalyzeImage", {"images": [IMAGE]})
        assert analysis["finish_reason"] == "FINISH_REASON_STOP"
        assert analysis["analysis"]["subjects"] == ["subjects"]

        request = {"task": TASK, "images": [IMAGE], "sampling": {"max_tokens": 16}}
        [answer] = client.call(SERVICE, "RunTask", request)
        assert json.loads(answer["result"]["json"]) == {"x": 0}
        assert answer["result"]["usage"]["image_tokens"] > 0

        events = client.call(SERVICE, "StreamTask", request)
        assert "".join(event["delta"] for event in events[:-1]) == events[-1]["result"]["text"]

        [health] = client.call("grpc.health.v1.Health", "Check", {"service": SERVICE})
        assert health == {"status": "SERVING"}


async def test_a_client_that_knows_only_the_address() -> None:
    async with running() as started:
        await asyncio.to_thread(explore, started.address)


async def test_reflection_can_be_turned_off() -> None:
    async with running(reflection=False) as started:
        stub = ServerReflectionStub(started.channel)
        # Without a message: grpcio calls it an internal error when one comes after the refusal.
        error = await failure(stub.ServerReflectionInfo().read())
        assert error.code is grpc.StatusCode.UNIMPLEMENTED


# grpcurl, as in docs/clients.md

PAGE = (ROOT / "docs/clients.md").read_text().replace("\\\n", " ")
PLAIN = [line[2:] for line in PAGE.splitlines() if re.match(r"\$ .*grpcurl -plaintext", line)]


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH with grpcurl: the real one where it is installed, else the client of these tests."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if shutil.which("grpcurl") is None:
        program = folder / "grpcurl"
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{reflection_client.__file__}" "$@"\n'
        )
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


async def shell(command: str, **environment: str) -> str:
    """What a command prints; it has to succeed."""
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-euo",
        "pipefail",
        "-c",
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


def test_the_page_has_commands() -> None:
    assert len(PLAIN) == 5


@pytest.mark.slow
@pytest.mark.parametrize("command", PLAIN, ids=lambda command: command.rpartition("/")[2])
async def test_a_grpcurl_command_of_the_page(command: str, programs: str) -> None:
    async with running() as started:
        command = command.replace("localhost:50051", started.address)
        out = await shell(command, PATH=programs)
    if command.endswith(" list"):
        assert SERVICE in out.split()
    elif command.endswith("GetModel"):
        assert json.loads(out)["engine"] == "fake"
    elif command.endswith("AnalyzeImage"):
        assert json.loads(out)["analysis"]["scene"] == "scene"
    elif command.endswith("ValidateSchema"):
        assert json.loads(out)["enforcement"] == "ENFORCEMENT_ENFORCED"
    else:
        assert json.loads(out)["result"]["text"] == "yes"


@pytest.mark.slow
async def test_tls_and_keys_of_the_page(programs: str, tmp_path: Path) -> None:
    lines = [line[2:] for line in PAGE.splitlines() if line.startswith("$ ")]
    (make_key,) = [line for line in lines if "sha256sum" in line]
    (call,) = [line for line in lines if "-cacert" in line]
    keys = tmp_path / "keys"
    await shell(make_key.replace(">> keys", f">> {keys}"), KEY="secret")
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    async with running(tls_cert=cert, tls_key=key, api_keys_file=keys) as started:
        command = call.replace("localhost:50051", f"localhost:{started.server.port}")
        command = command.replace("ca.pem", str(authority.cert))
        out = await shell(command, PATH=programs, KEY="secret")
        assert SERVICE in out.split()
        with pytest.raises(AssertionError, match="not known"):
            await shell(command, PATH=programs, KEY="guess")
