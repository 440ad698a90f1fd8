"""The light client for Python: retries, errors and deadlines against a real server, and its wheel."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2
from hatchling.builders.wheel import WheelBuilder

import qwen3vl
import service
from qwen3vl import AsyncClient, CallError, Client
from qwen3vl.v1 import vision_pb2 as pb
from qwen3vl.v1.vision_pb2_grpc import (
    VisionServiceServicer,
    add_VisionServiceServicer_to_server,
)
from service.engines.fake import FakeEngine
from service.errors import EngineUnavailable
from service.inference import admission
from service.pb.qwen3vl.v1 import vision_pb2 as service_pb
from service.types import Chunk, GenerateRequest
from tests.service.certificates import Authority
from tests.service.harness import Running, image_bytes, running, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "clients" / "python"
Calls = Callable[..., Any]


class Both:
    """Makes calls with the blocking client in a thread, or with the client for asyncio."""

    def __init__(self, blocking: bool) -> None:
        self.blocking = blocking

    async def __call__(
        self, started: Running | str, name: str, request: Any, **options: Any
    ) -> Any:
        """The response, or the events of a stream as a list."""
        address = started if isinstance(started, str) else started.address
        if self.blocking:
            return await asyncio.to_thread(self._block, address, name, request, options)
        async with AsyncClient(address, **options) as client:
            call = getattr(client, name)(request)
            return [event async for event in call] if name == "stream_task" else await call

    @staticmethod
    def _block(address: str, name: str, request: Any, options: dict[str, Any]) -> Any:
        with Client(address, **options) as client:
            found = getattr(client, name)(request)
            return list(found) if name == "stream_task" else found

    async def error(self, *arguments: Any, **options: Any) -> CallError:
        with pytest.raises(CallError) as caught:
            await self(*arguments, **options)
        return caught.value


@pytest.fixture(params=[True, False], ids=["blocking", "asyncio"])
def call(request: pytest.FixtureRequest) -> Both:
    return Both(request.param)


def task(**options: Any) -> pb.RunTaskRequest:
    inline = pb.InlineTask(user="Describe.")
    return pb.RunTaskRequest(task=pb.Task(inline=inline), **options)


def stream() -> pb.StreamTaskRequest:
    return pb.StreamTaskRequest(task=task().task)


async def test_every_method_calls(call: Both) -> None:
    methods = service_pb.DESCRIPTOR.services_by_name["VisionService"].methods
    image = pb.Image(data=image_bytes())
    requests: dict[str, Any] = {
        "analyze_image": pb.AnalyzeImageRequest(images=[image]),
        "run_task": task(),
        "stream_task": stream(),
        "list_tasks": None,
        "get_task": pb.GetTaskRequest(name="image-analysis"),
        "validate_schema": pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema="true")),
        "get_model": None,
        "list_models": None,
    }
    names = [re.sub(r"(?<!^)([A-Z])", r"_\1", one.name).lower() for one in methods]
    assert sorted(names) == sorted(requests)
    async with running() as started:
        tasks = await call(started, "list_tasks", None)
        requests["get_task"].name = tasks.tasks[0].name
        for name, request in requests.items():
            assert await call(started, name, request), name
        events = await call(started, "stream_task", stream())
        assert "".join(event.delta for event in events) == events[-1].result.text


async def test_an_error_has_typed_fields_and_a_readable_text(call: Both) -> None:
    async with running() as started:
        wrong = task(sampling=pb.SamplingOptions(temperature=3))
        error = await call.error(started, "run_task", wrong)
    assert (error.code, error.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "SAMPLING_OPTION_INVALID",
    )
    ((path, what),) = error.field_violations
    assert (path, error.retry_after_s) == ("sampling.temperature", None)
    assert f"reason SAMPLING_OPTION_INVALID, request id {error.request_id}" in str(error)
    assert f"{path} {what}" in str(error)
    assert isinstance(error.__cause__, grpc.RpcError)


@asynccontextmanager
async def full() -> AsyncIterator[tuple[Running, FakeEngine, Any]]:
    """A server whose only place is taken, by a call that hangs until it is cancelled."""
    engine = FakeEngine()
    async with running(engine, max_concurrent=1, max_queue=0) as started:
        engine.hang_after = 0
        hanging = started.stub.RunTask(service_pb.RunTaskRequest.FromString(
            task().SerializeToString()), timeout=30)  # fmt: skip
        await until(lambda: engine.active_requests == 1)
        engine.hang_after = None
        yield started, engine, hanging
        hanging.cancel()


@pytest.mark.parametrize(("name", "request_"), [("run_task", task()), ("stream_task", stream())])
async def test_a_refused_call_is_retried_after_the_retry_delay(
    call: Both, name: str, request_: Any
) -> None:
    async with full() as (started, engine, hanging):
        again = asyncio.ensure_future(call(started, name, request_, attempts=5))
        await asyncio.sleep(0.5)
        assert not again.done()
        hanging.cancel()
        await until(lambda: engine.active_requests == 0)
        assert await again


async def test_no_retry_where_it_is_off_or_the_deadline_is_before_it(
    call: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission.jitter, "uniform", lambda low, high: 60.0)
    async with full() as (started, _, _):
        begun = time.monotonic()
        for options in ({"attempts": 1}, {"timeout_s": 50}):
            error = await call.error(started, "run_task", task(), **options)
            assert (error.reason, error.retry_after_s) == ("OVERLOADED", 60.0)
        assert time.monotonic() - begun < 50  # it never waited the minute


@pytest.mark.parametrize("size", [0, 600_000], ids=["small", "above the default of gRPC"])
async def test_grpc_retries_a_call_while_the_model_loads(call: Both, size: int) -> None:
    """Its own policy, also for a request that it would not keep by default."""
    request = task(images=[pb.Image(data=image_bytes() + bytes(size))] if size else [])
    async with running(load=False) as started:
        error = await call.error(started, "run_task", request, attempts=1)
        assert error.reason == "ENGINE_LOADING"
        waiting = asyncio.ensure_future(call(started, "run_task", request, attempts=5))
        await asyncio.sleep(0.1)
        await started.server.load()
        assert await waiting


class Refusing(VisionServiceServicer):
    """Refuses every stream with a time to come again, some after a first piece of text."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.calls = 0

    async def StreamTask(self, request: Any, context: Any) -> AsyncIterator[pb.StreamTaskResponse]:  # type: ignore[override]
        self.calls += 1
        for _ in range(self.pieces):
            yield pb.StreamTaskResponse(delta="text")
        status = status_pb2.Status(code=8, message="full")
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(10)
        status.details.add().Pack(retry)
        details = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", details)


@pytest.mark.parametrize(("pieces", "calls"), [(0, 3), (1, 1)])
async def test_a_stream_is_retried_only_before_its_first_event(
    call: Both, pieces: int, calls: int
) -> None:
    refusing = Refusing(pieces)
    server = grpc.aio.server()
    add_VisionServiceServicer_to_server(refusing, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        error = await call.error(address, "stream_task", stream())
    finally:
        await server.stop(None)
    assert error.retry_after_s == 0.01
    assert refusing.calls == calls


class Dying(FakeEngine):
    """Every request ends the engine, after a number of chunks."""

    def __init__(self, chunks: int) -> None:
        super().__init__("one two three")
        self.chunks, self.requests = chunks, 0

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if request.request_id != "warm-up":
            self.requests += 1
            for _ in range(self.chunks):
                yield Chunk("one ")
            raise EngineUnavailable("The engine has ended.", reason="ENGINE_DEAD")
        async for chunk in super().generate(request):
            yield chunk


@pytest.mark.parametrize("name", ["run_task", "stream_task"])
@pytest.mark.parametrize(("chunks", "requests"), [(0, 3), (2, 1)])
async def test_a_call_is_not_sent_again_where_an_engine_died_of_it(
    call: Both, name: str, chunks: int, requests: int
) -> None:
    engine = Dying(chunks)
    async with running(engine) as started:
        asked = pb.StreamTaskRequest if name == "stream_task" else pb.RunTaskRequest
        inline = pb.Task(inline=pb.InlineTask(user="x"))
        error = await call.error(started, name, asked(task=inline), attempts=3, timeout_s=60)
    assert (error.reason, engine.requests) == ("ENGINE_DEAD", requests)


async def test_an_error_names_the_proxy(call: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        proxy = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("http_proxy", f"http://me:secret@{proxy}")
        error = await call.error("gpu.example.internal:50051", "get_model", None, attempts=1)
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.message.endswith(f" (through the proxy {proxy} that http_proxy names)")
    assert "secret" not in str(error)


async def test_a_deadline_ends_the_call(call: Both) -> None:
    engine = FakeEngine()
    async with running(engine) as started:
        engine.hang_after = 0
        error = await call.error(started, "run_task", task(), timeout_s=0.3)
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.active_requests == 0)


async def test_closing_a_stream_early_cancels_the_call() -> None:
    engine = FakeEngine()
    async with running(engine) as started:
        engine.hang_after = 1
        async with AsyncClient(started.address) as client:
            events = client.stream_task(stream())
            assert (await anext(events)).delta
            await events.aclose()
            await until(lambda: engine.active_requests == 0)


async def test_tls_and_a_key(call: Both, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)
    cert, key = authority.issue("server")
    keys = tmp_path / "keys"
    keys.write_text(f"me:{hashlib.sha256(b'secret').hexdigest()}\n")
    async with running(tls_cert=cert, tls_key=key, api_keys_file=keys) as started:
        given: dict[str, Any] = {"ca": str(authority.cert), "attempts": 1}
        assert await call(started, "run_task", task(), api_key="secret", **given)
        assert await call(started, "stream_task", stream(), api_key="secret", **given)
        error = await call.error(started, "run_task", task(), **given)
        assert error.reason == "API_KEY_MISSING"
        assert await call(
            started, "run_task", task(), api_key="secret", tls_name="localhost", **given
        )
        error = await call.error(started, "run_task", task(), tls_name="elsewhere", **given)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        error = await call.error(started, "run_task", task(), tls=True, attempts=1)
        assert error.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attempts": 0}, "attempts must be 1 to 5, not 0"),
        ({"timeout_s": 0}, "timeout_s must be above 0, not 0"),
        ({"cert": "c"}, "cert and key belong together"),
        ({"cert": "c", "key": "k"}, "cert and key need TLS"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_invalid_arguments_are_refused(kind: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind("localhost:1", **options)


# The distribution


def test_version_and_licence_are_those_of_the_project() -> None:
    assert qwen3vl.__version__ == service.__version__
    assert (FOLDER / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_stubs_are_those_of_the_service() -> None:
    def described(module: Any) -> descriptor_pb2.FileDescriptorProto:
        found = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(found)
        return found

    assert described(pb) == described(service_pb)


SCRIPT = """
import sys
import service
from qwen3vl import CallError, Client
from qwen3vl.v1 import vision_pb2 as pb
assert service.MINE
with Client(sys.argv[1], attempts=1) as client:
    task = pb.Task(inline=pb.InlineTask(user="Describe."))
    print(client.run_task(pb.RunTaskRequest(task=task)).result.model)
    try:
        client.get_task(pb.GetTaskRequest(name="none"))
    except CallError as error:
        print(error.reason)
print(sys.modules["qwen3vl"].__file__)
print(sorted({"torch", "numpy", "pydantic", "lmdeploy_ext"} & set(sys.modules)))
print(sorted(name for name in sys.modules if name.startswith("service.")))
"""


async def test_the_wheel_works_beside_the_callers_own_package_named_service(tmp_path: Path) -> None:
    (built,) = WheelBuilder(str(FOLDER)).build(
        directory=str(tmp_path / "dist"), versions=["standard"]
    )
    assert Path(built).name == f"qwen3vl_client-{service.__version__}-py3-none-any.whl"
    assert Path(built).stat().st_size < 1_000_000
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        needs = re.findall(r"^Requires-Dist: ([\w-]+)", wheel.read(metadata).decode(), re.M)
    assert {name.partition("/")[0] for name in names} == {"qwen3vl", metadata.partition("/")[0]}
    assert {"qwen3vl/py.typed", "qwen3vl/v1/vision_pb2_grpc.pyi"} <= set(names)
    assert set(needs) == {"grpcio", "protobuf", "googleapis-common-protos"}

    target, work = tmp_path / "target", tmp_path / "work"
    (work / "service").mkdir(parents=True)
    (work / "service" / "__init__.py").write_text("MINE = True\n")
    (work / "script.py").write_text(SCRIPT)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    install += ["--target", str(target), built]
    await asyncio.to_thread(subprocess.run, install, check=True, timeout=100)
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONWARNINGS": "error"}
    async with running() as started:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "script.py", started.address, cwd=work, env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, err.decode()) == (0, "")
    model, reason, place, heavy, ours = out.decode().splitlines()
    assert (model, reason, heavy, ours) == ("fake", "UNKNOWN_TASK", "[]", "[]")
    assert Path(place).is_relative_to(target)
