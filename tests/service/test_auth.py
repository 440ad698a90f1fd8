"""API keys, TLS and mTLS, with certificates made for the test by the openssl command."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.auth import Access, ApiKeys, CertificateNames
from service.client import read_error
from service.engines.fake import FakeEngine
from service.errors import Unauthenticated
from service.grpc_api.server import VisionServer
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.quotas import ANONYMOUS, Caller, Quota
from service.settings import Settings, SettingsError
from service.tasks.registry import load_registry
from tests.service.certificates import Authority, openssl
from tests.service.harness import failure, run_request, running

KEY = "correct-horse-battery-staple"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# callers\n\nshop:{digest('other')}\nphone:{digest(KEY).upper()}\n")
    return path


# Keys


@pytest.mark.parametrize(
    ("metadata", "caller"),
    [
        ({"authorization": f"Bearer {KEY}"}, "phone"),
        ({"authorization": f"bearer  {KEY} "}, "phone"),
        ({"x-api-key": KEY}, "phone"),
        ({"x-api-key": "other"}, "shop"),
    ],
)
def test_known_keys(keys_file: Path, metadata: dict[str, str | bytes], caller: str) -> None:
    assert ApiKeys.read(keys_file).caller(metadata).name == caller


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "API_KEY_MISSING"),
        ({"authorization": ""}, "API_KEY_MISSING"),
        ({"authorization": f"Basic {KEY}"}, "API_KEY_MISSING"),
        ({"authorization": "Bearer "}, "API_KEY_MISSING"),
        ({"x-api-key": "wrong"}, "API_KEY_INVALID"),
        ({"x-api-key": digest(KEY)}, "API_KEY_INVALID"),
        ({"x-api-key": b"\xff"}, "API_KEY_INVALID"),
    ],
)
def test_refused_keys(keys_file: Path, metadata: dict[str, str | bytes], reason: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        ApiKeys.read(keys_file).caller(metadata)
    assert refused.value.reason == reason
    assert KEY not in refused.value.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("phone:plain-key", "line 1"),
        (f"ok:{digest(KEY)}\n:{digest(KEY)}", "line 2"),
        (f"a:{digest(KEY)}\na:{digest('b')}", "line 2"),
        (
            f"a:{digest(KEY)}\nb:{digest(KEY).upper()} concurrent=1",
            "line 2: b has the key of a; every name needs a key of its own",
        ),
        ("# nothing\n", "no key"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(SettingsError, match=says) as refused:
        ApiKeys.read(path)
    assert "plain-key" not in str(refused.value)


async def test_every_method_but_health_asks_for_the_key(keys_file: Path) -> None:
    async with running(api_keys_file=keys_file) as started:
        error = await failure(started.stub.RunTask(run_request(), timeout=60))
        assert (error.code, error.reason) == (UNAUTHENTICATED, "API_KEY_MISSING")
        wrong = (("x-api-key", "wrong"),)
        error = await failure(started.stub.RunTask(run_request(), timeout=60, metadata=wrong))
        assert (error.code, error.reason) == (UNAUTHENTICATED, "API_KEY_INVALID")
        right = (("authorization", f"Bearer {KEY}"),)
        await started.stub.RunTask(run_request(), timeout=60, metadata=right)

        health = health_pb2_grpc.HealthStub(started.channel)
        status = await health.Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert status.status == health_pb2.HealthCheckResponse.SERVING

        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(started.channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            # Without a message: grpcio calls it an internal error when one comes after the refusal.
            await stub.ServerReflectionInfo(timeout=60).read()
        assert refused.value.code() is UNAUTHENTICATED
        answer = await stub.ServerReflectionInfo(iter([request]), timeout=60, metadata=right).read()
        assert answer.list_services_response.service


# TLS


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path)


@asynccontextmanager
async def secure(**settings: Any) -> AsyncIterator[VisionServer]:
    server = VisionServer(Settings(port=0, **settings), FakeEngine(), load_registry(None))
    try:
        await server.start()
        await server.load()
        yield server
    finally:
        await server.stop(0)


async def call(
    server: VisionServer, *, ca: Path, cert: Path | None = None, key: Path | None = None
) -> str:
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(),
        key.read_bytes() if key else None,
        cert.read_bytes() if cert else None,
    )
    async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
        response = await VisionServiceStub(channel).RunTask(run_request(), timeout=60)
        return str(response.result.text)


async def unavailable(server: VisionServer, **files: Path) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(server, **files)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tls(authority: Authority) -> None:
    cert, key = authority.issue("server")
    async with secure(tls_cert=cert, tls_key=key) as server:
        assert await call(server, ca=authority.cert)
        async with grpc.aio.insecure_channel(f"localhost:{server.port}") as channel:
            error = await failure(VisionServiceStub(channel).RunTask(run_request(), timeout=60))
            assert error.code is grpc.StatusCode.UNAVAILABLE


async def test_mtls_needs_a_certificate_of_the_caller(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cert, key = authority.issue("server")
    own_cert, own_key = authority.issue("caller")
    async with secure(tls_cert=cert, tls_key=key, tls_client_ca=authority.cert) as server:
        assert await call(server, ca=authority.cert, cert=own_cert, key=own_key)
        await unavailable(server, ca=authority.cert)


async def test_renewed_certificates_are_used_without_a_restart(authority: Authority) -> None:
    cert, key = authority.issue("server")
    async with secure(tls_cert=cert, tls_key=key) as server:
        assert await call(server, ca=authority.cert)
        openssl(
            f"req -x509 -key {key} -days 1 -out {cert} -subj /CN=self "
            "-addext subjectAltName=DNS:localhost",
            authority.folder,
        )
        os.utime(cert, ns=(1, 1))
        assert await call(server, ca=cert)
        await unavailable(server, ca=authority.cert)
        shown = cert.read_bytes()
        cert.write_bytes(authority.issue("other")[0].read_bytes())  # not of this key
        assert grpc_certificate(server) == shown
        cert.unlink()  # a renewal that is half done: the last good files stay in use
        own = authority.folder / "copy.pem"
        own.write_bytes(grpc_certificate(server))
        assert await call(server, ca=own)


def grpc_certificate(server: VisionServer) -> bytes:
    """The certificate that the port shows."""
    return ssl.get_server_certificate(("localhost", server.port)).encode()


async def test_invalid_certificates_are_refused(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("not a certificate")
    key.write_text("not a key")
    with pytest.raises(SettingsError, match="tls_cert"):
        async with secure(tls_cert=cert, tls_key=key):
            pass


async def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    cert, _ = authority.issue("server")
    _, key = authority.issue("other")
    with pytest.raises(SettingsError, match="tls_key the key of tls_cert"):
        async with secure(tls_cert=cert, tls_key=key):
            pass


# Names of client certificates


@asynccontextmanager
async def mutual(authority: Authority, **settings: Any) -> AsyncIterator[VisionServer]:
    cert, key = authority.issue("server")
    files = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.cert}
    async with secure(**files, **settings) as server:
        server.runtime.budgets.quotas._clock = lambda: 0.0
        yield server


async def reason(
    server: VisionServer, authority: Authority, name: str, metadata: Any = (), san: str = ""
) -> str:
    """The reason of the error of a call with a certificate of this common name, or OK."""
    if san:
        (authority.folder / "names").write_text(f"subjectAltName={san}\n")
    cert, key = authority.issue(name)
    credentials = grpc.ssl_channel_credentials(
        authority.cert.read_bytes(), key.read_bytes(), cert.read_bytes()
    )
    async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials) as channel:
        try:
            await VisionServiceStub(channel).RunTask(run_request(), timeout=60, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            found = read_error(error)
            return f"{found.code.name} {found.reason}"
    return "OK"


def callers(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Who called, from the access log."""
    found = [re.search(r"caller=(\S+)", line) for line in caplog.messages if "RunTask" in line]
    return [one[1] for one in found if one]


async def test_the_common_name_of_a_certificate_is_the_caller(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    async with mutual(authority, key_requests_per_minute=1) as server:
        assert await reason(server, authority, "phone") == "OK"
        assert await reason(server, authority, "phone") == "RESOURCE_EXHAUSTED QUOTA_EXCEEDED"
        assert await reason(server, authority, "shop") == "OK"
    assert callers(caplog) == ["phone", "phone", "shop"]


async def test_only_listed_certificates_may_call(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    allowed = tmp_path / "allowed"
    allowed.write_text(
        '# who may call\nphone requests_per_minute=1\n"Acme \\"App\\""\nspiffe://acme/vision\n'
    )
    async with mutual(authority, tls_client_names_file=allowed) as server:
        assert await reason(server, authority, "phone") == "OK"
        assert await reason(server, authority, "phone") == "RESOURCE_EXHAUSTED QUOTA_EXCEEDED"
        refused = "PERMISSION_DENIED CERTIFICATE_NOT_ALLOWED"
        assert await reason(server, authority, "shop") == refused
        spiffe = "URI:spiffe://acme/vision,DNS:localhost"
        assert await reason(server, authority, "shop", san=spiffe) == "OK"
    assert callers(caplog) == ["phone", "phone", "-", "spiffe://acme/vision"]


async def test_certificate_and_key_where_both_are_set(
    authority: Authority, tmp_path: Path, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    allowed = tmp_path / "allowed"
    allowed.write_text("gateway\n")
    key = (("x-api-key", KEY),)
    both = {"tls_client_names_file": allowed, "api_keys_file": keys_file}
    async with mutual(authority, **both) as server:
        assert await reason(server, authority, "gateway") == "UNAUTHENTICATED API_KEY_MISSING"
        refused = "PERMISSION_DENIED CERTIFICATE_NOT_ALLOWED"
        assert await reason(server, authority, "shop", key) == refused
        assert await reason(server, authority, "gateway", key) == "OK"
    assert callers(caplog)[-1] == "phone"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no name in the file"),
        ("phone\n'shop", "line 2: a quote is not closed"),
        ("phone\nphone queue=1", "line 2 must be a name of a certificate that no other line has"),
        ("a b\n", "line 1: word 1 is not a quota"),
        ("'a b'\n'a\tb'\n", "line 2 must be a name .* not even with other blanks"),
        ("phone queue=x", "line 1: queue=x must be a whole number of at least 0"),
    ],
)
def test_lists_of_names_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "allowed"
    path.write_text(text)
    with pytest.raises(SettingsError, match=f"tls_client_names_file: {says}"):
        CertificateNames.read(path)


def test_names_with_blanks_are_one_word_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "allowed"
    path.write_text('"Acme App=1" queue=2\n')
    caller = CertificateNames.read(path).caller(["Acme App=1", "acme.example"])
    assert caller == Caller("Acme_App_1", Quota(queue=2))
    assert Access(Settings()).caller({}, ["Acme"]) == ANONYMOUS


@pytest.mark.parametrize("with_keys", [True, False])
def test_who_listens_hears_of_the_names_that_determine_callers(
    tmp_path: Path, with_keys: bool
) -> None:
    keys, names = tmp_path / "keys", tmp_path / "names"
    keys.write_text(f"a:{digest('a')}\nb:{digest('b')}\n")
    names.write_text("a\nc\n")
    ca = tmp_path / "ca.pem"
    ca.touch()
    access = Access(
        Settings(
            tls_cert=ca,
            tls_key=ca,
            tls_client_ca=ca,
            tls_client_names_file=names,
            api_keys_file=keys if with_keys else None,
        )
    )
    heard: list[tuple[set[str], set[str]]] = []
    access.changed = lambda added, removed: heard.append((added, removed))
    access.read()
    assert heard == [({"a", "b"} if with_keys else {"a", "c"}, set())]
    heard.clear()
    keys.write_text(f"b:{digest('b')}\nd:{digest('d')}\n")
    names.write_text("e\n")
    access.read()
    assert heard == [({"d"}, {"a"}) if with_keys else ({"e"}, {"a", "c"})]
