"""Proxies of the environment: never for this machine; named in an error elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from service.client import Proxy, is_loopback, proxy_of
from tests.service.cli.terminal import Outcome, called
from tests.service.harness import running

HOST = "gpu.example.internal"


@asynccontextmanager
async def proxy(answer: bytes = b"") -> AsyncIterator[tuple[str, list[bytes]]]:
    """HOST:PORT of a proxy that says no, and the first lines of the requests that it got."""
    seen: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readline())
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", seen


def calls(seen: list[bytes], server: str) -> list[bytes]:
    """Those for this server: a client of another test may take the proxy for one that had its port
    before."""
    return [line for line in seen if server.encode() in line]


async def asked(server: str, *words: object, **env: str) -> Outcome:
    return await called(*words, "--server", server, env=env)


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "dns:///localhost", "ipv4:127.0.0.1"])
@pytest.mark.slow
async def test_no_proxy_stands_between_the_processes_of_a_machine(variable: str, host: str) -> None:
    async with proxy() as (address, seen), running() as started:
        server = f"{host}:{started.server.port}"
        env = {variable: f"http://{address}"}
        healthy = await asked(server, "health", **env)
        tasks = await asked(server, "tasks", **env)
    assert (healthy.code, healthy.out) == (0, "SERVING\n")
    assert tasks.out.startswith("image-analysis")
    assert calls(seen, str(started.server.port)) == []


async def test_no_proxy_for_tls_on_this_machine(certificate: Path) -> None:
    key = certificate.with_suffix(".key")
    async with proxy() as (address, seen), running(tls_cert=certificate, tls_key=key) as started:
        server = f"localhost:{started.server.port}"
        done = await asked(server, "tasks", "--ca", certificate, https_proxy=f"http://{address}")
    assert (done.code, calls(seen, server)) == (0, [])


async def test_a_proxy_that_refuses_is_named_without_its_password() -> None:
    async with proxy(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n") as (address, seen):
        server = f"{HOST}:50051"
        done = await asked(server, "tasks", http_proxy=f"http://me:secret@{address}")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"{server}: HTTP status 407 came through the proxy {address} that http_proxy names. Check "
        f"the proxy, or add {HOST} to no_proxy to call it directly.\n"
    )
    assert seen
    assert seen[0].startswith(f"CONNECT {server}".encode())


async def test_a_proxy_that_is_not_there_is_named() -> None:
    async with proxy() as (address, _):
        pass
    done = await asked(f"{HOST}:50051", "health", grpc_proxy=f"http://{address}")
    assert done.code == 1
    assert f"No server answers through the proxy {address} that grpc_proxy names" in done.err


async def test_a_proxy_that_is_not_used_is_not_blamed() -> None:
    async with proxy() as (address, seen):
        env = {"http_proxy": f"http://{address}", "no_proxy": f"other.example,{HOST}"}
        done = await asked(f"{HOST}:50051", "tasks", **env)
    assert done.code == 1
    assert "proxy" not in done.err
    assert calls(seen, HOST) == []


@pytest.mark.parametrize(
    ("address", "is_ours"),
    [
        ("localhost:1", True),
        ("LOCALHOST.:1", True),
        ("me.localhost:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("[::]:1", True),
        ("0.0.0.0:1", True),
        ("unix:/run/qwen3vl.sock", True),
        ("dns://8.8.8.8/localhost:1", True),
        ("ipv6:[::1]:1", True),
        ("localhost.example.com:1", False),
        ("10.0.0.1:1", False),
        ("[2001:db8::1]:1", False),
        ("127.0.0.1.example.com:1", False),
    ],
)
def test_addresses_of_this_machine(address: str, is_ours: bool) -> None:
    assert is_loopback(address) is is_ours


def test_grpc_uses_the_same_proxy_as_proxy_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert proxy_of(f"{HOST}:1") is None
    monkeypatch.setenv("http_proxy", "http://second:2")
    monkeypatch.setenv("https_proxy", "http://me:secret@first:1")
    assert proxy_of(f"{HOST}:1") == Proxy("first:1", "https_proxy")
    assert proxy_of("localhost:1") is None
    monkeypatch.setenv("no_proxy", "other.example, .Example.internal,10.0.0.0/8")
    assert proxy_of(f"{HOST}:1") is None
    assert proxy_of("10.1.2.3:1") is None
    assert proxy_of("11.1.2.3:1") is not None
    monkeypatch.setenv("no_grpc_proxy", "other.example")  # gRPC reads no_proxy no more then
    assert proxy_of(f"{HOST}:1") is not None
    monkeypatch.setenv("https_proxy", "socks5://first:1")  # gRPC takes none of the others then
    assert proxy_of(f"{HOST}:1") is None
