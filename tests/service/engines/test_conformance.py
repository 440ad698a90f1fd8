"""The engines that ship, held to the conformance suite."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from service.engine import Engine
from service.engines.fake import FakeEngine
from service.engines.reference import ReferenceEngine
from service.engines.remote import RemoteEngine
from service.settings import Settings
from service.types import GrammarKind
from service.wiring import BUNDLED_MODEL, build_engine
from tests.checkpoints import Shape, write_checkpoint
from tests.model_servers.processes import Missing, gguf_files, llama_cpp
from tests.service.engines.conformance import Answers, LifeCycle, Subject, script
from tests.service.engines.remote.workers import worker

ON_HOST = pytest.mark.skipif(
    os.environ.get("HOST_RUNTIME_MODE") != "numbers",
    reason="needs the host runtime; test_stock_engine runs it there",
)
SUBJECTS = (
    "fake",
    "fake, few options",
    pytest.param("reference, dense", marks=pytest.mark.slow),
    pytest.param("reference, MoE", marks=pytest.mark.slow),
    pytest.param("reference, bundled", marks=pytest.mark.slow),
    pytest.param("lmdeploy, turbomind", marks=pytest.mark.slow),
    pytest.param("lmdeploy, pytorch", marks=pytest.mark.slow),
    pytest.param("lmdeploy, pytorch in other processes", marks=pytest.mark.slow),
    pytest.param("remote, gRPC", marks=pytest.mark.slow),
    pytest.param("remote, HTTP", marks=pytest.mark.slow),
    pytest.param("remote, llama.cpp", marks=pytest.mark.slow),
    pytest.param("stock turbomind", marks=[pytest.mark.slow, pytest.mark.host, ON_HOST]),
    pytest.param("qwen3.5 on turbomind", marks=[pytest.mark.slow, pytest.mark.host, ON_HOST]),
)
SHAPES = {
    "reference, dense": Shape(kv_heads=2),
    "reference, MoE": Shape(moe=True, tied=False),
    "lmdeploy, turbomind": Shape(kv_heads=2),
    "lmdeploy, pytorch": Shape(),
    "lmdeploy, pytorch in other processes": Shape(),
}


AT_THE_END = "a stream tells the tokens of the prompt when it ends"
NO_QUEUE = "the queue is that of the server; its OVERLOADED is passed on, see test_own_servers"
LATE_GRAMMARS = "OpenAI's API compiles a grammar only in a request"
TOGETHER = "what arrives together over HTTP is one piece, and a fast server sends all at once"
IMAGES_FIRST = (
    "an image is sent before the server can refuse it; CONTEXT_TOO_LONG is passed on, see "
    "test_own_servers"
)
NO_REGEX = "the test needs a regular expression, which llama.cpp takes only inside a JSON schema"
NO_IMAGE_TOKENS = "llama.cpp does not tell how many tokens of a prompt are of images"
LLAMA_CPP = "remote, llama.cpp"
EXCLUDED = {
    "remote, gRPC": {
        "test_chunks": AT_THE_END,
        "test_a_full_queue_is_overloaded": NO_QUEUE,
        "test_context": IMAGES_FIRST,
    },
    "remote, HTTP": {
        "test_chunks": AT_THE_END,
        "test_a_full_queue_is_overloaded": NO_QUEUE,
        "test_context": IMAGES_FIRST,
        "test_a_broken_grammar": LATE_GRAMMARS,
        "test_text_comes_in_pieces_of_whole_characters": TOGETHER,
    },
    LLAMA_CPP: {
        "test_chunks": AT_THE_END,
        "test_a_full_queue_is_overloaded": NO_QUEUE,
        "test_context": IMAGES_FIRST,
        "test_a_broken_grammar": LATE_GRAMMARS,
        "test_an_engine_that_tells_its_load_tells_the_truth": NO_REGEX,
        "test_close_ends_requests_in_flight": NO_REGEX,
        "test_text_comes_in_pieces_of_whole_characters": NO_REGEX,
        "test_unset_max_tokens_gets_what_the_context_leaves": NO_REGEX,
        "test_as_many_images_as_the_limit": NO_IMAGE_TOKENS,
        "test_special_tokens_in_texts_are_text": NO_IMAGE_TOKENS,
        "test_usage_counts_every_image": NO_IMAGE_TOKENS,
        "test_bounds_of_one_image": NO_IMAGE_TOKENS,
        "test_an_answer_fits_its_grammar[2]": (
            "llama.cpp drops the bounds of integers within prefixItems; such an answer is OUTPUT_INVALID"
        ),
        "test_special_tokens_in_answers_are_text": (
            "llama.cpp writes control tokens where its grammar wants their text, and leaves them out of "
            "the answer, which is then OUTPUT_INVALID"
        ),
    },
}
"""Subject -> tests that do not hold for it, with the reason. NAME[INDEX]: with one grammar alone."""


def fake(*, vision: bool = True, small: bool = False, **options: Any) -> Engine:
    return FakeEngine(
        script,
        vision=vision,
        max_active=2 if small else None,
        token_delay_s=0.005 if small else 0.0,
        **options,
    )


def reference(folder: Path, *, vision: bool = True, small: bool = False, **options: Any) -> Engine:
    limits = {"max_batch": 1, "max_queue": 1} if small else {}
    return ReferenceEngine(folder, vision=vision, threads=1, **limits, **options)


def fake_is_idle(engine: Engine) -> bool:
    assert isinstance(engine, FakeEngine)
    return engine.active_requests == 0


def reference_is_idle(engine: Engine) -> bool:
    assert isinstance(engine, ReferenceEngine)
    return engine.active_requests == 0 and engine.reserved_rows == 0


def scripted(folder: Path, name: str, **options: Any) -> Engine:
    """The LMDeploy engine on the scripted engines of LMDeploy."""
    from tests.service.engines.lmdeploy.scripted import engine

    backend = "turbomind" if "turbomind" in name else "pytorch"
    return engine(folder, backend, others="other processes" in name, **options)


def scripted_is_idle(engine: Engine) -> bool:
    from service.engines.lmdeploy import LMDeployEngine
    from tests.service.engines.lmdeploy.scripted import native

    assert isinstance(engine, LMDeployEngine)
    inside = set() if engine._loaded is None else native(engine).active
    return engine.active_requests == 0 and not inside


@contextmanager
def remote_subject(name: str) -> Iterator[Subject]:
    """The remote engine in front of our own server, which runs the fake engine. A second server is
    slow, for tests that need requests to be in flight."""
    fakes = [FakeEngine(script, context_length=4096) for _ in range(2)]
    with worker(fakes[0]) as fast, worker(fakes[1]) as slow:
        slow.engine.token_delay_s = 0.005

        def build(*, vision: bool = True, small: bool = False, max_images: int = 16) -> Engine:
            back = slow if small else fast
            url = back.grpc if name.endswith("gRPC") else back.http
            options: dict[str, Any] = {
                "remote_url": url,
                "vision": vision,
                "max_images": max_images,
            }
            return build_engine(Settings(engine="remote", **options))

        def idle(engine: Engine) -> bool:
            assert isinstance(engine, RemoteEngine)
            return engine.active_requests == 0 and fast.idle and slow.idle

        yield Subject(name, build, idle, certain=True, elsewhere=True, excluded=EXCLUDED[name])


@contextmanager
def llama_cpp_subject(folder: Path) -> Iterator[Subject]:
    """The remote engine in front of llama.cpp with the bundled model."""
    try:
        files = gguf_files(folder)
    except Missing as missing:
        pytest.skip(str(missing))
    with llama_cpp(files) as url:

        def build(*, vision: bool = True, small: bool = False, max_images: int = 16) -> Engine:
            return build_engine(
                Settings(engine="remote", remote_url=url, vision=vision, max_images=max_images)
            )

        def idle(engine: Engine) -> bool:
            assert isinstance(engine, RemoteEngine)
            return engine.active_requests == 0

        yield Subject(LLAMA_CPP, build, idle, elsewhere=True, excluded=EXCLUDED[LLAMA_CPP])


@pytest.fixture(autouse=True)
def leave_out(request: pytest.FixtureRequest, subject: Subject) -> None:
    """Skip what does not hold for a subject."""
    name, index = request.node.originalname, request.node.callspec.params.get("index")
    reason = subject.excluded.get(name) or subject.excluded.get(f"{name}[{index}]")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    name = request.param
    if name == "fake":
        yield Subject(name, fake, fake_is_idle, certain=True)
    elif name == "fake, few options":
        few = partial(
            fake, grammar_kinds={GrammarKind.JSON_SCHEMA}, sampling_options={"max_tokens"}
        )
        yield Subject(name, few, fake_is_idle, certain=True)
    elif name == LLAMA_CPP:
        with llama_cpp_subject(tmp_path_factory.mktemp("gguf")) as found:
            yield found
    elif name in EXCLUDED:
        with remote_subject(name) as found:
            yield found
    else:
        folder = BUNDLED_MODEL
        if name in SHAPES:
            folder = write_checkpoint(tmp_path_factory.mktemp("conformance"), SHAPES[name])
        if name.endswith("turbomind") and not name.startswith("lmdeploy"):
            from tests.service.engines.lmdeploy import stock

            write = stock.write_qwen3_5 if "qwen3.5" in name else stock.write
            folder = write(tmp_path_factory.mktemp("stock"))
            yield Subject(name, partial(stock.engine, folder), stock.is_idle, sensitive=True)
            return
        if name.startswith("lmdeploy"):
            build = partial(scripted, folder, name)
            yield Subject(name, build, scripted_is_idle, sensitive=True)
            return
        build = partial(reference, folder)
        yield Subject(name, build, reference_is_idle, sensitive=name in SHAPES)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(subject: Subject) -> AsyncIterator[Engine]:
    """An engine that is started once for many tests."""
    engine = subject.build()
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture(params=[50, pytest.param(500, marks=pytest.mark.slow)])
def cancels(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class TestLifeCycle(LifeCycle):
    pass


class TestAnswers(Answers):
    pass
