"""Real model servers behind ours: llama.cpp, mistral.rs, LMDeploy, and our own HTTP and gRPC.

``tests.model_servers.processes`` says how to get the first two. A server that is missing skips its tests.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest

from examples.drawings.samples import FOLDER
from service.engines.reference import ReferenceEngine
from service.engines.remote.backend import State
from service.engines.remote.discovery import Description, Discoveries
from service.engines.remote.wire import Wire, WireOptions
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.wiring import BUNDLED_MODEL
from tests.host_runtime.server import serve as lmdeploy
from tests.model_servers.processes import Missing, gguf_files, llama_cpp, mistral_rs
from tests.service.engines.remote.serving import remote
from tests.service.harness import Running, failure, running
from tests.service.http_api.harness import serving

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]

YES, NO = State.YES, State.NO
LOOKAHEAD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)[a-z]{3}$"}},
             "required": ["a"], "additionalProperties": False}  # fmt: skip
"""llama.cpp cannot convert the look-ahead, and drops the pattern without a word."""
OBJECT = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["circle", "square"]},
        "code": {"type": "string", "pattern": "^[a-f]{4}-[0-9]{2}$"},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "minItems": 2,
            "maxItems": 3,
        },
    },
    "required": ["kind", "code", "sizes"],
    "additionalProperties": False,
}
Start = Callable[[ExitStack, Path], str]


def start_llama_cpp(stack: ExitStack, folder: Path) -> str:
    # The bounds of the bundled model. Images of their size are not resized.
    bounds = ("image_min_tokens=40", "image_max_tokens=64")
    return stack.enter_context(llama_cpp(gguf_files(folder), *bounds))


def start_mistral_rs(stack: ExitStack, folder: Path) -> str:
    return stack.enter_context(mistral_rs())


def start_lmdeploy(stack: ExitStack, folder: Path) -> str:
    words = ("--model-name", "captions", "--session-len", "1024")
    variables = {"LMDEPLOY_QWEN3VL": "1"}
    started = lmdeploy(BUNDLED_MODEL, folder, *words, mode="numbers", extra=variables)
    return stack.enter_context(started).url


STARTS: dict[str, Start] = {
    "llama.cpp": start_llama_cpp,
    "mistral.rs": start_mistral_rs,
    "lmdeploy": start_lmdeploy,
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Starts each server when it is asked for, once."""
    started: dict[str, str] = {}
    with ExitStack() as stack:

        def url(kind: str) -> str:
            if kind not in started:
                try:
                    started[kind] = STARTS[kind](stack, tmp_path_factory.mktemp("server"))
                except Missing as missing:
                    pytest.skip(str(missing))
            return started[kind]

        yield url


KINDS = ("llama.cpp", "mistral.rs", pytest.param("lmdeploy", marks=pytest.mark.host))


async def described(url: str) -> Description:
    wire = Wire(url, WireOptions())
    try:
        (found,) = await Discoveries().describe_all(wire)
    finally:
        await wire.close()
    return found


@asynccontextmanager
async def in_front_of(url: str, kind: str) -> AsyncIterator[Running]:
    """Our server in front. mistral.rs lists a model twice, so it is named."""
    model = {"remote_model": "drawings"} if kind == "mistral.rs" else {}
    async with running(remote(url, **model)) as front:
        yield front


EXPECTED: dict[str, dict[str, Any]] = {
    "llama.cpp": {
        "vision": YES, "context_length": 4096, "quantization": "all F32", "grammar.json_schema": YES,
        "json_schema.pattern": YES, "grammar.choice": YES, "grammar.ebnf": YES, "grammar.regex": NO,
        "refuses_unknown_formats": YES, "token_limit": "max_completion_tokens", "thinking": NO,
        "sampling.seed": YES, "sampling.temperature": YES, "sampling.top_k": YES, "sampling.top_p": YES,
        "sampling.repetition_penalty": YES,
    },
    "mistral.rs": {
        "vision": YES, "grammar.json_schema": YES, "json_schema.pattern": YES, "grammar.regex": YES,
        "grammar.choice": YES, "grammar.ebnf": NO, "sampling.seed": NO, "refuses_unknown_formats": YES,
        "token_limit": "max_completion_tokens", "loaded": YES, "context_length": State.UNKNOWN,
        # A temperature has no effect there unless top_k or top_p comes with it.
        "sampling.temperature": State.UNKNOWN,
    },
    "lmdeploy": {
        "vision": YES, "grammar.json_schema": YES, "grammar.regex": YES, "grammar.choice": YES,
        "grammar.ebnf": NO, "version": State.UNKNOWN, "context_length": State.UNKNOWN,
        "refuses_unknown_formats": YES, "token_limit": "max_completion_tokens", "sampling.temperature": YES,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_every_known_fact(kind: str, urls: Callable[[str], str]) -> None:
    found = {fact.name: fact for fact in (await described(urls(kind))).facts}
    assert found["kind"].value == kind
    wrong = {
        name: (found[name].value, found[name].evidence)
        for name, value in EXPECTED[kind].items()
        if found[name].value != value
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("alias", "sees"), [("text-only-thinking-1m", YES), ("qwen3-vl-235b-vision-128k", NO)]
)
async def test_a_misleading_name_changes_no_fact(alias: str, sees: State, tmp_path: Path) -> None:
    try:
        files = gguf_files(tmp_path)
    except Missing as missing:
        pytest.skip(str(missing))
    if sees is NO:
        (files / "mmproj.gguf").unlink()
    with llama_cpp(files, f"model_alias={alias}") as url:
        description = await described(url)
        async with in_front_of(url, "llama.cpp") as front:
            model = await front.stub.GetModel(pb.GetModelRequest())
    found = {fact.name: fact.value for fact in description.facts}
    expected = {**EXPECTED["llama.cpp"], "vision": sees}
    assert {name: found[name] for name in expected} == expected
    assert model.name == description.back_end.model == alias
    assert (pb.MODALITY_IMAGE in model.capabilities.modalities) is (sees is YES)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_is_valid_or_an_error(kind: str, urls: Callable[[str], str]) -> None:
    grammar = pb.Grammar(json_schema=json.dumps(OBJECT))
    task = pb.Task(inline=pb.InlineTask(user="Describe a shape.", grammar=grammar))
    async with in_front_of(urls(kind), kind) as front:
        for temperature in (0.0, 1.0, 1.5):
            sampling = pb.SamplingOptions(temperature=temperature, max_tokens=256)
            request = pb.RunTaskRequest(task=task, sampling=sampling)
            result = (await front.stub.RunTask(request)).result
            jsonschema.validate(json.loads(result.json), OBJECT)
            assert result.enforcement == pb.ENFORCEMENT_CHECKED


async def test_a_schema_that_llama_cpp_drops_is_an_error_here(urls: Callable[[str], str]) -> None:
    url = urls("llama.cpp")
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": LOOKAHEAD}}
    body = {
        "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 64,
        "response_format": schema,
    }  # fmt: skip
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        status, reply = response.status, await response.json()
    assert status == 200
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop"
    with pytest.raises((json.JSONDecodeError, jsonschema.ValidationError)):
        jsonschema.validate(json.loads(choice["message"]["content"]), LOOKAHEAD)
    task = pb.Task(
        inline=pb.InlineTask(
            user="Say hello.", grammar=pb.Grammar(json_schema=json.dumps(LOOKAHEAD))
        )
    )
    request = pb.RunTaskRequest(task=task, sampling=pb.SamplingOptions(max_tokens=64))
    async with in_front_of(url, "llama.cpp") as front:
        error = await failure(front.stub.RunTask(request))
    assert error.reason in ("OUTPUT_INVALID", "OUTPUT_TRUNCATED")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_image_that_needs_no_resizing_is_read_as_by_the_reference(
    kind: str, urls: Callable[[str], str]
) -> None:
    """Same weights and same pixels give the same analysis."""
    from benchmarks.remote_servers import resized

    drawings = [resized(file.read_bytes()) for file in sorted(FOLDER.glob("*-*.png"))[:6]]
    requests = [pb.AnalyzeImageRequest(images=[pb.Image(data=one)]) for one in drawings]
    async with running(ReferenceEngine(BUNDLED_MODEL)) as reference:
        expected = [(await reference.stub.AnalyzeImage(one)).analysis for one in requests]
    async with in_front_of(urls(kind), kind) as front:
        found = [(await front.stub.AnalyzeImage(one)).analysis for one in requests]
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    # LMDeploy computes in bfloat16, where a close decision may fall the other way.
    assert same >= (len(expected) - 1 if kind == "lmdeploy" else len(expected))


async def test_our_own_http_server_behind_ours() -> None:
    async with serving() as back:
        url = f"http://127.0.0.1:{back.http.port}"
        description = await described(url)
        assert description.back_end.kind == "qwen3vl-http"
        async with in_front_of(url, "qwen3vl-http") as front:
            grammar = pb.Grammar(json_schema=json.dumps({"enum": ["yes"]}))
            task = pb.Task(inline=pb.InlineTask(user="Well?", grammar=grammar))
            result = (await front.stub.RunTask(pb.RunTaskRequest(task=task))).result
    assert json.loads(result.json) == "yes"
