"""The xgrammar inside TurboMind's module reads our EBNF as the one that pip installs does: the masks of
whole answers, as they arrive at TurboMind's kernel, on the host runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.types import Grammar, GrammarKind
from tests.host_runtime.runner import run

pytestmark = [pytest.mark.slow, pytest.mark.host]

ANSWERS, TOKENS = 3, 60


def closed(**properties: Any) -> dict[str, Any]:
    """An object with just these members, all of them required."""
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


def several(items: Any, least: int = 0, most: int | None = None) -> dict[str, Any]:
    found = {"type": "array", "items": items, "minItems": least}
    return found if most is None else {**found, "maxItems": most}


TEXT, WHOLE, YES = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
COLOUR = {"enum": ["red", "green", "pale blue"]}
TREE = {
    "$defs": {"node": closed(name={"type": "string", "maxLength": 3}, below=several({"$ref": "#/$defs/node"}, 0, 2))},
    "$ref": "#/$defs/node",
}  # fmt: skip
SCHEMAS: list[Any] = [
    TEXT, WHOLE, YES, {"type": "number"}, {"type": "null"}, COLOUR, {"const": {"a": [1, "é"]}},
    {"type": "string", "minLength": 2, "maxLength": 4}, {"type": "string", "minLength": 30},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}, {"type": "string", "pattern": "ab|cd"},
    {"type": "string", "pattern": "^(left|right)( (up|down))?$"},
    {"type": "string", "format": "date"}, {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"}, {"type": "string", "format": "email"},
    {"type": "string", "format": "ipv4"},
    {"type": "integer", "minimum": -12, "maximum": 345}, {"type": "integer", "multipleOf": 7},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"type": "number", "minimum": 2.5},
    several(WHOLE), several(COLOUR, 2, 4), several(several(YES, 1, 2), 1, 2),
    {"type": "array", "prefixItems": [WHOLE, TEXT], "items": False, "minItems": 2},
    {"type": "array", "items": COLOUR, "minItems": 40, "maxItems": 50},
    closed(), closed(shape=TEXT, count=WHOLE), closed(inner=closed(deep=closed(yes=YES))),
    {"type": "object", "properties": {"a": WHOLE, "b": TEXT, "c": YES}, "required": ["b"],
     "additionalProperties": False},
    {"type": "object", "additionalProperties": WHOLE, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x_": YES}, "additionalProperties": False},
    {"anyOf": [WHOLE, TEXT, {"type": "null"}]}, {"oneOf": [closed(a=YES), closed(b=WHOLE)]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"type": ["string", "null"], "maxLength": 2},
    {"anyOf": [closed(kind={"const": "box"}, side=WHOLE), closed(kind={"const": "ball"}, radius=WHOLE)]},
    TREE,
]  # fmt: skip
OTHERS = [
    (GrammarKind.CHOICE, '["yes", "no", "per\\"haps", "né"]'),
    (GrammarKind.REGEX, "(ab|c)+[0-9]{2,3}"),
    (GrammarKind.REGEX, "[^x]{3}\\n?"),
    (GrammarKind.REGEX, "[\u0712-\u5678\ua0bf-\ud7ff\uffee-\uffff]{30}"),
    (GrammarKind.REGEX, "[\U0001f600-\U00023456\U000401bf-\U000cffff]{30}"),
    (GrammarKind.EBNF, 'root ::= "a" [b-d]+ ("é" | "\\n")? root?'),
    (GrammarKind.EBNF, "root ::= [一-龥]{20} [^x]{20}"),
]


def grammars() -> list[Grammar]:
    found = [(GrammarKind.JSON_SCHEMA, json.dumps(schema)) for schema in SCHEMAS] + OTHERS
    return [analyse(Grammar(*one), DEFAULT_LIMITS).grammar for one in found]


def vocabulary(folder: Path) -> tuple[list[bytes], tuple[int, ...]]:
    from service.engines.common.chat import Chat
    from service.engines.common.config import TextConfig

    config = TextConfig.from_checkpoint(folder)
    return list(Chat(folder, config).table), tuple(config.stop_ids)


async def _walks(checkpoint: str, wanted: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Random answers under each grammar, and the masks that each saw, as hexadecimal words."""
    import os

    from lmdeploy import GenerationConfig
    from lmdeploy.turbomind import _tm

    import lmdeploy_ext
    from service.engines.lmdeploy.guidance import TurboMindCompiler
    from tests.host_runtime import engines

    lmdeploy_ext.install()
    table, stops = vocabulary(Path(checkpoint))
    compiler = TurboMindCompiler(_tm, table, stops)
    engine = engines.turbomind(checkpoint, async_=0)
    masks, found, session = Path(os.environ["HOST_RUNTIME_MASKS"]), [], 0
    for one in wanted:
        grammar = Grammar(
            GrammarKind(one["kind"]), one["source"], one["ebnf"], one["forces_little"]
        )
        constraint = compiler.compile(grammar)
        answers = []
        for seed in range(ANSWERS):
            masks.write_text("")
            session += 1
            instance = engine.create_instance()
            instance.model_inst.set_grammar(constraint.compiled)
            config = GenerationConfig(
                max_new_tokens=TOKENS, do_sample=True, top_k=0, top_p=1.0, temperature=2.0,
                random_seed=seed, stop_token_ids=list(stops),
            )  # fmt: skip
            tokens: list[int] = []
            async for chunk in instance.async_stream_infer(
                session, input_ids=[20, 21, 22 + seed], gen_config=config
            ):
                tokens += chunk.token_ids
            await engines.idle(engine)
            answers.append({"tokens": tokens, "masks": masks.read_text().split()})
        found.append(answers)
    return found


def bits(line: str) -> np.ndarray:
    words = [int(line[at : at + 8], 16) for at in range(0, len(line), 8)]
    return np.unpackbits(np.array(words, "<u4").view(np.uint8), bitorder="little").astype(bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.service.engines.lmdeploy import stock

    return stock.write(tmp_path_factory.mktemp("grammars"))


def test_masks_are_those_of_the_xgrammar_that_pip_installs(folder: Path, tmp_path: Path) -> None:
    import xgrammar

    from service.engines.common.grammar import GrammarCompiler

    table, stops = vocabulary(folder)
    ready = grammars()
    sent = [
        {"kind": one.kind.value, "source": one.source, "ebnf": one.ebnf,
         "forces_little": one.forces_little}
        for one in ready
    ]  # fmt: skip
    found = run(
        _walks, folder, sent, mode="numbers", timeout_s=280,
        extra={"HOST_RUNTIME_MASKS": str(tmp_path / "masks")},
    )  # fmt: skip
    compiler = GrammarCompiler(table, stops)
    compared, differences = 0, []
    for grammar, answers in zip(ready, found, strict=True):
        compiled = compiler.compile(grammar)
        permitted = compiler.permitted_json if compiled.is_json else compiler.permitted
        for answer in answers:
            matcher = xgrammar.GrammarMatcher(compiled.automaton)
            mask = xgrammar.allocate_token_bitmask(1, len(table))
            assert len(answer["masks"]) >= len(answer["tokens"]) > 0
            for step, token in enumerate(answer["tokens"]):
                matcher.fill_next_token_bitmask(mask)
                ours = (mask.numpy() & permitted).view("<u4")[0]
                ours = np.unpackbits(ours.view(np.uint8), bitorder="little").astype(bool)
                theirs = bits(answer["masks"][step])
                ours, theirs = ours[: len(table)], theirs[: len(table)]
                before = b"".join(table[one] for one in answer["tokens"][:step])
                extra, missing = (
                    [table[index] for index in np.flatnonzero(which)]
                    for which in (theirs & ~ours, ours & ~theirs)
                )
                if extra or missing:
                    differences.append((grammar.source, before, extra[:5], missing[:5]))
                if extra or missing or not ours[token]:
                    break
                compared += 1
                assert matcher.accept_token(token)
    print(f"{compared} masks of {len(ready)} grammars compared")
    assert differences == [], differences
    assert compared > 1000
