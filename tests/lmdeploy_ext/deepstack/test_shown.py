"""How an operator chooses DeepStack and sees what holds: flag, variable, log, GetModel, metrics."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import grpc
import pytest

from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.ports import free_port
from tests.service.engines.lmdeploy.test_stock_server import serving

pytestmark = [pytest.mark.slow, pytest.mark.host]


@pytest.mark.parametrize(
    ("variable", "flag", "mode"),
    [("", "require", "require"), ("off", "", "off"), ("off", "auto", "auto")],
    ids=["flag", "variable", "a flag comes before the variable"],
)
def test_the_engine_shows_the_state_of_deepstack(
    variable: str, flag: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("QWEN3VL_DEEPSTACK", variable)
    metrics, log = free_port(), tmp_path / "log"
    flags = ["--deepstack", flag] if flag else []
    with (
        serving(log, "--admin-port", str(metrics), *flags) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        details = VisionServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=60).details
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=60) as page:
            numbers = page.read().decode()
    on = mode != "off"
    by = "the hook on TurboMind" if on else "nothing"
    assert (details["deepstack"], details["deepstack_mode"], details["deepstack_by"]) == (
        "on" if on else "off",
        mode,
        by,
    )
    assert f"qwen3vl_deepstack_active {float(on)}" in numbers
    assert f'qwen3vl_engine_info{{deepstack_by="{by}",deepstack_mode="{mode}"' in numbers
    text = log.read_text()
    assert ("DeepStack is on: vision blocks" in text) is on
    assert ("DeepStack is off, as asked for" in text) is not on
    assert ("3 DeepStack mergers are left out" in text) is not on
