"""Servers to attack: the command itself on the bundled model, or the fake engine with a set pace."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.soak.load import write_keys
from service.client import CHANNEL_OPTIONS
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 120.0
MIB = 1 << 20
KEYS = {"attacker": "key of the attacker", "ordinary": "key of an ordinary caller"}


@dataclass
class Server:
    """A server in a process of its own. keys: the names of callers and their keys; empty: none needed."""

    address: str
    process: psutil.Popen
    folder: Path
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def keys_file(self) -> Path:
        return self.folder / "keys"

    def metadata(self, caller: str = "ordinary") -> tuple[tuple[str, str], ...]:
        return (("x-api-key", self.keys[caller]),) if self.keys else ()

    def memory_mib(self) -> float:
        """Resident memory of the server and its workers."""
        found = 0
        for one in (self.process, *self.process.children(recursive=True)):
            try:
                found += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return found / MIB

    def hang_up(self) -> None:
        """The signal that makes a server read its keys again."""
        self.process.send_signal(signal.SIGHUP)

    def stop_s(self) -> float:
        """Seconds from SIGTERM to the end."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.monotonic() - begun


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def serving(
    *arguments: str,
    engine: str = "reference",
    keys: bool = False,
    environment: Mapping[str, str] | None = None,
    stderr: int | IO[Any] | None = None,
    preexec: Any = None,
    wait: bool = True,
    root: Path = ROOT,
) -> Iterator[Server]:
    """``qwen3vl serve`` with these arguments, killed at the end.

    wait: until it serves. root: of another checkout.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["--engine", engine]
        if keys:
            write_keys(folder / "keys", KEYS)
            words += ["--api-keys-file", str(folder / "keys")]
        port = free_port()
        command = [sys.executable, "-m", "service", "serve", "--port", str(port), *words]
        words = [*command, *arguments]
        with _running(words, folder, environment, stderr, preexec, root) as process:
            server = Server(f"127.0.0.1:{port}", process, folder, KEYS if keys else {})
            if wait:
                _wait_until_serving(server)
            yield server


@contextmanager
def paced(
    delay_s: float, pieces: int, *, keys: bool = False, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server on the fake engine whose answers have so many pieces, each after a delay."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = free_port()
        # gRPC's own log is off, as in the command.
        variables = {"GRPC_VERBOSITY": "NONE", "QWEN3VL_PORT": str(port), **(environment or {})}
        if keys:
            write_keys(folder / "keys", KEYS)
            variables["QWEN3VL_API_KEYS_FILE"] = str(folder / "keys")
        command = [sys.executable, "-m", "benchmarks.attack.paced", str(delay_s), str(pieces)]
        with _running(command, folder, variables, None, None) as process:
            server = Server(f"127.0.0.1:{port}", process, folder, KEYS if keys else {})
            _wait_until_serving(server)
            yield server


@contextmanager
def _running(
    command: list[str],
    folder: Path,
    environment: Mapping[str, str] | None,
    stderr: int | IO[Any] | None,
    preexec: Any,
    root: Path = ROOT,
) -> Iterator[psutil.Popen]:
    with (folder / "log").open("w") as log:
        process = psutil.Popen(
            command,
            cwd=root,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=log if stderr is None else stderr,
            preexec_fn=preexec,
        )
        try:
            yield process
        finally:
            children = process.children(recursive=True) if process.is_running() else []
            for one in (process, *children):
                if one.is_running():
                    one.kill()
            process.wait(30)
            if process.stderr is not None:
                process.stderr.close()


def _wait_until_serving(server: Server) -> None:
    end = time.monotonic() + START_LIMIT_S
    with grpc.insecure_channel(server.address, options=_RECONNECT) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < end and server.process.poll() is None:
            try:
                found = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                time.sleep(0.1)
                continue
            if found.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(0.05)
    raise RuntimeError(f"The server did not start:\n{server.log}")


_RECONNECT = [(f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")]


@contextmanager
def peak(server: Server) -> Iterator[list[float]]:
    """Memory that the server has more than before at most while the body runs, in MiB, at [0]."""
    import threading

    before = server.memory_mib()
    found = [0.0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            found[0] = max(found[0], server.memory_mib() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def channel_to(server: Server) -> grpc.aio.Channel:
    """A connection of its own."""
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(server.address, options=options)


def text_request(text: str = "Describe.", **grammar: Any) -> pb.RunTaskRequest:
    """A request without images."""
    constraint = pb.Grammar(**grammar) if grammar else None
    return pb.RunTaskRequest(task=pb.Task(inline=pb.InlineTask(user=text, grammar=constraint)))


async def waits(
    server: Server, request: pb.RunTaskRequest, seconds: float, pause_s: float = 0.1
) -> list[float]:
    """Seconds of the calls of an ordinary caller, one after the other; a refused one counts as 60."""
    found = []
    end = time.monotonic() + seconds
    async with channel_to(server) as channel:
        stub: Any = VisionServiceStub(channel)
        while time.monotonic() < end:
            begun = time.monotonic()
            try:
                await stub.RunTask(request, metadata=server.metadata(), timeout=60)
                found.append(time.monotonic() - begun)
            except grpc.aio.AioRpcError:
                found.append(60.0)
            await asyncio.sleep(pause_s)
    return found
