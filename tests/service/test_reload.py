"""Keys, quotas, names and certificates are read again while the server runs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest

from service import reload
from service.client import read_error
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.settings import SettingsError
from tests.service.admin_pages import samples
from tests.service.certificates import Authority
from tests.service.harness import Running, run_request, running, separate, until

LIMIT_S = 20.0


def digest(name: str) -> str:
    return hashlib.sha256(f"key of {name}".encode()).hexdigest()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "POLL_S", 0.02)


@pytest.fixture
def keys(tmp_path: Path, quick: None) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"phone:{digest('phone')}\nshop:{digest('shop')}\n")
    return path


async def outcome(started: Running, caller: str) -> str:
    """The reason of the error of a call, or OK."""
    metadata = (("x-api-key", f"key of {caller}"),)
    try:
        await started.stub.RunTask(run_request(), metadata=metadata, timeout=60)
    except grpc.aio.AioRpcError as error:
        return read_error(error).reason
    return "OK"


def replace(path: Path, text: str) -> None:
    """Write a file in one step, so that nobody reads half of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


async def logged(caplog: pytest.LogCaptureFixture, text: str, times: int = 1) -> str:
    """Wait for log lines with a text. Returns the newest."""

    def lines() -> list[str]:
        return [line for line in caplog.messages if text in line]

    await until(lambda: len(lines()) >= times, LIMIT_S)
    return lines()[-1]


async def test_a_removed_key_is_refused_and_a_new_key_works(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service")
    async with running(api_keys_file=keys) as started:
        assert await outcome(started, "phone") == "OK"
        replace(
            keys,
            f"shop:{digest('other')}\ntablet:{digest('tablet')}\nold:{digest('shop')} queue=1\n",
        )
        line = await logged(caplog, "api keys reloaded")
        assert "added=old,tablet removed=phone key_changed=shop quota_changed=-" in line
        assert await outcome(started, "phone") == "API_KEY_INVALID"
        assert await outcome(started, "tablet") == "OK"
        assert await outcome(started, "other") == "OK"
    for name in ("phone", "shop", "other", "tablet"):
        assert digest(name) not in caplog.text


async def counted(started: Running) -> dict[str, int]:
    """Callers that have series -> their calls."""
    found: Counter[str] = Counter()
    for (name, labels), value in (await samples(started.server.admin_port)).items():
        if name in ("qwen3vl_caller_calls_total", "qwen3vl_caller_tokens_total"):
            found[dict(labels)["caller"]] += int(value) if "calls" in name else 0
    return found


async def test_the_series_of_a_removed_caller_go_away(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service")
    async with running(api_keys_file=keys, admin_port=0) as started:
        before = await counted(started)
        assert await outcome(started, "phone") == await outcome(started, "shop") == "OK"
        started.engine.hang_after = 0
        late = asyncio.create_task(outcome(started, "phone"))
        await until(lambda: started.engine.active_requests == 1)
        replace(keys, f"shop:{digest('shop')}\n")
        await logged(caplog, "api keys reloaded")
        found = await counted(started)
        assert "phone" not in found
        assert found["shop"] == before.get("shop", 0) + 1
        late.cancel()  # a call of the removed caller that ends now
        await until(lambda: started.server.lifecycle.calls_in_flight == 0)
        found = await counted(started)
        assert "phone" not in found
        assert found["other"] == before.get("other", 0) + 1
        started.engine.hang_after = None
        replace(keys, f"phone:{digest('phone')}\nshop:{digest('shop')}\n")
        await logged(caplog, "api keys reloaded", 2)
        assert await outcome(started, "phone") == "OK"
        assert (await counted(started))["phone"] == 1


async def test_changed_quotas_hold_for_the_next_call(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service")
    async with running(api_keys_file=keys) as started:
        started.server.runtime.budgets.quotas._clock = lambda: 0.0
        for _ in range(3):
            assert await outcome(started, "phone") == "OK"
        replace(keys, f"phone:{digest('phone')} requests_per_minute=1\nshop:{digest('shop')}\n")
        line = await logged(caplog, "api keys reloaded")
        assert "added=- removed=- key_changed=- quota_changed=phone" in line
        assert await outcome(started, "phone") == "OK"
        assert await outcome(started, "phone") == "QUOTA_EXCEEDED"
        assert await outcome(started, "shop") == "OK"


async def test_a_broken_file_changes_nothing(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service")
    async with running(api_keys_file=keys) as started:
        replace(keys, f"tablet:{digest('tablet')}\nshop:{digest('shop')} concurrent=none\n")
        line = await logged(caplog, "not reloaded, what was read before stays in use")
        assert "api_keys_file: line 2: concurrent=none must be a whole number" in line
        assert await outcome(started, "phone") == "OK"
        assert await outcome(started, "tablet") == "API_KEY_INVALID"
        keys.unlink()
        line = await logged(caplog, "not reloaded, what was read before stays in use", 2)
        assert "cannot be read" in line
        assert await outcome(started, "phone") == "OK"
        replace(keys, f"tablet:{digest('tablet')}\n")
        await logged(caplog, "api keys reloaded")
        assert await outcome(started, "phone") == "API_KEY_INVALID"
        assert await outcome(started, "tablet") == "OK"


async def test_a_link_that_points_elsewhere_is_noticed(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Kubernetes changes the files of a secret by a link to another folder; times may be equal."""
    caplog.set_level(logging.INFO, "service")
    for version, name in (("v1", "phone"), ("v2", "shops")):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "keys").write_text(f"{name}:{digest(name)}\n")
        os.utime(folder / "keys", ns=(1, 1))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys").symlink_to("..data/keys")
    async with running(api_keys_file=tmp_path / "keys") as started:
        assert await outcome(started, "phone") == "OK"
        (tmp_path / "..new").symlink_to("v2")
        (tmp_path / "..new").rename(tmp_path / "..data")
        assert "added=shops removed=phone" in await logged(caplog, "api keys reloaded")
        assert await outcome(started, "phone") == "API_KEY_INVALID"


def test_a_file_that_cannot_be_read_for_a_moment_is_read_again(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without another change of the file; the error is in the log once."""
    reads: list[str] = []

    def read() -> None:
        reads.append(keys.read_text())
        if len(reads) < 4:
            raise SettingsError("no descriptor is free")

    watched = reload._Watched((keys,), read, reload.stamp([keys]))
    replace(keys, "revoked")
    for _ in range(6):
        reload._look(watched, asked=False)
    assert reads == ["revoked"] * 4, "what was read is not read again"
    assert sum("no descriptor is free" in line for line in caplog.messages) == 1
    reads.clear()
    reload._look(watched, asked=True)
    reload._look(watched, asked=True)
    assert len(reads) == 2, "SIGHUP reads always"
    assert sum("no descriptor is free" in line for line in caplog.messages) == 3


def test_a_change_that_keeps_size_and_time_is_noticed(keys: Path) -> None:
    before, times = reload.stamp([keys]), keys.stat()
    while keys.stat().st_ctime_ns == times.st_ctime_ns:  # its clock may tick every few milliseconds
        keys.write_text(keys.read_text().replace("phone", "shops"))
        os.utime(keys, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert reload.stamp([keys]) != before


@pytest.mark.slow
def test_sighup_reloads_and_the_server_goes_on(tmp_path: Path) -> None:
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"phone:{digest('phone')}\n")
    environment = {"QWEN3VL_API_KEYS_FILE": str(keys)}
    arguments = {"grace_s": 5.0, "delay_s": 0.0, "pieces": 1, "log": log}
    with separate(**arguments, environment=environment) as (server, address):  # type: ignore[arg-type]
        server.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + LIMIT_S
        while "api keys reloaded added=- removed=- key_changed=-" not in log.read_text():
            assert server.poll() is None, "the signal ended the server"
            assert time.monotonic() < deadline, "the unchanged file was not read again"
            time.sleep(0.05)
        with grpc.insecure_channel(address) as channel:
            metadata = (("x-api-key", "key of phone"),)
            assert VisionServiceStub(channel).RunTask(run_request(), metadata=metadata, timeout=60)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


async def test_certificates_that_cannot_be_used_are_in_the_log(
    tmp_path: Path, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service")
    cert, key = Authority.create(tmp_path).issue("server")
    async with running(tls_cert=cert, tls_key=key):
        good = cert.read_text()
        replace(cert, "not a certificate")
        line = await logged(caplog, "not reloaded, what was read before stays in use")
        assert "tls_cert, tls_key, tls_client_ca: must be PEM files" in line
        replace(cert, good)
        await logged(caplog, "certificate files were renewed")
