"""``qwen3vl health`` without --server, as Docker's health check runs it: the environment alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from service.lifecycle import Phase
from tests.service.certificates import Authority, openssl
from tests.service.cli.terminal import Outcome, called, qwen3vl
from tests.service.harness import Running, running, until

pytestmark = pytest.mark.slow


async def checked(started: Running, **env: object) -> Outcome:
    proxy = {name: str(env.pop(name)) for name in ("http_proxy",) if name in env}
    variables = {f"QWEN3VL_{name.upper()}": str(value) for name, value in env.items()} | proxy
    port = {"QWEN3VL_PORT": str(started.server.port)}
    return await called("health", env={**port, **variables})


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "localhost"])
async def test_the_target_has_the_port_of_the_environment(host: str) -> None:
    async with running() as started:
        done = await checked(started, host=host, insecure=True)
    assert (done.code, done.out, done.err) == (0, "SERVING\n", "")


@pytest.mark.parametrize(
    "names",
    ["DNS:grpc.example.com,DNS:other.example.com", "DNS:*.example.com", "IP:192.0.2.7"],
)
@pytest.mark.parametrize("issued", [True, False])
async def test_the_target_uses_a_name_of_the_certificate(
    tmp_path: Path, names: str, issued: bool
) -> None:
    """Issued by an authority that the container does not know, or self-signed."""
    authority = Authority.create(tmp_path)
    if issued:
        (tmp_path / "names").write_text(f"subjectAltName={names}\n")
        cert, key = authority.issue("server")
    else:
        cert, key = tmp_path / "server.pem", tmp_path / "server.key"
        openssl(
            "req -x509 -newkey ec:curve -nodes -days 1 -keyout server.key -out server.pem "
            f"-subj /CN=server -addext 'subjectAltName={names}'",
            tmp_path,
        )
    async with running(tls_cert=cert, tls_key=key) as started:
        tls = {"tls_cert": cert, "tls_key": key}
        done = await checked(started, host="0.0.0.0", insecure=True, **tls)
        without = await checked(started)
    assert (done.code, done.out, done.err) == (0, "SERVING\n", "")
    assert without.code == 1


async def test_another_server_on_the_port_is_not_healthy(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    other, other_key = authority.issue("other")
    async with running(tls_cert=other, tls_key=other_key) as started:
        done = await checked(started, tls_cert=cert, tls_key=key)
    assert done.code == 1
    assert "is not signed by --ca (default: QWEN3VL_TLS_CERT)" in done.err


async def test_a_certificate_of_callers_is_asked_for(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    own_cert, own_key = authority.issue("caller")
    tls = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.cert}
    async with running(**tls) as started:
        without = await checked(started, **tls)
        with_one = await checked(started, **tls, cert=own_cert, key=own_key)
    assert without.code == 1
    assert "--cert and --key" in without.err
    assert (with_one.code, with_one.out) == (0, "SERVING\n")


# The admin port


async def test_the_admin_port_is_asked_where_callers_need_certificates(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    tls = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.cert}
    async with running(**tls, admin_port=0, health_interval_s=0.02) as started:
        admin = {"admin_port": started.server.admin_port, "admin_host": "0.0.0.0"}
        done = await checked(started, **tls, **admin)
        proxied = await checked(started, **tls, **admin, http_proxy="http://192.0.2.1:3128")
        started.engine.healthy = False
        await until(lambda: started.server.lifecycle.phase is Phase.UNHEALTHY)
        unhealthy = await checked(started, **tls, **admin)
    gone = await checked(started, **tls, **admin)
    assert (done.code, done.out, done.err) == (0, "SERVING\n", "")
    assert (proxied.code, proxied.out) == (0, "SERVING\n")
    assert (unhealthy.code, unhealthy.out) == (1, "NOT_SERVING (unhealthy)\n")
    assert (gone.code, gone.out) == (1, "")
    assert gone.err.startswith("No admin port answers at 127.0.0.1:")


async def test_the_admin_port_is_waited_for() -> None:
    async with running(load=False, admin_port=0) as started:
        port = {"QWEN3VL_ADMIN_PORT": str(started.server.admin_port)}
        loading = await called("health", env=port)
        waiting = asyncio.ensure_future(called("health", "--wait", 60, env=port))
        await asyncio.sleep(0)
        await started.server.load()
        served = await waiting
    assert (loading.code, loading.out) == (1, "NOT_SERVING (loading)\n")
    assert (served.code, served.out) == (0, "SERVING\n")


def test_settings_that_are_wrong_are_named(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    _, key = authority.issue("server")
    other, _ = authority.issue("other")

    def health(**env: object) -> Outcome:
        return qwen3vl("health", env={f"QWEN3VL_{n}": str(value) for n, value in env.items()})

    no_number = health(PORT="many")
    assert no_number.code == 1
    assert no_number.err.startswith("--port (QWEN3VL_PORT): ")
    no_pair = health(TLS_CERT=other, TLS_KEY=key)
    assert no_pair.code == 1
    assert "(QWEN3VL_TLS_CERT): cannot be used with tls_key" in no_pair.err
    assert len(no_pair.err.splitlines()) == 1
