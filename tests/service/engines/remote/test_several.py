"""Several back ends and models behind one server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import metrics
from service.client import read_error
from service.engines.remote.engine import RemoteEngine
from service.engines.remote.fleet import read_fleet
from service.engines.remote.images import Sizing
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings
from service.wiring import build_engines
from tests.service.engines.remote.scripted import Asked, Scripted, delta, saying, scripted
from tests.service.engines.remote.serving import GOOD, question
from tests.service.harness import Running, failure, running, until

SLOW = pytest.mark.slow


def write(folder: Path, backends: dict[str, Any], models: dict[str, Any]) -> Path:
    path = folder / "backends.yaml"
    path.write_text(yaml.safe_dump({"backends": backends, "models": models}, sort_keys=False))
    return path


def engines_of(path: Path, **settings: Any) -> Any:
    options = {"remote_start_s": 0, **settings}
    return build_engines(Settings(engine="remote", remote_file=path, **options))


@asynccontextmanager
async def fleet(
    folder: Path,
    backs: dict[str, Scripted],
    models: dict[str, Any],
    *,
    server: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    """Our server in front of started ones. models: as in the file."""
    path = write(folder, {name: {"url": one.url} for name, one in backs.items()}, models)
    async with running(engines_of(path, **settings), **(server or {})) as front:
        for one in backs.values():
            one.asked.clear()
        yield front


@asynccontextmanager
async def two(folder: Path, **settings: Any) -> AsyncIterator[tuple[Running, Scripted, Scripted]]:
    """One model on two servers."""
    async with scripted(saying(GOOD)) as a, scripted(saying(GOOD)) as b:
        models = {"vl": {"backends": ["a", "b"], "model": "tiny-vl"}}
        async with fleet(folder, {"a": a, "b": b}, models, **settings) as front:
            yield front, a, b


def requests(backend: str, outcome: str) -> float:
    return metrics.backend_requests.labels(backend, outcome)._value.get()


@SLOW
async def test_equal_servers_take_turns(tmp_path: Path) -> None:
    async with two(tmp_path) as (front, a, b):
        for _ in range(6):
            result = (await front.stub.RunTask(question(), timeout=60)).result
            assert result.model == "vl", "callers see the name of the file"
    assert len(a.asked) == len(b.asked) == 3
    assert a.asked[0].json["model"] == "tiny-vl", "servers see their own"


@SLOW
async def test_the_least_loaded_server_gets_the_request(tmp_path: Path) -> None:
    done = asyncio.Event()

    async def slow(asked: Asked) -> None:
        await asked.begin_stream()
        await asked.event(delta("{"))
        await asyncio.wait_for(done.wait(), 60)
        await asked.event(delta('"count": 3}', "stop"))
        await asked.event(b"[DONE]")
        await asked.end_stream()

    async with two(tmp_path) as (front, a, b):
        a.chat = slow
        held: list[asyncio.Future[Any]] = []
        while not a.asked:  # until the slow server has one
            held.append(asyncio.ensure_future(front.stub.RunTask(question(), timeout=60)))
            await until(lambda: held[-1].done() or bool(a.asked), 60)
        seen = len(b.asked)
        for _ in range(5):
            await front.stub.RunTask(question(), timeout=60)
        assert (len(a.asked), len(b.asked)) == (1, seen + 5)
        done.set()
        await asyncio.gather(*held)


@SLOW
@pytest.mark.parametrize("status", [429, 503])
async def test_another_server_where_nothing_was_generated(tmp_path: Path, status: int) -> None:
    async def refuses(asked: Asked) -> None:
        await asked.answer({"error": "busy"}, status)

    async with two(tmp_path, remote_retries=0) as (front, a, _):
        a.chat = refuses
        before = requests("b", "ok")
        for _ in range(4):
            assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD
        assert requests("b", "ok") == before + 4
        assert len(a.asked) >= 1


@SLOW
async def test_no_other_server_after_something_was_sent(tmp_path: Path) -> None:
    async def breaks(asked: Asked) -> None:
        asked.reset()

    async with two(tmp_path) as (front, a, b):
        a.chat = b.chat = breaks
        error = await failure(front.stub.RunTask(question(), timeout=60))
        assert error.reason == "BACKEND_UNREACHABLE"
        assert len(a.asked) + len(b.asked) == 1


@SLOW
async def test_a_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    async with two(tmp_path, server={"health_interval_s": 2}) as (front, a, _):
        await a.kill()
        for _ in range(4):
            assert (await front.stub.RunTask(question(), timeout=60)).result.json == GOOD
        await until(lambda: metrics.backend_up.labels("a")._value.get() == 0, 60)
        await a.start()
        await until(lambda: metrics.backend_up.labels("a")._value.get() == 1, 60)
        a.asked.clear()
        for _ in range(4):
            await front.stub.RunTask(question(), timeout=60)
        assert len(a.asked) == 2


@SLOW
async def test_one_of_two_servers_is_killed_under_load(tmp_path: Path) -> None:
    """No invalid answer, no hang, and errors only for requests that the killed server had."""
    rng = random.Random(1)

    async def answers(asked: Asked) -> None:
        await asked.begin_stream()
        for begin in range(0, len(GOOD), 3):
            await asyncio.sleep(rng.random() * 0.02)
            await asked.event(delta(GOOD[begin : begin + 3]))
        await asked.event(delta(None, "stop"))
        await asked.event(b"[DONE]")
        await asked.end_stream()

    async with two(tmp_path) as (front, a, b):
        a.chat = b.chat = answers
        outcomes: list[Any] = []

        async def caller() -> None:
            for _ in range(15):
                try:
                    outcomes.append((await front.stub.RunTask(question(), timeout=120)).result.json)
                except Exception as error:
                    outcomes.append(error)

        callers = [asyncio.ensure_future(caller()) for _ in range(16)]
        await until(lambda: len(outcomes) >= 40, 120)
        await a.kill()
        await asyncio.wait_for(asyncio.gather(*callers), 120)
    failed = [one for one in outcomes if isinstance(one, Exception)]
    assert len(outcomes) == 240
    assert len(failed) <= 16, "each caller had at most one request in the killed server"
    assert {read_error(one).reason for one in failed} <= {"BACKEND_UNREACHABLE"}
    assert {one for one in outcomes if not isinstance(one, Exception)} == {GOOD}


@SLOW
async def test_several_models(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        small = await stack.enter_async_context(scripted(saying("small"), models=["small-vl"]))
        large = await stack.enter_async_context(scripted(saying("large"), models=["large-vl"]))
        models = {
            "small-vl": {"backends": ["s"], "vision": False},
            "big": {"backends": ["l"], "model": "large-vl", "context_length": 8192},
        }
        small.chat = saying("small", model="small-vl")
        large.chat = saying("large", model="large-vl")
        front = await stack.enter_async_context(fleet(tmp_path, {"s": small, "l": large}, models))
        listed = (await front.stub.ListModels(pb.ListModelsRequest(), timeout=60)).models
        texts = {
            name: (
                await front.stub.RunTask(question(schema=None, model=name), timeout=60)
            ).result.text
            for name in ("", "small-vl", "big")
        }
    assert [one.name for one in listed] == ["small-vl", "big"]
    assert [one.capabilities.vision for one in listed] == [False, True]
    assert listed[1].capabilities.context_length == 8192
    assert texts == {"": "small", "small-vl": "small", "big": "large"}


@SLOW
async def test_a_model_without_a_server_does_not_keep_the_others_from_serving(
    tmp_path: Path,
) -> None:
    async with scripted(saying("Hello")) as up, scripted(saying("Hello")) as down:
        await down.kill()
        models = {
            "tiny-vl": {"backends": ["up"]},
            "late": {"backends": ["down"], "model": "tiny-vl"},
        }
        backs = {"up": up, "down": down}
        options = {"health_interval_s": 1, "unhealthy_exit_s": 0.5}
        async with fleet(tmp_path, backs, models, server=options, remote_retries=0) as front:
            served = front.server.runtime.models
            assert (served["tiny-vl"].refusal, served["late"].refusal is None) == (None, False)
            error = await failure(
                front.stub.RunTask(question(schema=None, model="late"), timeout=60)
            )
            assert error.reason == "ENGINE_UNHEALTHY"
            await asyncio.sleep(
                3
            )  # two failed checks, longer than unhealthy_exit_s: no restart would help
            await down.start()
            await until(lambda: served["late"].refusal is None, 60)
            result = await front.stub.RunTask(question(schema=None, model="late"), timeout=60)
            assert result.result.text == "Hello"


def test_the_file_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"a": {"url": "http://h:1/v1", "kind": "vllm"}, "b": {"url": "grpc://h:2"}},
        {"m": {"backends": ["a", "b"], "model": "org/M"}, "n": {"backends": ["b"]}},
    )
    found = read_fleet(path)
    assert found.backends["a"].url == "http://h:1"
    assert list(found.models) == ["m", "n"]
    assert found.models["m"].model == "org/M"


def test_relative_paths_are_below_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "etc", tmp_path / "elsewhere"
    (folder / "secrets").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "secrets" / "key").write_text("sk-1\n")
    (folder / "ca.pem").touch()
    (tmp_path / "cert.pem").touch()
    certificate = str(tmp_path / "cert.pem")
    entry = {"url": "http://h:1", "key_file": "secrets/key", "ca": "ca.pem"}
    entry |= {"cert": certificate, "cert_key": "../cert.pem"}
    path = write(folder, {"a": entry}, {"m": {"backends": ["a"]}})
    for working, given in ((elsewhere, path), (tmp_path, Path("etc", path.name))):
        monkeypatch.chdir(working)
        found = read_fleet(given).backends["a"]
        assert found.key == "sk-1"
        assert found.ca == str(folder / "ca.pem")
        assert found.cert == certificate
        assert found.cert_key is not None
        assert Path(found.cert_key).resolve() == tmp_path / "cert.pem"
    (elsewhere / "other.pem").touch()
    monkeypatch.chdir(elsewhere)
    path = write(
        folder, {"a": {"url": "http://h:1", "ca": "other.pem"}}, {"m": {"backends": ["a"]}}
    )
    with pytest.raises(ValueError, match=r"backends\.a\.ca: there is no file") as raised:
        read_fleet(path)
    assert str(folder / "other.pem") in str(raised.value)


def test_a_model_has_a_size_of_images_of_its_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"a": {"url": "http://h:1"}},
        {
            "m": {"backends": ["a"], "resize": True, "min_pixels": 40_960, "max_pixels": 65_536},
            "n": {"backends": ["a"]},
        },
    )
    sizings = [one._sizing for one in engines_of(path, remote_max_pixels=500_000)]
    assert sizings == [Sizing(True, 40_960, 65_536), Sizing(False, 65_536, 500_000)]
    write(tmp_path, {"a": {"url": "http://h:1"}}, {"m": {"backends": ["a"], "max_pixels": 2048}})
    with pytest.raises(ValueError, match="min_pixels of a model must not be above"):
        engines_of(path)


A = "backends: {a: {url: 'http://h:1'}}\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Input should be"),
        ("a: [", "line 1"),
        (A, "models: Field required"),
        (A + "models: {}", "models: "),
        (A + "models: {m: {backends: []}}", "models.m.backends: "),
        (A + "models: {m: {backends: [b]}}", "models.m.backends: there is no back end b"),
        (A + "models: {m: {backends: [a, a]}}", "names a back end twice"),
        (A + "models: {m: {backends: [a], modle: x}}", "models.m.modle: "),
        (A + A + "models: {m: {backends: [a]}}", "backends is there twice"),
        ("backends: {a: {url: h}}\nmodels: {m: {backends: [a]}}", "backends.a.url: must be a URL"),
        (
            "backends: {a: {url: 'http://h', kind: x}}\nmodels: {m: {backends: [a]}}",
            "there is no kind",
        ),
        (
            "backends: {a: {url: 'grpc://h:1', kind: vllm}}\nmodels: {m: {backends: [a]}}",
            "qwen3vl-grpc belongs to grpc://",
        ),
        (
            "backends: {a: {url: 'http://h'}, b: {url: 'http://i'}}\nmodels: {m: {backends: [a]}}",
            "backends.b: no model uses it",
        ),
        (
            "backends: {a: {url: 'http://h', ca: /no.pem}}\nmodels: {m: {backends: [a]}}",
            "backends.a.ca: there is no file /no.pem",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "backends.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"backends\.yaml") as raised:
        read_fleet(path)
    assert problem in str(raised.value)


def test_a_key_variable_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    entry = {"url": "http://h:1", "key_variable": "NO_SUCH_KEY"}
    path = write(tmp_path, {"a": entry}, {"m": {"backends": ["a"]}})
    with pytest.raises(ValueError, match="the variable NO_SUCH_KEY is not set"):
        engines_of(path)
    monkeypatch.setenv("NO_SUCH_KEY", "sk-1")
    (engine,) = engines_of(path)
    assert isinstance(engine, RemoteEngine)
