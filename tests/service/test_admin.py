"""The admin port of a real server: probes, version, metrics."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from service import __version__
from service.cli.arguments import read_settings
from service.engines.fake import FakeEngine
from service.lifecycle import Phase
from service.settings import load_settings
from service.types import Capabilities, EngineLoad
from tests.service.admin_pages import page, samples, series
from tests.service.certificates import Authority
from tests.service.harness import run_request, running, until

pytestmark = pytest.mark.slow


async def test_probes_follow_the_phase() -> None:
    async with running(load=False, admin_port=0, health_interval_s=0.02) as started:
        port = started.server.admin_port

        async def ready(path: str = "/readyz") -> tuple[int, str]:
            assert (await page(port, "/livez")).status == 200, "alive in every phase"
            found = await page(port, path)
            return found.status, found.text

        assert await ready() == (503, "loading\n")
        await started.server.load()
        assert await ready() == (200, "serving\n")
        assert await ready("/healthz") == (200, "serving\n")
        started.engine.healthy = False
        await until(lambda: started.server.lifecycle.phase is Phase.UNHEALTHY)
        assert await ready() == (503, "unhealthy\n")
        started.engine.healthy = True
        await until(lambda: started.server.lifecycle.phase is Phase.SERVING)
        assert await ready() == (200, "serving\n")


async def test_answers_until_the_end_of_a_drain() -> None:
    async with running(admin_port=0) as started:
        started.engine.hang_after = 0
        port = started.server.admin_port
        call = asyncio.ensure_future(started.stub.RunTask(run_request()))
        await until(lambda: started.engine.active_requests == 1)
        stopping = asyncio.create_task(started.server.stop(60))
        await until(lambda: started.server.lifecycle.phase is Phase.DRAINING)
        found = await page(port, "/readyz")
        assert (found.status, found.text) == (503, "draining\n")
        assert (await page(port, "/livez")).status == 200
        phase = {name: value for name, value in (await samples(port)).items() if value}
        assert series("phase", qwen3vl_phase="draining") in phase
        started.engine.hang_after = None
        call.cancel()
        await stopping
        with pytest.raises(OSError, match="refused"):
            await page(port, "/livez")


async def test_stays_plain_where_calls_need_tls_and_a_key(tmp_path: Path) -> None:
    cert, key = Authority.create(tmp_path).issue("server")
    keys = tmp_path / "keys"
    keys.write_text(f"alice:{'0' * 64}\n")
    async with running(admin_port=0, tls_cert=cert, tls_key=key, api_keys_file=keys) as started:
        port = started.server.admin_port
        for path in ("/livez", "/readyz", "/metrics", "/version"):
            assert (await page(port, path)).status == 200


async def test_other_paths_and_methods_are_refused() -> None:
    async with running(admin_port=0) as started:
        port = started.server.admin_port
        for path in ("/", "/healthz/", "/metrics/x", "/%2e%2e/etc/passwd", "/docs"):
            assert (await page(port, path)).status == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert (await page(port, "/metrics", method)).status == 405
        head = await page(port, "/readyz", "HEAD")
        assert (head.status, head.text) == (200, "")


class FromTheHub(FakeEngine):
    @property
    def capabilities(self) -> Capabilities:
        found = super().capabilities
        values = {name: getattr(found, name) for name in found.__slots__}
        return Capabilities(**{**values, "details": {"commit": "0a1b2c"}})


async def test_the_version_tells_server_model_engine_and_commit() -> None:
    async with running(FromTheHub(), load=False, admin_port=0) as started:
        port = started.server.admin_port
        assert json.loads((await page(port, "/version")).text) == {"version": __version__}
        await started.server.load()
        assert json.loads((await page(port, "/version")).text) == {
            "version": __version__,
            "model": "fake",
            "engine": "fake",
            "commit": "0a1b2c",
        }


async def test_the_forms_of_the_metrics() -> None:
    async with running(admin_port=0) as started:
        port = started.server.admin_port
        plain = await page(port, "/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "# EOF" not in plain.text
        asked = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
        openmetrics = await page(port, "/metrics", **asked)
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        assert openmetrics.text.endswith("# EOF\n")


async def test_a_server_under_load_tells_what_waits_and_runs() -> None:
    engine = FakeEngine()
    engine.kv_cache_used = 0.25
    async with running(engine, admin_port=0, max_concurrent=2, max_queue=7) as started:
        engine.hang_after = 0
        calls = [asyncio.ensure_future(started.stub.RunTask(run_request())) for _ in range(3)]
        await until(lambda: started.server.runtime.budgets.admission.waiting == 1)
        found = await samples(started.server.admin_port)
        for call in calls:
            call.cancel()
        await until(lambda: engine.active_requests == 0)
        after = await samples(started.server.admin_port)
    names = ("calls_in_flight", "requests_running", "requests_queued")
    assert [found[series(name)] for name in names] == [3, 2, 1]
    assert [after[series(name)] for name in names] == [0, 0, 0]
    assert found[series("requests_running_limit")] == 2
    assert found[series("requests_queued_limit")] == 7
    assert found[series("kv_cache_utilization_ratio", model="fake")] == 0.25


class Broken(FakeEngine):
    """Its load cannot be told: ``load`` raises, or never returns."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__()
        self.hangs = hangs

    async def load(self) -> EngineLoad | None:
        if self.hangs:
            await asyncio.Event().wait()
        raise RuntimeError("broken")


@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
async def test_an_engine_that_cannot_tell_its_load_does_not_hide_the_metrics(hangs: bool) -> None:
    async with running(Broken(hangs=hangs), admin_port=0) as started:
        found = await samples(started.server.admin_port)
    assert found[series("requests_running")] == 0
    assert not any(name == "qwen3vl_kv_cache_utilization_ratio" for name, _ in found)


@pytest.mark.parametrize("old", [True, False], ids=["old names", "new names"])
def test_old_names_of_the_settings(
    old: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "metrics" if old else "admin"
    settings = read_settings("serve", [f"--{name}-port", "9090", f"--{name}-host=::1"])
    assert settings is not None
    assert (settings.admin_port, settings.admin_host) == (9090, "::1")
    assert ("--metrics-port is now called --admin-port." in capsys.readouterr().err) is old
    monkeypatch.setenv(f"QWEN3VL_{name.upper()}_PORT", "9091")
    assert load_settings().admin_port == 9091
