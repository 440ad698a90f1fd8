"""``qwen3vl check`` and ``qwen3vl serve`` with TurboMind, from the command to the last signal.

The bundled model on the stock module, whose kernels compute on the host; see tests/host_runtime.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.host_runtime.runner import ROOT, environment
from tests.service.harness import inline, run_request

pytestmark = [pytest.mark.slow, pytest.mark.host]
SAMPLE = ROOT / "examples" / "drawings" / "samples" / "night-desert.png"
OPTIONS = ["--engine", "lmdeploy", "--backend", "turbomind", "--cache-share", "0.2", "--port", "0"]
START_LIMIT_S = 120.0


def command(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "service", name, *OPTIONS, *options]


@contextmanager
def serving(log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that serves, and its address; killed at the end, if it still runs."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command("serve", *options), env=environment("numbers"), cwd=ROOT, stderr=sink
        )
    try:
        end = time.monotonic() + START_LIMIT_S
        while (found := re.search(r"SERVING on port (\d+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.1)
        yield process, f"127.0.0.1:{found[1]}"
    finally:
        process.kill()
        process.wait()


def test_check_says_what_runs() -> None:
    done = subprocess.run(
        command("check"), env=environment("numbers"), cwd=ROOT, capture_output=True, text=True,
        timeout=START_LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "drawings on the lmdeploy engine, context 4096 tokens" in done.stdout
    assert re.search(r"^ +backend turbomind$", done.stdout, re.MULTILINE)
    assert re.search(r"^ +deepstack on$", done.stdout, re.MULTILINE)
    assert "constrained tokens about a picture" in done.stdout


def test_serve_answers_and_ends_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(log) as (process, address):
        with grpc.insecure_channel(address) as channel:
            stub = VisionServiceStub(channel)
            request = pb.AnalyzeImageRequest(images=[pb.Image(data=SAMPLE.read_bytes())])
            analysis = stub.AnalyzeImage(request, timeout=60)
            assert analysis.analysis.scene == "desert"
            model = stub.GetModel(pb.GetModelRequest(), timeout=10)
        assert "turbomind" in str(model)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    text = log.read_text()
    assert "Qwen3-VL extension" in text, "the log names the extension"
    assert "DeepStack is on" in text
    assert "checking guided decoding" in text
    assert "logger=service" in text, "LMDeploy does not mute the service"


def test_serve_without_vision_refuses_pictures(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "log", "--no-vision") as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = VisionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.AnalyzeImage(
                pb.AnalyzeImageRequest(images=[pb.Image(data=SAMPLE.read_bytes())]), timeout=60
            )
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        task = inline("Say.", choice=["abc", "abd"])
        answer = stub.RunTask(run_request(task, max_tokens=9), timeout=60)
        assert answer.result.text in ("abc", "abd")
