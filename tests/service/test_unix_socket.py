"""``--host unix:PATH``: a server on a socket in the file system."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import Settings, SettingsError, load_settings
from service.tasks.registry import load_registry
from tests.service.harness import run_request


@asynccontextmanager
async def listening(path: Path) -> AsyncIterator[VisionServer]:
    server = VisionServer(Settings(host=f"unix:{path}"), FakeEngine(), load_registry(None))
    try:
        await server.start()
        await server.load()
        yield server
    finally:
        await server.stop(0)


async def test_calls_and_health(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    async with listening(path) as server:
        assert server.place == f"unix:{path}"
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert (await VisionServiceStub(channel).RunTask(run_request(), timeout=60)).result.text
            stub = health_pb2_grpc.HealthStub(channel)
            found = await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
    assert not path.exists()


async def test_the_file_of_a_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
    assert path.exists()
    async with (
        listening(path),
        grpc.aio.insecure_channel(f"unix:{path}") as channel,
    ):
        assert (await VisionServiceStub(channel).RunTask(run_request(), timeout=60)).result.text


async def test_the_socket_of_a_running_server_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    async with listening(path):
        with pytest.raises(SettingsError, match="another process listens"):
            async with listening(path):
                pass
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            assert (await VisionServiceStub(channel).RunTask(run_request(), timeout=60)).result.text


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, problem in (
        ("", "1 to 107 bytes"),
        (f"/tmp/{'x' * 120}", "1 to 107 bytes"),
        (f"{tmp_path}/none/server.sock", "there is no folder"),
        (f"{tmp_path}/file", "is not a socket"),
    ):
        with pytest.raises(SettingsError, match=problem):
            load_settings(host=f"unix:{path}")


def test_a_port_beside_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = f"unix:{tmp_path}/server.sock"
    with pytest.raises(SettingsError, match="port: has no effect beside host=unix:PATH"):
        load_settings(host=host, port=50051)
    monkeypatch.setenv("QWEN3VL_PORT", "50051")
    with pytest.raises(SettingsError, match="port: has no effect beside host=unix:PATH"):
        load_settings(host=host)
