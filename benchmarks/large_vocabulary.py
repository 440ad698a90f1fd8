"""Grammars over as many tokens as Qwen3-VL's tokenizer has: time to compile, and of each mask.

``python -m benchmarks large_vocabulary``. The tokens are made up, for a tokenizer cannot be had
everywhere: single bytes, words and their parts with and without a space before them, Han and
Cyrillic, and what stands between values in JSON. A grammar compiles once; each token of each
answer waits for a mask.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xgrammar

from benchmarks.collection import Case, collection_argument, read_collection
from benchmarks.common import Sample, markdown, write_results
from benchmarks.report import shown
from service.errors import GrammarError
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.types import Grammar, GrammarKind

TOKENS = 151_936
QUICK_TOKENS = 3_000
THREADS = 2
NOTES = (
    "xgrammar's own conversion of schemas beside ours, of which it compiles the EBNF, {threads} threads, "
    "{tokens:,} made-up tokens; each grammar compiled once, with nothing kept from the one before. A mask "
    "for each byte of the answer: median (fastest-slowest). A string of at most 255 characters is CHECKED with "
    "us: its grammar does not count so far. Schemas of a collection that both take: median (90 %, all)."
)
EVERY = 25
"""Of a collection, every so manyth schema; a quick run takes fewer."""
_SYLLABLES = re.findall(
    "..",
    "thineranreonatenndtiesorteofedisitalarsttontngse"
    "haasouiolevecomedehiriroicnearacelichllbemasiomur",
)
_BETWEEN = (
    '", "',
    '":',
    '"}',
    '": "',
    "\n",
    "  ",
    ". ",
    ", ",
    '\\"',
    "\\n",
    '["',
    '"]',
    "{}",
    "[]",
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "email": {"type": "string", "format": "email"},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 20},
    },
    "required": ["name", "email", "born", "tags"],
    "additionalProperties": False,
}
CASES: list[tuple[str, Any, Any]] = [
    ("string", {"type": "string"}, "hello there, all of you"),
    ("string of at most 16", {"type": "string", "maxLength": 16}, "hello there"),
    ("string of at most 64", {"type": "string", "maxLength": 64}, "hello there, all of you"),
    ("string of at most 255", {"type": "string", "maxLength": 255}, "hello there, all of you"),
    ("open object", {"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1, "b": "x"}),
    (
        "person",
        PERSON,
        {"name": "Ada", "email": "ada@example.org", "born": "1815-12-10", "tags": ["a", "b"]},
    ),
]  # fmt: skip
"""Name, schema, an answer."""


def tokens(count: int) -> list[bytes]:
    """So many different tokens, the same each time."""
    rng = random.Random(1)
    found = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *map(str.encode, _BETWEEN)])
    while len(found) < count:
        found[_token(rng).encode()] = None
    return list(found)


def _token(rng: random.Random) -> str:
    kind = rng.random()
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 4)))
    if kind < 0.65:
        return rng.choice(("", " ")) + (word.capitalize() if kind < 0.1 else word)
    if kind < 0.85:
        return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(1, 3)))
    if kind < 0.92:
        return "".join(chr(rng.randint(0x430, 0x44F)) for _ in range(rng.randint(2, 6)))
    if kind < 0.96:
        return "".join(rng.choice(string.punctuation + " ") for _ in range(rng.randint(2, 4)))
    return rng.choice(_BETWEEN) + word


def engines(vocabulary: list[bytes]) -> dict[str, Callable[[Any], Any]]:
    """How each compiles a schema."""
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[0])

    def compiler() -> Any:
        return xgrammar.GrammarCompiler(info, max_threads=THREADS, cache_enabled=False)

    def theirs(schema: Any) -> Any:
        return compiler().compile_json_schema(
            json.dumps(schema), any_whitespace=False, strict_mode=False
        )

    def ours(schema: Any) -> Any:
        found = analyse(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), DEFAULT_LIMITS)
        return compiler().compile_grammar(found.grammar.ebnf)

    return {"xgrammar": theirs, "ours": ours}


def masks(compiled: Any, answer: str, width: int) -> tuple[float, ...]:
    """Seconds of the mask before each character of an answer."""
    matcher = xgrammar.GrammarMatcher(compiled)
    mask = xgrammar.allocate_token_bitmask(1, width)
    times = []
    for character in answer:
        begun = time.perf_counter()
        matcher.fill_next_token_bitmask(mask)
        times.append(time.perf_counter() - begun)
        assert matcher.accept_string(character), f"{answer} is refused at {character!r}"
    return tuple(times)


def collected(cases: list[Case], compilers: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The row of the schemas of a collection."""
    seconds: dict[str, list[float]] = {"xgrammar": [], "ours": []}
    for case in cases:
        spent = {}
        for engine, compile_ in compilers.items():
            begun = time.perf_counter()
            try:
                compile_(case.schema)
            except (GrammarError, RuntimeError):
                break
            spent[engine] = time.perf_counter() - begun
        else:
            for engine, one in spent.items():
                seconds[engine].append(one)
    row: dict[str, Any] = {"schema": f"{len(seconds['ours'])} of a collection"}
    for engine, found in seconds.items():
        half, most, all_ = np.quantile(found, (0.5, 0.9, 1))
        row[f"{engine}: compile s"] = f"{half:.2f} ({most:.2f}, {all_:.1f})"
        row[f"{engine}: mask ms"] = "-"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that it runs")
    collection_argument(parser)
    options = parser.parse_args()
    count = QUICK_TOKENS if options.quick else TOKENS
    compilers = engines(tokens(count))
    rows = []
    for name, schema, answer in CASES:
        row: dict[str, Any] = {"schema": name}
        for engine, compile_ in compilers.items():
            begun = time.perf_counter()
            compiled = compile_(schema)
            row[f"{engine}: compile s"] = round(time.perf_counter() - begun, 3)
            text = json.dumps(answer, ensure_ascii=False)
            row[f"{engine}: mask ms"] = Sample(masks(compiled, text, count)).row()
        rows.append(row)
        print(markdown([shown(row)]), flush=True)
    cases = read_collection(options.schemas)
    if cases is not None:
        rows.append(collected(cases[:: EVERY * 4 if options.quick else EVERY], compilers))
        print(markdown([shown(rows[-1])]), flush=True)
    write_results("large_vocabulary", rows, NOTES.format(threads=THREADS, tokens=count))


if __name__ == "__main__":
    main()
