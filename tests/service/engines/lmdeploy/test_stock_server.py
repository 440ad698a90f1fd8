"""``qwen3vl check`` and ``qwen3vl serve`` with TurboMind, from the command to the last signal.

The bundled model on the stock module, whose kernels compute on the host; see tests/host_runtime.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import jsonschema
import pytest

from service.client import read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.host_runtime.runner import ROOT, environment
from tests.service.harness import inline, run_request

pytestmark = [pytest.mark.slow, pytest.mark.host]
SAMPLE = ROOT / "examples" / "drawings" / "samples" / "night-desert.png"
OPTIONS = ["--engine", "lmdeploy", "--backend", "turbomind", "--cache-share", "0.2", "--port", "0"]
REFERENCE = ["--engine", "reference", "--port", "0"]
START_LIMIT_S = 120.0


def command(name: str, *options: str, engine: Sequence[str] = OPTIONS) -> list[str]:
    return [sys.executable, "-m", "service", name, *engine, *options]


@contextmanager
def serving(
    log: Path, *options: str, engine: Sequence[str] = OPTIONS
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that serves, and its address; killed at the end, if it still runs."""
    words = command("serve", *options, engine=engine)
    # The reference engine would take the host runtime for a GPU.
    variables = environment("numbers") if engine is OPTIONS else dict(os.environ)
    with log.open("wb") as sink:
        process = subprocess.Popen(words, env=variables, cwd=ROOT, stderr=sink)
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


def test_check_prints_the_engine_and_backend() -> None:
    done = subprocess.run(
        command("check"), env=environment("numbers"), cwd=ROOT, capture_output=True, text=True,
        timeout=START_LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "drawings on the lmdeploy engine, context 4096 tokens" in done.stdout
    assert re.search(r"^ +backend turbomind$", done.stdout, re.MULTILINE)
    assert re.search(r"^ +deepstack on$", done.stdout, re.MULTILINE)
    assert "constrained tokens about an image" in done.stdout


def ask(stub: VisionServiceStub) -> dict[str, str]:
    """One client for every engine: each kind of call, checked; the texts of the answers."""
    data = SAMPLE.read_bytes()
    analysis = stub.AnalyzeImage(pb.AnalyzeImageRequest(images=[pb.Image(data=data)]), timeout=60)
    assert analysis.analysis.scene == "desert"
    assert len(analysis.analysis.objects) == 3

    schema = (ROOT / "examples" / "schemas" / "objects.json").read_text()
    listing = inline(
        "List every object with its position, shape, color and size.", json_schema=schema
    )
    request = run_request(listing, [data], max_tokens=200)
    listed = stub.RunTask(request, timeout=60).result
    jsonschema.validate(json.loads(listed.json), json.loads(schema))
    assert listed.usage.output_tokens > 20

    streamed = pb.StreamTaskRequest.FromString(request.SerializeToString())
    *deltas, last = stub.StreamTask(streamed, timeout=60)
    assert len(deltas) > 5
    assert "".join(event.delta for event in deltas) == last.result.text == listed.text

    dropped = stub.StreamTask(streamed, timeout=60)
    next(dropped)
    dropped.cancel()
    with pytest.raises(grpc.RpcError) as cancelled:
        list(dropped)
    assert cancelled.value.code() is grpc.StatusCode.CANCELLED

    several = run_request(inline("Is it day or night?", choice=["day", "night"]), [data, data])
    chosen = stub.RunTask(several, timeout=60).result.text
    assert chosen in ("day", "night")

    errors = {
        "IMAGE_TRUNCATED": run_request(listing, [data[:-200]]),
        "OUTPUT_TRUNCATED": run_request(listing, [data], max_tokens=9),
    }
    for reason, wrong in errors.items():
        with pytest.raises(grpc.RpcError) as raised:
            stub.RunTask(wrong, timeout=60)
        assert read_error(raised.value).reason == reason
    return {"analysis": str(analysis.analysis), "listed": listed.text, "chosen": chosen}


def test_one_client_gets_the_same_answers_from_both_engines(tmp_path: Path) -> None:
    found = {}
    for name, engine in {"turbomind": OPTIONS, "reference": REFERENCE}.items():
        log = tmp_path / name
        with serving(log, engine=engine) as (process, address):
            with grpc.insecure_channel(address) as channel:
                stub = VisionServiceStub(channel)
                found[name] = ask(stub)
                model = str(stub.GetModel(pb.GetModelRequest(), timeout=60))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        assert name in model
    assert found["turbomind"] == found["reference"]
    text = (tmp_path / "turbomind").read_text()
    assert "Qwen3-VL extension" in text, "the log names the extension"
    assert "DeepStack is on" in text
    assert "checking guided decoding" in text
    assert "logger=service" in text, "LMDeploy does not mute the service"


def test_serve_without_vision_refuses_images(tmp_path: Path) -> None:
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
