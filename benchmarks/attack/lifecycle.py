"""Faults around the server: engines that fail, killed workers, signals, revoked keys, nobody who reads the log."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.attack.case import Value, case, health, share, true
from benchmarks.attack.probe import probing
from benchmarks.attack.servers import (
    KEYS,
    ROOT,
    Server,
    channel_to,
    free_port,
    serving,
    text_request,
)
from benchmarks.attack.sharing import heavy
from benchmarks.soak.load import WORKER, write_keys
from service.client import CHANNEL_OPTIONS, read_error
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.service.certificates import Authority
from tests.service.harness import failure, run_request, running


def ask(server: Server, caller: str = "ordinary", limit_s: float = 10) -> str:
    """One call: OK or the reason of its end."""

    async def one() -> str:
        async with channel_to(server) as channel:
            stub: Any = VisionServiceStub(channel)
            try:
                await stub.RunTask(
                    text_request(), metadata=server.metadata(caller), timeout=limit_s
                )
            except grpc.aio.AioRpcError as error:
                return read_error(error).reason or error.code().name
        return "OK"

    return asyncio.run(one())


def seconds_until(condition: Callable[[], bool], limit_s: float) -> float:
    """How long it takes until a condition holds; infinite where it does not in time."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > limit_s:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - begun


@case("revoked-key", "a key is taken out of the keys file", "still accepted until a restart")
def revoked_key(short: bool) -> Iterable[Value]:
    only = {"ordinary": KEYS["ordinary"]}
    with serving(engine="fake", keys=True) as server:
        before = ask(server, "attacker")
        write_keys(server.keys_file, only)
        watched = seconds_until(lambda: ask(server, "attacker") == "API_KEY_INVALID", 30)
        write_keys(server.keys_file, KEYS)
        server.hang_up()
        signalled = seconds_until(lambda: ask(server, "attacker") == "OK", 30)
        others = ask(server)
    yield true("the key works before", before == "OK")
    yield Value("refused after the file has changed", watched, "s", 15)
    yield Value("a new key accepted after SIGHUP", signalled, "s", 5)
    yield true("the other key works all the time", others == "OK")


@case("hangup", "SIGHUP, ten times", "the process ends at once, calls are cut")
def hangup(short: bool) -> Iterable[Value]:
    with serving(engine="fake") as server:
        for _ in range(10):
            server.hang_up()
            time.sleep(0.05)
        time.sleep(0.5)
        alive = server.process.is_running() and server.process.poll() is None
        yield true("the server lives", alive)
        yield true("and answers", alive and ask(server) == "OK")


@case("dead-engine", "the engine fails its health checks, then works again", "NOT_SERVING for ever")
def dead_engine(short: bool) -> Iterable[Value]:
    refused, back = asyncio.run(_recovery())
    yield true("calls are refused as ENGINE_UNHEALTHY meanwhile", refused == "ENGINE_UNHEALTHY")
    yield Value("from the repair to the first answer", back, "s", 5)


async def _recovery() -> tuple[str | None, float]:
    engine = FakeEngine()
    async with running(engine, health_interval_s=0.2) as started:
        engine.healthy = False
        await asyncio.sleep(1)
        refused = (await failure(started.stub.RunTask(run_request(), timeout=5))).reason
        engine.healthy = True
        begun = time.monotonic()
        while time.monotonic() - begun < 30:
            try:
                await started.stub.RunTask(run_request(), timeout=5)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
                continue
            return refused, time.monotonic() - begun
    return refused, float("inf")


def status_of(port: int, path: str) -> int:
    """HTTP status of a page; 0 where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


@case(
    "probes",
    "a kubelet asks the admin port while the model loads and when it serves",
    "200 for every path, at any time",
)
def probes(short: bool) -> Iterable[Value]:
    port = free_port()
    with serving("--admin-port", str(port), wait=False) as server:
        seconds_until(lambda: status_of(port, "/livez") != 0, 60)
        loading = {path: status_of(port, path) for path in ("/livez", "/readyz")}
        ready = seconds_until(lambda: status_of(port, "/readyz") == 200, 120)
        pages = ("/livez", "/readyz", "/healthz", "/metrics", "/version", "/anything")
        found = {path: status_of(port, path) for path in pages}
        answer = ask(server)
    yield true(f"while it loads: {loading}", loading == {"/livez": 200, "/readyz": 503})
    wanted = {**dict.fromkeys(pages, 200), "/anything": 404}
    yield true("livez, readyz, healthz, metrics, version: 200; anything else: 404", found == wanted)
    yield true("ready means that calls are answered", ready < 120 and answer == "OK")


def health_command() -> list[str]:
    """The command of the Dockerfile's HEALTHCHECK."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    found = re.search(r"^HEALTHCHECK .*?CMD (\[.*\])$", text, re.M)
    assert found is not None
    python, *arguments = json.loads(found[1])
    assert python == "python"
    return [sys.executable, *arguments]


@case(
    "docker-health",
    "Docker's HEALTHCHECK under mutual TLS and with http_proxy set to nowhere",
    "unhealthy",
)
def docker_health(short: bool) -> Iterable[Value]:
    with tempfile.TemporaryDirectory() as name:
        authority = Authority.create(Path(name))
        cert, key = authority.issue("server")
        settings = {
            "QWEN3VL_TLS_CERT": str(cert),
            "QWEN3VL_TLS_KEY": str(key),
            "QWEN3VL_TLS_CLIENT_CA": str(authority.cert),
            "QWEN3VL_PORT": str(free_port()),
            "QWEN3VL_ADMIN_PORT": str(free_port()),
        }
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
        environment = {**os.environ, **settings, **proxies}
        command = [sys.executable, "-m", "service", "serve", "--engine", "fake"]
        with (Path(name) / "log").open("w") as log:
            process = psutil.Popen(command, cwd=ROOT, env=environment, stderr=log)
            try:
                took = seconds_until(
                    lambda: (
                        subprocess.run(
                            health_command(), cwd=ROOT, env=environment, capture_output=True
                        ).returncode
                        == 0
                    ),
                    60,
                )
            finally:
                process.kill()
                process.wait(30)
    yield Value("healthy after", took, "s", 60)


@case(
    "foreign-certificate",
    "mutual TLS: a certificate of the right CA that is not on the list of names",
    "accepted, and the log says caller=-",
)
def foreign_certificate(short: bool) -> Iterable[Value]:
    with tempfile.TemporaryDirectory() as name:
        authority = Authority.create(Path(name))
        cert, key = authority.issue("server")
        names = Path(name) / "names.txt"
        names.write_text("listed\n")
        tls = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", authority.cert)
        arguments = (*map(str, tls), "--tls-client-names-file", str(names))
        with serving(*arguments, engine="fake", wait=False) as server:
            listed = asyncio.run(_with_certificate(server, authority, "listed"))
            foreign = asyncio.run(_with_certificate(server, authority, "foreign"))
            log = server.log
    yield true(f"the listed one is answered ({listed})", listed == "OK")
    yield true("and the log has its name", "caller=listed" in log)
    yield true(f"the other is refused ({foreign})", foreign == "CERTIFICATE_NOT_ALLOWED")


async def _with_certificate(server: Server, authority: Authority, name: str) -> str:
    cert, key = authority.issue(name)
    credentials = grpc.ssl_channel_credentials(
        authority.cert.read_bytes(), key.read_bytes(), cert.read_bytes()
    )
    address = f"localhost:{server.port}"
    async with grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS) as channel:
        stub: Any = VisionServiceStub(channel)
        end = time.monotonic() + 60
        while True:
            try:
                await stub.RunTask(text_request(), timeout=60, wait_for_ready=True)
                return "OK"
            except grpc.aio.AioRpcError as error:
                found = read_error(error).reason or error.code().name
            if found not in ("ENGINE_LOADING", "UNAVAILABLE") or time.monotonic() > end:
                return found
            await asyncio.sleep(0.1)


@case(
    "killed-worker",
    "the processes that analyse grammars are killed while an innocent schema is in them",
    "INVALID_ARGUMENT, remembered for 60 s",
)
def killed_worker(short: bool) -> Iterable[Value]:
    with serving(engine="fake") as server, probing(server.address) as probe:
        first, second = asyncio.run(_with_killed_workers(server))
    yield true(f"the call is answered, or UNAVAILABLE ({first})", first in ("OK", "UNAVAILABLE"))
    yield true(f"the same schema again is answered ({second})", second == "OK")
    yield health(probe)


async def _with_killed_workers(server: Server) -> tuple[str, str]:
    async with channel_to(server) as channel:
        stub: Any = VisionServiceStub(channel)
        grammar = pb.Grammar(json_schema=heavy(1))

        async def analysed() -> str:
            try:
                await stub.ValidateSchema(pb.ValidateSchemaRequest(grammar=grammar), timeout=60)
            except grpc.aio.AioRpcError as error:
                code = error.code()
                if code is grpc.StatusCode.UNAVAILABLE:
                    return "UNAVAILABLE"
                return read_error(error).reason or code.name
            return "OK"

        waiting = asyncio.create_task(analysed())
        await asyncio.sleep(0.15)
        for child in server.process.children(recursive=True):
            if WORKER in " ".join(child.cmdline()):
                child.kill()
        return await waiting, await analysed()


@case("unread-log", "nobody reads stderr while 2,000 calls are logged", "stops after 304 calls")
def unread_log(short: bool) -> Iterable[Value]:
    calls = 500 if short else 2000
    with serving(engine="fake", stderr=subprocess.PIPE) as server:
        with probing(server.address) as probe:
            answered = asyncio.run(_calls(server, calls))
        stop_s = server.stop_s()
    yield share("calls answered", answered, calls)
    yield Value("from SIGTERM to the end", stop_s, "s", 10)
    yield health(probe)


async def _calls(server: Server, count: int) -> int:
    """How many of so many calls are answered, 8 at a time, within 5 s each; ends at the first that is not."""
    async with channel_to(server) as channel:
        stub: Any = VisionServiceStub(channel)
        answered = 0
        for _ in range(count // 8 + (count % 8 > 0)):
            group = [stub.RunTask(text_request(), timeout=5) for _ in range(min(8, count))]
            found = await asyncio.gather(*group, return_exceptions=True)
            fine = sum(not isinstance(one, BaseException) for one in found)
            answered += fine
            if fine < len(group):
                break
    return min(answered, count)
