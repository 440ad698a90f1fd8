"""analyze, run, tasks, health against a real server: what is printed, exit codes, errors."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from service.engines.fake import FakeEngine
from service.grpc_api.server import VisionServer
from service.settings import Settings
from service.tasks.registry import load_registry
from tests.ports import free_port
from tests.service.cli.terminal import called, qwen3vl
from tests.service.harness import Running, image_bytes, running

pytestmark = pytest.mark.slow

ANALYSIS = {
    "scene": "desert",
    "description": "A desert at night.",
    "subjects": [],
    "objects": ["large red circle", "small blue square"],
    "actions": [],
    "mood": ["calm"],
    "shot_type": "wide",
    "lighting": ["night"],
    "tags": ["desert", "night", "circle", "square"],
}


def analyst() -> FakeEngine:
    return FakeEngine(json.dumps(ANALYSIS))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.jpg"
    path.write_bytes(image_bytes())
    return path


def plain(text: str) -> str:
    """Without the frame and the line breaks of an error about wrong use."""
    return " ".join(text.replace("│", " ").split())


def at(started: Running) -> tuple[str, str]:
    return ("--server", started.address)


# Answers


async def test_analyze_prints_a_line_a_field(image: Path) -> None:
    async with running(analyst()) as started:
        done = await called("analyze", *at(started), image)
    assert done.code == 0
    assert done.out.splitlines() == [
        "scene:       desert",
        "description: A desert at night.",
        "subjects:    -",
        "objects:     large red circle, small blue square",
        "actions:     -",
        "mood:        calm",
        "shot_type:   wide",
        "lighting:    night",
        "tags:        desert, night, circle, square",
    ]
    assert "fake: " in done.err
    assert "prompt tokens (3 of images)" in done.err


async def test_analyze_prints_the_whole_response_as_json(image: Path) -> None:
    async with running(analyst()) as started:
        done = await called("analyze", "--json", *at(started), image, image)
    assert (done.code, done.err) == (0, "")
    response = json.loads(done.out)
    assert list(response["analysis"].items()) == list(ANALYSIS.items())
    assert response["model"] == "fake"
    assert response["usage"]["image_tokens"] == 6


async def test_run_with_a_schema(image: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"count": {"type": "integer"}}}')
    async with running(FakeEngine('{"count": 3}')) as started:
        done = await called("run", *at(started), "--schema", schema, "--prompt", "Count.", image)
    assert (done.code, json.loads(done.out)) == (0, {"count": 3})
    assert done.out == '{\n  "count": 3\n}\n'


async def test_run_with_an_order_of_properties(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {}, "b": {}}}')
    engine = FakeEngine(
        lambda request: json.dumps({"a": str(request.grammar and request.grammar.property_order)})
    )
    words = ("--schema", schema, "--prompt", "Count.")
    async with running(engine) as started:
        for order in ("any", "declared"):
            done = await called("run", *at(started), *words, "--property-order", order)
            assert json.loads(done.out) == {"a": f"PropertyOrder.{order.upper()}"}


async def test_run_prints_digits_as_they_came(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "number"}}')
    async with running(FakeEngine("[1.10, 1E2]")) as started:
        done = await called("run", *at(started), "--schema", schema, "--prompt", "Count.")
    assert (done.code, done.out) == (0, "[1.10, 1E2]\n")


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ([], "This is the fake engine."),
        (["--choice", "day", "--choice", "night"], "day"),
        (["--regex", "[0-9]{4}"], "2026"),
    ],
)
async def test_run_prints_text(options: list[str], answer: str) -> None:
    async with running(FakeEngine(answer)) as started:
        done = await called("run", *at(started), "--prompt", "Answer.", *options)
    assert (done.code, done.out) == (0, f"{answer}\n")


async def test_run_with_an_ebnf_grammar(tmp_path: Path) -> None:
    grammar = tmp_path / "grammar.ebnf"
    grammar.write_text('root ::= "yes" | "no"')
    async with running(FakeEngine("no")) as started:
        done = await called("run", *at(started), "--prompt", "Answer.", "--ebnf", grammar)
    assert (done.code, done.out) == (0, "no\n")


async def test_run_of_a_registered_task(image: Path) -> None:
    async with running(analyst()) as started:
        done = await called("run", *at(started), "--task", "image-analysis", image)
    assert (done.code, json.loads(done.out)) == (0, ANALYSIS)


async def test_a_stream_prints_the_text_once() -> None:
    async with running(FakeEngine("one two three")) as started:
        done = await called("run", *at(started), "--prompt", "Count.", "--stream")
        events = await called("run", *at(started), "--prompt", "Count.", "--stream", "--json")
    assert (done.code, done.out) == (0, "one two three\n")
    lines = [json.loads(line) for line in events.out.splitlines()]
    assert "".join(line["delta"] for line in lines[:-1]) == "one two three"
    assert lines[-1]["result"]["text"] == "one two three"


async def test_a_stream_that_is_cut_ends_its_line_before_the_error() -> None:
    async with running(FakeEngine("one two three four")) as started:
        done = await called(
            "run", *at(started), "--prompt", "Count.", "--stream", "--max-tokens", 2
        )
    assert (done.code, done.out) == (1, "one two\n")
    assert "OUT_OF_RANGE (OUTPUT_TRUNCATED)" in done.err
    assert "--max-tokens" in done.err


async def test_tasks() -> None:
    async with running() as started:
        done = await called("tasks", *at(started))
        as_json = await called("tasks", "--json", *at(started))
    assert done.code == 0
    assert done.out.split()[:3] == ["image-analysis", "json_schema", "enforced"]
    assert "needs an image" in done.out
    (task,) = json.loads(as_json.out)["tasks"]
    assert task["name"] == "image-analysis"
    assert json.loads(task["grammar"]["json_schema"])["type"] == "object"


async def test_health_follows_the_server() -> None:
    engine = FakeEngine()
    async with running(engine, load=False) as started:
        loading = await called("health", *at(started))
        await started.server.load()
        serving = await called("health", *at(started))
    assert (loading.code, loading.out) == (1, "NOT_SERVING\n")
    assert (serving.code, serving.out) == (0, "SERVING\n")


async def test_health_waits_for_a_model_that_loads() -> None:
    async with running(FakeEngine(start_delay_s=0.5), load=False) as started:
        waiting = asyncio.create_task(called("health", *at(started), "--wait", 60))
        await started.server.load()
        done = await waiting
        gave_up = await called("health", "--server", f"127.0.0.1:{free_port()}", "--wait", 0.3)
    assert (done.code, done.out, done.err) == (0, "SERVING\n", "")
    assert gave_up.code == 1
    assert "No server answers" in gave_up.err


async def test_health_waits_for_a_server_that_starts() -> None:
    port = free_port()
    waiting = asyncio.create_task(called("health", "--server", f"127.0.0.1:{port}", "--wait", 60))
    await asyncio.sleep(0.5)
    server = VisionServer(Settings(port=port), FakeEngine(), load_registry(None))
    await server.start()
    try:
        await server.load()
        assert (await waiting).out == "SERVING\n"
    finally:
        await server.stop(0)


async def test_sampling_options_reach_the_server() -> None:
    seen = []

    def answer(request: object) -> str:
        seen.append(request.sampling)  # type: ignore[attr-defined]
        return "fine"

    options = "--temperature 0.5 --top-p 0.9 --top-k 7 --repetition-penalty 1.1 --seed 5"
    async with running(FakeEngine(answer)) as started:
        done = await called(
            "run", *at(started), "--prompt", "x", *options.split(), "--max-tokens", 9
        )
    assert done.code == 0
    sampling = seen[-1]
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 7, 5)
    assert sampling.top_p == pytest.approx(0.9)
    assert sampling.repetition_penalty == pytest.approx(1.1)
    assert sampling.max_tokens == 9


async def test_the_server_is_found_in_the_environment() -> None:
    async with running() as started:
        done = await called("health", env={"QWEN3VL_SERVER": started.address})
    assert done.code == 0


# Errors of the server, in the words of the command


async def test_the_image_that_is_wrong_is_named(image: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("This is no image.")
    async with running(analyst()) as started:
        done = await called("analyze", *at(started), image, text)
    assert (done.code, done.out) == (1, "")
    first, second = done.err.splitlines()
    assert first.startswith("INVALID_ARGUMENT (IMAGE_FORMAT_UNSUPPORTED): ")
    assert str(text) in first
    assert "images[" not in first
    assert second.startswith("  Request id: ")


@pytest.mark.parametrize(
    ("options", "reason", "says"),
    [
        (["--temperature", "5"], "SAMPLING_OPTION_INVALID", "--temperature"),
        (["--top-p", "0"], "SAMPLING_OPTION_INVALID", "--top-p"),
        (["--max-tokens", "0"], "SAMPLING_OPTION_INVALID", "--max-tokens"),
        (["--max-tokens", "1000000"], "CONTEXT_TOO_LONG", "--max-tokens"),
        (["--regex", "["], "GRAMMAR_INVALID", "--regex"),
        (["--choice", "a", "--choice", "a"], "GRAMMAR_INVALID", "--choice[1]"),
    ],
)
async def test_the_option_that_is_wrong_is_named(
    options: list[str], reason: str, says: str
) -> None:
    async with running() as started:
        done = await called("run", *at(started), "--prompt", "x", *options)
    assert done.code == 1
    assert f"INVALID_ARGUMENT ({reason})" in done.err
    assert says in done.err


async def test_a_prompt_that_fills_the_context_is_named() -> None:
    async with running(FakeEngine(context_length=50)) as started:
        fits = await called("run", *at(started), "--prompt", "word " * 40)
        done = await called("run", *at(started), "--prompt", "word " * 50)
    assert (fits.code, done.code) == (0, 1)
    first = done.err.splitlines()[0]
    assert first.startswith("INVALID_ARGUMENT (CONTEXT_TOO_LONG): the prompt: 51 tokens leave no")
    assert "--max-tokens" not in done.err


async def test_a_prompt_with_examples_that_fills_the_context_is_named(tmp_path: Path) -> None:
    examples = tmp_path / "examples.yaml"
    examples.write_text("- {user: word, assistant: word}\n")
    async with running(FakeEngine(context_length=50)) as started:
        said = ["--examples", examples, "--prompt", "word " * 50]
        done = await called("run", *at(started), *said)
    assert done.code == 1
    first = done.err.splitlines()[0]
    assert first.startswith("INVALID_ARGUMENT (CONTEXT_TOO_LONG): the prompt: 5")


async def test_an_empty_analysis_is_an_error_with_advice(image: Path) -> None:
    empty = {name: [] if isinstance(value, list) else "" for name, value in ANALYSIS.items()}
    async with running(FakeEngine(json.dumps(empty))) as started:
        done = await called("analyze", *at(started), image)
        accepted = await called("analyze", "--accept-empty", *at(started), image)
    assert (done.code, accepted.code) == (1, 0)
    assert "INTERNAL (NO_USABLE_FIELDS)" in done.err
    assert "--accept-empty" in done.err


async def test_a_file_that_is_not_a_schema_is_named(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text("properties: {}")
    async with running() as started:
        done = await called("run", *at(started), "--prompt", "x", "--schema", schema)
    assert done.code == 1
    assert "INVALID_ARGUMENT (SCHEMA_NOT_JSON): --schema: is not JSON" in done.err


async def test_an_unknown_task_names_those_that_are_known() -> None:
    async with running() as started:
        done = await called("run", *at(started), "--task", "image-analyses")
    assert done.code == 1
    assert "NOT_FOUND" in done.err
    assert "Did you mean: image-analysis?" in done.err


async def test_a_missing_or_wrong_api_key_is_explained(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me:{hashlib.sha256(b'secret').hexdigest()}\n")
    async with running(api_keys_file=keys) as started:
        missing = await called("tasks", *at(started))
        wrong = await called("tasks", *at(started), "--api-key", "guess")
        right = await called("tasks", *at(started), env={"QWEN3VL_API_KEY": "secret\n"})
        health = await called("health", *at(started))
    assert (missing.code, wrong.code, right.code, health.code) == (1, 1, 0, 0)
    assert "UNAUTHENTICATED (API_KEY_MISSING)" in missing.err
    assert "--api-key, or in QWEN3VL_API_KEY" in missing.err
    assert "UNAUTHENTICATED (API_KEY_INVALID)" in wrong.err
    assert "guess" not in wrong.err


async def test_a_loading_model_is_explained() -> None:
    async with running(load=False) as started:
        done = await called("tasks", *at(started))
    assert done.code == 1
    assert "UNAVAILABLE (ENGINE_LOADING)" in done.err


async def test_a_short_deadline_is_explained() -> None:
    engine = FakeEngine("one two")
    async with running(engine) as started:
        engine.token_delay_s = 5.0
        done = await called("run", *at(started), "--prompt", "x", "--timeout", 0.2)
    assert done.code == 1
    assert "DEADLINE_EXCEEDED" in done.err or "did not answer within 0.2 s" in done.err


# No server, or not the one that was meant


@pytest.mark.parametrize("words", [("tasks",), ("health",), ("run", "--prompt", "x")])
def test_without_a_server_the_next_step_is_named(words: tuple[str, ...]) -> None:
    address = f"127.0.0.1:{free_port()}"
    done = qwen3vl(*words, "--server", address)
    assert (done.code, done.out) == (1, "")
    assert f"No server answers at {address}. Start one with `qwen3vl serve`" in done.err


@pytest.mark.parametrize("address", ["http://localhost:50051", "", "localhost", "localhost:port"])
def test_an_invalid_address_is_a_usage_error(address: str) -> None:
    done = qwen3vl("tasks", "--server", address)
    assert done.code == 2
    assert "is not HOST:PORT, for example localhost:50051" in plain(done.err)


def test_an_unknown_host_is_explained() -> None:
    done = qwen3vl("tasks", "--server", "nobody.invalid:50051")
    assert done.code == 1
    assert "nobody.invalid:50051" in done.err


async def test_tls_to_a_server_without_tls_is_explained(tmp_path: Path, certificate: Path) -> None:
    async with running() as started:
        done = await called("tasks", *at(started), "--ca", certificate)
    assert done.code == 1
    assert f"{started.address} does not use TLS" in done.err


async def test_tls_with_every_kind_of_certificate(tmp_path: Path, certificate: Path) -> None:
    key = certificate.with_suffix(".key")
    async with running(tls_cert=certificate, tls_key=key) as started:
        port = started.server.port
        right = await called("tasks", "--server", f"localhost:{port}", "--ca", certificate)
        plain = await called("tasks", "--server", f"localhost:{port}")
        other_name = await called("tasks", "--server", f"127.0.0.1:{port}", "--ca", certificate)
        not_pem = await called("tasks", "--server", f"localhost:{port}", "--ca", key)
    assert (right.code, plain.code, other_name.code, not_pem.code) == (0, 1, 1, 1)
    assert "if it speaks TLS, name its CA with --ca" in plain.err
    assert "is not for the name in 127.0.0.1" in other_name.err
    assert "--ca does not hold a certificate" in not_pem.err


# Wrong use


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["analyze"], "Missing argument"),
        (["analyze", "nowhere.png"], "nowhere.png"),
        (["run"], "give either --prompt or --task"),
        (["run", "--prompt", "x", "--task", "y"], "give either --prompt or --task"),
        (["run", "--task", "y", "--regex", "a"], "has its own texts and grammar"),
        (["run", "--prompt", "x", "--regex", "a", "--choice", "b"], "give at most one of"),
        (["run", "--prompt", "x", "--schema", "nowhere.json"], "nowhere.json"),
        (["run", "--prompt", "x", "--property-order", "any"], "--property-order needs a --schema"),
        (["run", "--task", "y", "--property-order", "any"], "has its own texts and grammar"),
        (["schema", "pyproject.toml", "--property-order", "sorted"], "--property-order"),
        (["run", "--prompt", "x", "--top-k", "-1"], "-1 is not possible for --top-k"),
        (["run", "--prompt", "x", "--seed", str(2**70)], "--seed"),
        (["run", "--prompt", "x", "--timeout", "0"], "--timeout"),
        (["tasks", "--cert", "pyproject.toml"], "--cert and --key belong together"),
        (["tasks", "--cert", "Makefile", "--key", "Makefile"], "--cert and --key need --ca"),
        (["tasks", "--server", "localhost:0"], "0 in 'localhost:0' is not a port; ports are 1 to"),
        (["health", "--server", "localhost:99999"], "99999 in 'localhost:99999' is not a port"),
        (["tasks", "--api-key", "ünï"], "characters other than printable ASCII"),
        (["tasks", "--api-key", "a\nb"], "characters other than printable ASCII"),
        (["tasks", "--api-key", ""], "is empty or has characters"),
        (["paint"], "No such command 'paint'"),
    ],
)
def test_usage_errors_come_before_a_call(words: list[str], says: str) -> None:
    done = qwen3vl(*words)
    assert (done.code, done.out) == (2, "")
    assert says in plain(done.err)


def test_a_schema_file_that_is_not_text_is_refused(image: Path) -> None:
    done = qwen3vl("run", "--prompt", "x", "--schema", image)
    assert done.code == 2
    assert "cannot be read as UTF-8 text" in plain(done.err)


def test_help_and_version() -> None:
    assert qwen3vl("--version").out.startswith("qwen3vl ")
    for words in (["--help"], ["analyze", "-h"], ["run", "--help"], ["tasks", "-h"]):
        done = qwen3vl(*words)
        assert (done.code, done.err) == (0, "")
        assert "Usage: qwen3vl" in done.out
