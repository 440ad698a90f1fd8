"""The end of the process, whatever its threads still do."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import CHANNEL_OPTIONS
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.service.harness import ROOT, image_bytes, run_request

pytestmark = pytest.mark.slow

HANGS = """
import sys, time
from service.cli.serving import serve_command
from service.inference import decoding

def hang(*_):
    print("hangs", flush=True)
    time.sleep(1000)

decoding._read_quickly = lambda encoded: False
decoding.ImageDecoder._headers = hang
sys.exit(serve_command(sys.argv[1:]))
"""


@contextmanager
def hanging(path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command on a socket, whose thread for image headers never ends; killed at the end."""
    words = ("--engine", "fake", "--host", f"unix:{path}", "--drain-grace-s", "0")
    server = subprocess.Popen(
        [sys.executable, "-c", HANGS, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield server
    finally:
        server.kill()
        server.communicate()


async def test_a_thread_that_does_not_end_does_not_keep_the_process(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with hanging(path) as server:
        async with grpc.aio.insecure_channel(f"unix:{path}", options=CHANNEL_OPTIONS) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            while True:
                found = await health.Check(request, timeout=60, wait_for_ready=True)
                if found.status == health_pb2.HealthCheckResponse.SERVING:
                    break
                await asyncio.sleep(0.05)
            stub = VisionServiceStub(channel)
            call = stub.RunTask(run_request(images=[image_bytes()]))
            assert server.stdout is not None
            line = await asyncio.to_thread(server.stdout.readline)
            while "hangs" not in line:
                assert line, "the server ended"
                line = await asyncio.to_thread(server.stdout.readline)
            server.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.wait, 120) == 0
            call.cancel()
