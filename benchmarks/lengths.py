"""Time that counting the lengths of strings beside the grammar adds to each mask.

``python -m benchmarks lengths``. Random answers over the tokens of Qwen: each token waits for the mask of
the grammar and for the limits of strings. Only the limits are measured, in processor time of the thread,
for the library that TurboMind runs and for its definition in Python, which
the reference engine runs. Without a C compiler only the latter.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from benchmarks.common import markdown, write_results
from benchmarks.report import shown
from benchmarks.vocabulary import END, PACKAGE, qwen_tokens
from lmdeploy_ext.deepstack.library import LibraryUnavailable
from lmdeploy_ext.lengths.binding import native
from lmdeploy_ext.lengths.follower import Follower
from lmdeploy_ext.lengths.table import Table
from lmdeploy_ext.lengths.vocabulary import Vocabulary
from service.schema_compiler.api import Options, compile_schema
from service.schema_compiler.limits import DEFAULT_LIMITS

NOTES = (
    "Microseconds of processor time that the limits of strings add to a mask, 151,643 tokens of Qwen, one "
    "thread; masks of {walks} random answers of up to {steps} tokens for each case, every second of which "
    "goes on with its strings as long as it may. `library`: what TurboMind runs; `Python`: what the "
    "reference engine runs. The first masks make what all later ones share, and are not counted."
)
WALKS, STEPS = 8, 120
WARM_UP = 2
"""Walks that are not counted."""


def _text(low: int, high: int, **others: Any) -> dict[str, Any]:
    return {"type": "string", "minLength": low, "maxLength": high, **others}


CASES: dict[str, Any] = {
    "one string of at most 255": _text(0, 255),
    "record": {
        "type": "object",
        "properties": {
            "title": _text(1, 80),
            "text": _text(0, 2000),
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
            "tags": {"type": "array", "items": _text(1, 20), "maxItems": 8},
        },
        "required": ["title", "text", "code", "tags"],
        "additionalProperties": False,
    },
    "free names": {
        "type": "object",
        "properties": {"id": _text(1, 36)},
        "propertyNames": {"maxLength": 255},
        "additionalProperties": _text(0, 255),
    },
    "address beside a pattern": {"type": "string", "format": "email", "maxLength": 100},
}
"""Schemas by name."""

Words = NDArray[np.int32]
Start = Callable[[Words], tuple[Callable[[], None], Callable[[int], bool]]]
"""Begins an answer: for the words of a mask, a function that narrows them, and one that reads a token."""


def _times(compiled: Any, vocabulary: list[bytes], start: Start, walks: int) -> list[float]:
    """Microseconds of each mask of random answers."""
    rng, found = random.Random(0), []
    for walk in range(WARM_UP + walks):
        matcher = xgrammar.GrammarMatcher(compiled)
        mask = xgrammar.allocate_token_bitmask(1, len(vocabulary)).numpy()
        narrow, feed = start(mask[0])
        for _ in range(STEPS):
            matcher.fill_next_token_bitmask(mask)
            begun = time.thread_time_ns()
            narrow()
            if walk >= WARM_UP:
                found.append((time.thread_time_ns() - begun) / 1e3)
            token = _chosen(rng, mask[0], vocabulary, is_eager=walk % 2 == 1)
            if token == END:
                break
            assert matcher.accept_token(token)
            assert feed(token)
    return found


def _chosen(rng: random.Random, mask: Any, vocabulary: list[bytes], *, is_eager: bool) -> int:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(vocabulary)]
    allowed = np.flatnonzero(bits).tolist()
    some = rng.sample(allowed, min(len(allowed), 40))
    going_on = [one for one in some if vocabulary[one] and b'"' not in vocabulary[one]]
    return int(rng.choice(going_on if is_eager and going_on else some))


def starters(vocabulary: list[bytes], table: Table) -> dict[str, Start]:
    """How each begins an answer."""
    python = Vocabulary(vocabulary)

    def in_python(words: Words) -> tuple[Callable[[], None], Callable[[int], bool]]:
        follower = Follower(table)
        return (
            lambda: python.narrow_inplace(words, follower),
            lambda token: follower.feed(vocabulary[token]),
        )

    found: dict[str, Start] = {"Python": in_python}
    try:
        limits = native().vocabulary(vocabulary).limits(table)
    except LibraryUnavailable as error:
        print(f"Without the library: {error}")
        return found

    # Called by address, as TurboMind does; the binding for tests checks each array.
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    narrow = prototype(("lengths_narrow", limits.library))

    def in_library(words: Words) -> tuple[Callable[[], None], Callable[[int], bool]]:
        follower = limits.follower()
        return partial(narrow, follower.pointer, words.ctypes.data), follower.accept

    return {"library": in_library, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few answers, to see that it runs")
    options = parser.parse_args()
    vocabulary = qwen_tokens()
    if vocabulary is None:
        print(f"Left out: {PACKAGE} is not installed, which has the tokens of Qwen.")
        return
    walks = 1 if options.quick else WALKS
    info = xgrammar.TokenizerInfo(
        vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END]
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    rows = []
    for name, schema in CASES.items():
        found = compile_schema(json.dumps(schema), DEFAULT_LIMITS, Options(lengths_beside=True))
        assert found.lengths, name
        compiled = compiler.compile_grammar(found.grammar)
        for kind, start in starters(vocabulary, Table(found.lengths)).items():
            times = _times(compiled, vocabulary, start, walks)
            half, most, largest = np.quantile(times, (0.5, 0.99, 1)).tolist()
            row = {
                "schema": name, "by": kind, "masks": len(times), "p50 µs": round(half, 1),
                "p99 µs": round(most, 1), "max µs": round(largest, 1),
            }  # fmt: skip
            rows.append(row)
            print(markdown([shown(row)]), flush=True)
    write_results("lengths", rows, NOTES.format(walks=walks, steps=STEPS))


if __name__ == "__main__":
    main()
