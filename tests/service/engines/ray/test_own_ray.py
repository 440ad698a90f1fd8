"""A server that starts its own Ray, in a process of its own."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest

from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.service.engines.ray.clusters import START_S
from tests.service.harness import ROOT, run_request

pytestmark = pytest.mark.long


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def test_a_server_drains_and_leaves_nothing(tmp_path: Path) -> None:
    log, folders = tmp_path / "log", tmp_path / "t"
    folders.mkdir()
    words = ("serve", "--engine", "ray", "--ray-engine", "fake", "--port", "0")
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-m", "service", *words],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": "/tmp"},
            stderr=stderr,
        )
    try:
        until(lambda: "SERVING" in log.read_text() or server.poll() is not None)
        port = int(log.read_text().rpartition("SERVING on port ")[2].partition(".")[0])
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer = VisionServiceStub(channel).RunTask(run_request(), timeout=60)
            assert answer.result.text == "This is the fake engine."

        children = psutil.Process(server.pid).children(recursive=True)
        (folder,) = {
            Path(word.partition("=")[2]).parent
            for child in children
            for word in child.cmdline()
            if word.startswith("--temp-dir=")
        }
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for child in children:
            if child.name() in ("raylet", "gcs_server"):
                addresses = {
                    one.laddr.ip
                    for one in child.net_connections("tcp")
                    if one.status == psutil.CONN_LISTEN
                }
                assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}

        server.send_signal(signal.SIGTERM)
        assert server.wait(START_S) == 0, log.read_text()
        assert "SIGTERM received" not in log.read_text()
        assert "stopped calls_cut=0" in log.read_text()
        assert not folder.exists()
        until(lambda: not any(child.is_running() for child in children))
    finally:
        server.kill()
        server.wait()
