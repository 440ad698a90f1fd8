"""What the LMDeploy engine does around LMDeploy: end, health, guidance, limits. On scripted engines."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from service.engines.lmdeploy import LMDeployEngine
from service.engines.reference import ReferenceEngine
from service.errors import (
    ContextTooLong,
    EngineUnavailable,
    GrammarError,
    InferenceTimeout,
    InternalError,
    InvalidRequest,
)
from service.inference.runner import run as run_task
from service.tasks.contract import Task
from service.types import FinishReason, Grammar, GrammarKind, Sampling
from tests.checkpoints import Shape, write_checkpoint
from tests.service.engines.conformance import (
    BROKEN,
    GRAMMARS,
    LONG,
    answer,
    collect,
    first_chunk,
    generate,
    grammar,
    mixed,
    random_image,
    request,
    until,
)
from tests.service.harness import failure, inline, run_request, running
from tests.service.harness import image_bytes as encoded

pytestmark = pytest.mark.slow
CANCEL_LIMIT_S = 1.0
"""Much less than the rest of the answer takes, and enough for a busy machine."""
BACKENDS = ("turbomind", "pytorch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lmdeploy"), Shape(kv_heads=2))


def built(folder: Path, backend: str = "turbomind", **options: Any) -> LMDeployEngine:
    from tests.service.engines.lmdeploy.scripted import engine

    return engine(folder, backend, **options)


def below(engine: LMDeployEngine) -> Any:
    from tests.service.engines.lmdeploy.scripted import native

    return native(engine)


@pytest_asyncio.fixture(params=BACKENDS)
async def engine(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[LMDeployEngine]:
    engine = built(folder, request.param)
    await engine.start()
    yield engine
    await engine.close()


@pytest_asyncio.fixture
async def turbomind(folder: Path) -> AsyncIterator[LMDeployEngine]:
    engine = built(folder)
    await engine.start()
    yield engine
    await engine.close()


# What goes in is enough for the right answer


async def test_answers_are_those_of_the_reference_engine(
    engine: LMDeployEngine, folder: Path
) -> None:
    """Below, nothing is known of a request but its ids, spans, grids, pixels, options, grammar."""
    reference = ReferenceEngine(folder, threads=1)
    await reference.start()
    for one in mixed(22):
        assert await answer(engine, one) == await answer(reference, one), one
    await reference.close()


async def test_an_answer_that_repeats_itself_is_ended(folder: Path) -> None:
    from service.engines.common.loops import LoopGuard

    engine = built(folder, loop_guard=LoopGuard(window=32, longest=8, interval=8))
    await engine.start()
    endless = grammar(GrammarKind.REGEX, "(ab){300}")
    text, reason, usage = await answer(engine, request(constraint=endless, max_tokens=256))
    assert reason is FinishReason.LOOP
    assert usage.output_tokens < 64
    assert text.startswith("abab")
    assert not below(engine).active, "LMDeploy has let go of it before the answer ends"
    await engine.close()


async def test_each_request_has_its_own_handle(turbomind: LMDeployEngine) -> None:
    before = len(below(turbomind).instances)
    await collect(turbomind, request(constraint=GRAMMARS[0], max_tokens=64))
    await collect(turbomind, request(max_tokens=4))
    made = below(turbomind).instances[before:]
    assert [one._grammar is not None for one in made] == [True, False]
    assert all(one.arguments["gen_config"].response_format is None for one in made)


async def test_special_tokens_are_forbidden_if_the_mask_treats_them_as_text(
    folder: Path,
) -> None:
    engine = built(folder, "pytorch", others=True)
    await engine.start()
    await collect(engine, request(constraint=GRAMMARS[0], max_tokens=64))
    await collect(engine, request(max_tokens=4))
    assert engine._loaded is not None
    special, stops = engine._loaded._chat.special_ids, set(engine._loaded._config.stop_ids)
    with_grammar, without = (one.arguments["gen_config"] for one in below(engine).instances[-2:])
    assert set(with_grammar.bad_token_ids) == special - stops != set()
    assert without.bad_token_ids is None
    await engine.close()


async def test_image_pixels_bounds_every_image(folder: Path) -> None:
    engine = built(folder, image_pixels=64 * 64)
    await engine.start()
    for bounds in ({}, {"max_pixels": 256 * 256}, {"min_pixels": 200 * 200, "max_pixels": 256**2}):
        one = request("Hi.", random_image(1, 256, 256, **bounds), max_tokens=1)
        assert (await answer(engine, one))[2].image_tokens <= 4
    small = request("Hi.", random_image(1, 32, 32), max_tokens=1)
    assert (await answer(engine, small))[2].image_tokens == 1
    await engine.close()


# Guided decoding


@pytest.mark.parametrize("backend", BACKENDS)
async def test_an_engine_that_ignores_grammars_does_not_start(folder: Path, backend: str) -> None:
    engine = built(folder, backend, deaf=True)
    with pytest.raises(EngineUnavailable, match="does not obey grammars"):
        await engine.start()
    with pytest.raises(EngineUnavailable):
        await collect(engine, request())
    assert engine.active_requests == 0
    await engine.close()


async def test_guided_decoding_that_is_switched_off_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.service.engines.lmdeploy import scripted

    original = scripted.Scripted.__init__

    def without_manager(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.executor.model_agent.guided_decoding_manager = None

    monkeypatch.setattr(scripted.Scripted, "__init__", without_manager)
    engine = built(folder, "pytorch")
    with pytest.raises(EngineUnavailable, match="cannot guide decoding with this checkpoint"):
        await engine.start()
    await engine.close()


async def test_grammars_are_compiled_off_the_event_loop(
    turbomind: LMDeployEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert turbomind._loaded is not None
    compiler, names = turbomind._loaded.host.compiler, []
    compile_one, loop, went_on = compiler.compile, asyncio.get_running_loop(), []

    def slow(one: Grammar) -> Any:
        names.append(threading.current_thread().name)
        turn = threading.Event()
        loop.call_soon_threadsafe(turn.set)
        went_on.append(turn.wait(10))
        return compile_one(one)

    monkeypatch.setattr(compiler, "compile", slow)
    constraint = grammar(GrammarKind.REGEX, "[0-9]{4} new")
    await asyncio.gather(
        *(collect(turbomind, request(constraint=constraint, max_tokens=32)) for _ in range(3))
    )
    assert len(names) == 1, "three callers share one compilation"
    assert names[0].startswith("grammar")
    assert went_on == [True], "the loop goes on while a grammar is compiled"


async def test_a_grammar_error_reaches_the_caller_and_nothing_is_sent(
    turbomind: LMDeployEngine,
) -> None:
    before = len(below(turbomind).instances)
    with pytest.raises(GrammarError):
        await collect(turbomind, request(constraint=BROKEN[1]))
    assert len(below(turbomind).instances) == before


# The end of a request


async def arrival(engine: LMDeployEngine, leave: Callable[[], Any]) -> float:
    """Seconds from a reason to stop until LMDeploy was asked to."""
    native = below(engine)
    native.cancelled_at.clear()
    begun = time.monotonic()
    result = leave()
    if asyncio.iscoroutine(result):
        await result
    await until(lambda: bool(native.cancelled_at))
    took = float(native.cancelled_at[0] - begun)
    await until(lambda: not native.active and engine.active_requests == 0)
    return took


def endless() -> Any:
    return request("word " * 40, random_image(1), constraint=LONG, max_tokens=700)


async def test_closing_the_answer_cancels_the_request_in_the_engine(engine: LMDeployEngine) -> None:
    took = []
    for _ in range(5):
        chunks = await first_chunk(engine, endless())
        took.append(await arrival(engine, chunks.aclose))
    assert sorted(took)[2] < CANCEL_LIMIT_S


async def test_cancelling_the_caller_cancels_the_request_in_the_engine(
    engine: LMDeployEngine,
) -> None:
    took = []
    for _ in range(5):
        chunks = await first_chunk(engine, endless())
        pull = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)

        def leave(pull: Any = pull, chunks: Any = chunks) -> Any:
            return chunks.aclose() if pull.done() else pull.cancel()

        took.append(await arrival(engine, leave))
        await asyncio.gather(pull, return_exceptions=True)
    assert sorted(took)[2] < CANCEL_LIMIT_S


async def test_a_second_cancel_does_not_keep_the_engine_working(engine: LMDeployEngine) -> None:
    native = below(engine)
    task = asyncio.ensure_future(collect(engine, endless()))
    await until(lambda: bool(native.active))
    native.cancelled_at.clear()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: bool(native.cancelled_at))
    await until(lambda: not below(engine).active and engine.active_requests == 0)


async def test_a_deadline_cancels_the_request_in_the_engine(turbomind: LMDeployEngine) -> None:
    native, late_s = below(turbomind), 0.15
    task = Task("endless", "", "", "word", grammar=LONG)
    await turbomind.prepare(LONG)
    took = []
    for _ in range(5):  # most of them, since two may meet a busy machine
        native.cancelled_at.clear()
        begun = time.monotonic()
        with pytest.raises(InferenceTimeout):
            await run_task(
                turbomind, task, [], Sampling(max_tokens=900), timeout_s=late_s, request_id="late"
            )
        await until(lambda: bool(native.cancelled_at))
        took.append(native.cancelled_at[-1] - begun - late_s)
    assert sorted(took)[2] < CANCEL_LIMIT_S, took
    await until(lambda: not native.active)


async def test_a_disconnected_client_cancels_the_request_in_the_engine(
    turbomind: LMDeployEngine,
) -> None:
    native = below(turbomind)
    async with running(turbomind) as started:  # type: ignore[arg-type]
        task = inline("word " * 30, regex="([a-z]{1,7} ){200}")
        for _ in range(3):
            native.cancelled_at.clear()
            call = started.stub.RunTask(run_request(task, max_tokens=700))
            await until(lambda: bool(native.active))
            begun = time.monotonic()
            call.cancel()
            await until(lambda: bool(native.cancelled_at))
            assert native.cancelled_at[0] - begun < 5 * CANCEL_LIMIT_S, "network and all"
            await until(lambda: not native.active)


async def test_a_request_that_was_never_sent_is_not_cancelled(turbomind: LMDeployEngine) -> None:
    native = below(turbomind)
    native.cancelled_at.clear()
    for wait in range(6):
        task = asyncio.ensure_future(collect(turbomind, endless()))
        for _ in range(wait):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await until(lambda: turbomind.active_requests == 0 and not native.active)


# What LMDeploy says


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("INPUT_LENGTH_ERROR", ContextTooLong),
        ("OUT_OF_MEMORY", ContextTooLong),
        ("CANCEL", EngineUnavailable),
        ("ENGINE_STOP_ERROR", EngineUnavailable),
        ("INTERNAL_ENGINE_ERROR", InternalError),
    ],
)
async def test_a_failure_in_the_middle_of_an_answer(
    turbomind: LMDeployEngine, monkeypatch: pytest.MonkeyPatch, status: str, error: type
) -> None:
    from lmdeploy.messages import EngineOutput, ResponseType

    from tests.service.engines.lmdeploy.scripted import Instance

    async def fails(self: Any, session_id: int, **arguments: Any) -> Any:
        yield EngineOutput(ResponseType.SUCCESS, [70])
        yield EngineOutput(ResponseType[status], [])

    monkeypatch.setattr(Instance, "async_stream_infer", fails)
    chunks = generate(turbomind, request())
    assert (await anext(chunks)).text
    with pytest.raises(error):
        await anext(chunks)
    assert turbomind.active_requests == 0


async def test_errors_and_a_silent_end_of_lmdeploy(
    turbomind: LMDeployEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.service.engines.lmdeploy.scripted import Instance

    async def raises(self: Any, session_id: int, **arguments: Any) -> Any:
        raise ValueError("Qwen3-VL takes no such pixels")
        yield

    async def silent(self: Any, session_id: int, **arguments: Any) -> Any:
        return
        yield

    monkeypatch.setattr(Instance, "async_stream_infer", raises)
    with pytest.raises(ValueError, match="no such pixels"):  # the interceptor makes it INTERNAL
        await collect(turbomind, request())
    monkeypatch.setattr(Instance, "async_stream_infer", silent)
    with pytest.raises(EngineUnavailable, match="without an answer"):
        await collect(turbomind, request())
    assert turbomind.active_requests == 0


async def test_health_follows_lmdeploys_own_status(turbomind: LMDeployEngine) -> None:
    await turbomind.check_health()
    below(turbomind).alive = False
    with pytest.raises(EngineUnavailable) as raised:
        await turbomind.check_health()
    assert raised.value.reason == "ENGINE_DEAD"


async def test_an_engine_without_progress_is_stalled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.service.engines.lmdeploy.scripted import Instance

    engine = built(folder, stall_s=60)
    await engine.start()
    gate = asyncio.Event()

    async def hangs(self: Any, session_id: int, **arguments: Any) -> Any:
        await gate.wait()
        return
        yield

    async def cancel(self: Any, session_id: int) -> None:
        gate.set()

    monkeypatch.setattr(Instance, "async_stream_infer", hangs)
    monkeypatch.setattr(Instance, "async_cancel", cancel)
    engine._progress_at -= 100
    await engine.check_health()  # idle is not stalled
    task = asyncio.ensure_future(collect(engine, request()))
    await until(lambda: any(run is not None for run in engine._live.values()))
    await engine.check_health()
    engine._progress_at -= 100  # as if so many seconds had passed
    with pytest.raises(EngineUnavailable) as raised:
        await engine.check_health()
    assert raised.value.reason == "ENGINE_STALLED"
    below(engine).tick += 1
    await engine.check_health()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await engine.check_health()
    await engine.close()


# Limits


async def test_top_k_that_turbomind_would_cut_is_refused(folder: Path) -> None:
    engine = built(folder)
    await engine.start()
    with pytest.raises(InvalidRequest, match=r"sampling\.top_k"):
        await collect(engine, request(temperature=1.0, top_k=1025))
    await engine.close()


async def test_images_wait_before_a_full_engine(folder: Path) -> None:
    engine = built(folder, vision_batch=2)
    await engine.start()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            assert engine._loaded is not None
            most = max(most, engine._loaded.gate.inside)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    shown = [
        request("Hi.", *(random_image(k) for k in range(n)), max_tokens=3) for n in (1, 2, 5, 0)
    ]
    await asyncio.wait_for(asyncio.gather(*(collect(engine, one) for one in shown * 4)), 60)
    watching.cancel()
    assert most == 2
    waiting = [asyncio.ensure_future(collect(engine, one)) for one in shown * 4]
    await asyncio.sleep(0.02)
    for task in waiting[::2]:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert engine._loaded is not None
    assert engine._loaded.gate.inside == 0
    assert not engine._loaded.gate.waiting
    await engine.close()


async def test_an_image_without_vision_is_refused_through_grpc(folder: Path) -> None:
    engine = built(folder, vision=False)
    async with running(engine) as started:  # type: ignore[arg-type]
        error = await failure(started.stub.RunTask(run_request(inline("What?"), [encoded()])))
        assert error.code is grpc.StatusCode.FAILED_PRECONDITION
        assert error.reason == "VISION_DISABLED"
        assert engine.active_requests == 0
        response = await started.stub.RunTask(
            run_request(inline("Say.", choice=["abc", "abd"]), max_tokens=9)
        )
        assert response.result.text in ("abc", "abd")
        assert below(engine).model.vision is None, "the tower is not loaded"
        assert below(engine).engine_config.language_model_only


async def test_details_for_operators(folder: Path) -> None:
    found = {}
    for backend in BACKENDS:
        engine = built(folder, backend)
        await engine.start()
        found[backend] = engine.capabilities.details
        await engine.close()
    assert found["turbomind"]["deepstack"] == "off", "the extension is not installed here"
    assert found["pytorch"]["deepstack"] == "on"
    assert {name: details["backend"] for name, details in found.items()} == {
        name: name for name in BACKENDS
    }


# Start and end of the engine


def test_importing_lmdeploy_does_not_change_the_log_of_the_service() -> None:
    """LMDeploy mutes the handlers of others, and writes to stdout, which holds answers alone."""
    code = """if True:
        import logging, asyncio
        from service import logs
        logs.configure()
        from service.engines.lmdeploy import LMDeployEngine
        try:
            asyncio.run(LMDeployEngine("/nowhere").start())
        except Exception as error:
            logging.getLogger("test").info("refused: %s", error)
        logging.getLogger("lmdeploy").info("extension is active")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "there is no model folder" in done.stderr
    assert "logger=lmdeploy request_id=- extension is active" in done.stderr
    assert done.stdout == ""


async def test_closing_while_loading_frees_the_model_that_loads(folder: Path) -> None:
    from tests.service.engines.lmdeploy.scripted import engine as scripted

    source = scripted(folder)
    loading, held, made = threading.Event(), threading.Event(), []

    def slow(options: Any, on_progress: Any) -> Any:
        loading.set()
        held.wait(60)
        assert source._load is not None
        made.append(source._load(options, on_progress))
        return made[0]

    engine = LMDeployEngine(folder, load=slow, backend="turbomind")
    starting = asyncio.ensure_future(engine.start())
    await until(loading.is_set)
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await starting
    held.set()
    await until(lambda: bool(made))
    await until(lambda: not made[0].host.native._worker._thread.is_alive())


async def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    for content in ("{}", '{"architectures": ["Qwen2ForCausalLM"]}'):
        (tmp_path / "config.json").write_text(content)
        engine = LMDeployEngine(tmp_path)
        with pytest.raises(EngineUnavailable, match="cannot be loaded: "):
            await engine.start()
        await engine.close()


async def test_a_context_length_above_the_models_is_an_error(folder: Path) -> None:
    engine = built(folder, context_length=1 << 20)
    with pytest.raises(EngineUnavailable, match="context_length 1048576 exceeds the model's"):
        await engine.start()
    await engine.close()
