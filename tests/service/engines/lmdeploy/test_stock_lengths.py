"""Lengths of strings on the stock TurboMind of the host runtime: its masks are those of the reference
engine, token by token, and its answers fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.report import Enforcement
from service.types import Grammar, GrammarKind
from tests.host_runtime.runner import run
from tests.service.engines.lmdeploy.test_stock_grammars import bits, closed, several, vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.host]


def text(low: int, high: int) -> dict[str, Any]:
    return {"type": "string", "minLength": low, "maxLength": high}


def exactly(*lengths: int) -> dict[str, Any]:
    """An object whose strings have these lengths."""
    return closed(**{f"m{at}": text(length, length) for at, length in enumerate(lengths)})


NODE = closed(name=text(1, 2), below=several({"$ref": "#/$defs/node"}, 0, 1))
SCHEMAS: list[Any] = [
    text(0, 0), text(0, 1), text(1, 1), text(2, 4), text(30, 33), exactly(3, 0, 7), exactly(66),
    several(text(1, 2), 2, 4), closed(a=several(text(0, 1), 1, 2), b=text(5, 5), c={"type": "null"}),
    {"anyOf": [text(3, 4), {"type": "null"}]}, {"anyOf": [text(2, 3), {"enum": ["ab", "xyz"]}]},
    {"type": "object", "properties": {"b": text(0, 2)}, "additionalProperties": text(1, 3),
     "maxProperties": 3},
    {"type": "array", "prefixItems": [text(1, 1), text(2, 2)], "items": text(3, 3), "minItems": 4, "maxItems": 5},
    {**text(0, 2), "not": {"enum": ["ab", ""]}}, {"$defs": {"node": NODE}, **NODE},
    {"type": "string", "pattern": "^[^:]+:[^:]+:[^:]+$", "maxLength": 66},
    {"type": "object", "patternProperties": {"^[^:]{0,66}$": text(0, 2)}, "additionalProperties": False},
]  # fmt: skip


def grammar(schema: Any) -> Grammar:
    source = json.dumps(schema)
    found = analyse(Grammar(GrammarKind.JSON_SCHEMA, source, lengths_beside=True), DEFAULT_LIMITS)
    assert found.report.enforcement is Enforcement.ENFORCED, schema
    assert found.grammar.lengths, schema
    return found.grammar


def sent(grammars: list[Grammar]) -> list[dict[str, Any]]:
    return [
        {"source": one.source, "ebnf": one.ebnf, "lengths": one.lengths.hex()} for one in grammars
    ]


class Engine:
    """The stock engine in a child, with hooks."""

    def __init__(self, checkpoint: str, **settings: Any) -> None:
        from lmdeploy.turbomind import _tm

        import lmdeploy_ext
        from lmdeploy_ext.deepstack import Mode
        from lmdeploy_ext.lengths import modes
        from service.engines.lmdeploy.guidance import TurboMindCompiler
        from tests.host_runtime import engines

        lmdeploy_ext.install()
        self.table, self.stops = vocabulary(Path(checkpoint))
        self.library = modes.enter(Mode.REQUIRE)
        assert self.library is not None
        self.compiler = TurboMindCompiler(_tm, self.table, self.stops, self.library)
        self.engines, self.native = engines, engines.turbomind(checkpoint, **settings)

    def compile(self, one: dict[str, Any]) -> Any:
        lengths = bytes.fromhex(one["lengths"])
        kind = GrammarKind.JSON_SCHEMA
        return self.compiler.compile(Grammar(kind, one["source"], one["ebnf"], lengths=lengths))

    async def answer(
        self, session: int, constraint: Any, *, tokens: int, seed: int, stop_after: int = 0
    ) -> list[int]:
        from lmdeploy import GenerationConfig

        instance = self.native.create_instance()
        if constraint is not None:
            instance.model_inst.set_grammar(constraint.compiled)
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=True, top_k=0, top_p=1.0, temperature=2.0,
            random_seed=seed, stop_token_ids=list(self.stops),
        )  # fmt: skip
        found: list[int] = []
        async for chunk in instance.async_stream_infer(
            session, input_ids=[20, 21, 22 + session % 7], gen_config=config
        ):
            found += chunk.token_ids
            if stop_after and len(found) >= stop_after:
                await instance.async_cancel(session)
                stop_after = 0
        return found

    def text(self, tokens: list[int]) -> str:
        return b"".join(self.table[one] for one in tokens).decode(errors="replace")


async def _walks(checkpoint: str, wanted: list[dict[str, Any]], answers: int) -> dict[str, Any]:
    """Random answers under each grammar, and the masks that each saw, as hexadecimal words."""
    import os

    engine = Engine(checkpoint, async_=0)
    masks, found, session = Path(os.environ["HOST_RUNTIME_MASKS"]), [], 0
    for one in wanted:
        constraint = engine.compile(one)
        found.append([])
        for seed in range(answers):
            masks.write_text("")
            session += 1
            tokens = await engine.answer(
                session, constraint, tokens=40 if answers == 1 else 150, seed=seed
            )
            await engine.engines.idle(engine.native)
            found[-1].append({"tokens": tokens, "masks": masks.read_text().split()})
    return {"answers": found, "counters": engine.library.counters()._asdict()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.service.engines.lmdeploy import stock

    return stock.write(tmp_path_factory.mktemp("lengths"))


@pytest.mark.parametrize("answers", [1, pytest.param(6, marks=pytest.mark.long)])
def test_masks_are_those_of_the_reference_engine(
    answers: int, folder: Path, tmp_path: Path
) -> None:
    from service.engines.common.grammar import GrammarCompiler, Matcher

    table, stops = vocabulary(folder)
    grammars = [grammar(schema) for schema in SCHEMAS]
    found = run(
        _walks, folder, sent(grammars), answers, mode="numbers", timeout_s=580,
        extra={"HOST_RUNTIME_MASKS": str(tmp_path / "masks")},
    )  # fmt: skip
    compiler = GrammarCompiler(table, stops)
    compared = complete = 0
    for one, schema, given in zip(grammars, SCHEMAS, found["answers"], strict=True):
        compiled = compiler.compile(one)
        for answer in given:
            matcher = Matcher(compiled, compiler)
            for step, token in enumerate(answer["tokens"]):
                ours = bits(
                    "".join(f"{word & 0xFFFFFFFF:08x}" for word in matcher._next_bits()[0].tolist())
                )
                theirs = bits(answer["masks"][step])
                before = b"".join(table[one] for one in answer["tokens"][:step])
                differ = np.flatnonzero(ours[: len(table)] != theirs[: len(table)])
                assert not differ.size, (schema, before, [table[one] for one in differ[:5]])
                compared += 1
                if token in stops:
                    complete += 1
                    value = json.loads(before)
                    assert jsonschema.Draft202012Validator(schema).is_valid(value), before
                    break
                matcher.accept(token)
    print(f"{compared} masks compared, {complete} answers complete")
    assert compared > 150 * answers
    assert complete >= 5 * answers
    assert found["counters"]["broken"] == 0
    assert found["counters"]["joined"] == answers * len(SCHEMAS)


LENGTHS = [0, 1, 2, 3, 5, 8, 13, 31, 63, 64, 65, 66, 100, 255, 500, 999, 1000, 2000]


async def _concurrent(
    checkpoint: str, wanted: list[dict[str, Any]], lengths: list[int], each: int, async_: int
) -> dict[str, Any]:
    """Batches of guided and free requests; every seventh is cancelled."""
    import asyncio

    engine = Engine(checkpoint, async_=async_, session_len=2560, cache_max_entry_count=0.3)
    constraints = [engine.compile(one) for one in wanted]
    found, plain = [], []

    async def ask(number: int, at: int) -> None:
        stop = 3 if number % 7 == 6 else 0
        room = 2 * lengths[at] + 60 if lengths[at] else 60
        tokens = await engine.answer(
            number + 1, constraints[at], tokens=min(room, 2400), seed=number, stop_after=stop
        )
        if not stop:
            found.append([at, engine.text(tokens)])

    async def free(number: int) -> None:
        plain.append(len(await engine.answer(10_000 + number, None, tokens=9, seed=number)))

    jobs = [ask(number, number % len(wanted)) for number in range(each * len(wanted))]
    await asyncio.gather(*jobs, *(free(number) for number in range(4)))
    await engine.engines.idle(engine.native)
    return {"found": found, "plain": plain, "counters": engine.library.counters()._asdict()}


@pytest.mark.parametrize(
    ("each", "async_"),
    [
        (1, 1),
        pytest.param(10, 0, marks=pytest.mark.long),
        pytest.param(10, 1, marks=pytest.mark.long),
    ],
)
def test_batches_of_strings_of_given_lengths(each: int, async_: int, folder: Path) -> None:
    lengths = LENGTHS if each > 1 else LENGTHS[:10]
    schemas = [closed(a=text(length, length), b=text(0, length)) for length in lengths]
    grammars = [grammar(schema) for schema in schemas]
    found = run(
        _concurrent, folder, sent(grammars), lengths, each, async_, mode="numbers", timeout_s=580
    )
    complete = 0
    for at, answer in found["found"]:
        if not answer.endswith("}"):  # cut: a model with random weights writes escapes and bytes
            continue
        complete += 1
        value = json.loads(answer)
        assert len(value["a"]) == lengths[at]
        assert jsonschema.Draft202012Validator(schemas[at]).is_valid(value), answer
    print(f"{complete} of {len(found['found'])} answers complete")
    assert complete > len(found["found"]) // 3
    counters = found["counters"]
    assert (counters["broken"], counters["evicted"]) == (0, 0)
    assert counters["joined"] == each * len(lengths)
    assert counters["constructed"] == counters["joined"]
    assert len(found["plain"]) == 4


async def _closed_between(checkpoint: str, wanted: list[dict[str, Any]]) -> list[Any]:
    """Two engines one after the other; grammars of the first are dropped while it still runs."""
    import gc

    found = []
    for round_ in range(2):
        engine = Engine(checkpoint, async_=1)
        for number, one in enumerate(wanted):
            constraint = engine.compile(one)
            tokens = await engine.answer(number + 1, constraint, tokens=40, seed=round_)
            found.append(engine.text(tokens))
            await engine.engines.idle(engine.native)
            del constraint
            gc.collect()
        found.append(engine.library.counters().grammars)
        await engine.engines.stop(engine.native)
    return found


def test_engines_that_are_closed_and_grammars_that_are_dropped(folder: Path) -> None:
    schemas = [text(2, 3), {"enum": ["yes", "no"]}, text(4, 4)]
    ready = [grammar(schemas[0]), analyse(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schemas[1])), DEFAULT_LIMITS)
             .grammar, grammar(schemas[2])]  # fmt: skip
    found = run(_closed_between, folder, sent(ready), mode="numbers", timeout_s=280)
    assert found[3] == found[7] == 0, "the limits of dropped grammars are removed"
    for answers in (found[:3], found[4:7]):
        for schema, answer in zip(schemas, answers, strict=True):
            assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(answer)), answer


async def _served(checkpoint: str, schema: str) -> list[Any]:
    """The engine of the service, with and without the hooks."""
    from service.engines.lmdeploy import LMDeployEngine
    from service.types import GenerateRequest, Sampling
    from tests.service.engines.lmdeploy import stock

    found: list[Any] = []
    for mode in ("require", "off"):
        engine = stock.engine(Path(checkpoint), string_lengths=mode, vision=False)
        assert isinstance(engine, LMDeployEngine)
        await engine.start()
        capabilities = engine.capabilities
        beside = capabilities.limits_lengths
        asked = Grammar(GrammarKind.JSON_SCHEMA, schema, lengths_beside=beside)
        analysed = analyse(asked, DEFAULT_LIMITS)
        request = GenerateRequest(
            "one",
            "Say no.",
            grammar=analysed.grammar,
            sampling=Sampling(max_tokens=600, temperature=1.5, seed=3),
        )
        text = "".join([chunk.text async for chunk in engine.generate(request)])
        enforcement = analysed.report.enforcement.value
        found.append([beside, capabilities.details["string_lengths"], enforcement, text])
        await engine.close()
    return found


def test_the_engine_of_the_service(folder: Path) -> None:
    schema = json.dumps(text(70, 72))
    (beside, how, enforcement, answer), without = run(
        _served, folder, schema, mode="numbers", timeout_s=280
    )
    assert (beside, how, enforcement) == (True, "beside the grammar", "enforced")
    assert 70 <= len(json.loads(answer)) <= 72
    assert without[:3] == [False, "up to 64 in the grammar", "checked"]
