"""The reference engine beside transformers' ``generate``: same weights, prompts and grammar masks.

``python -m benchmarks.reference_engine [--quick]`` from the repository root. Every contender runs in
a process of its own and they take turns. One round is: N requests at once, each a drawing and the
schema of the ImageAnalysis task, from the image's pixels to the last token, so pre-processing,
vision tower, prompt and answer all count. Every image is new to the engine, whose memory of
images is off. transformers gets the N prompts as one batch, padded on the left.

Peers run where their packages are installed (``pip install mistralrs xllamacpp gguf``), on the
bundled model in float32 and one request after the other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import Sample, environment, markdown, write_results
from benchmarks.contenders import Contender, Ours, Round, Transformers, drawings
from benchmarks.peers import LlamaCpp, MistralRs
from benchmarks.random_model import write_random_model
from service.wiring import BUNDLED_MODEL

CONTENDERS: dict[str, type[Contender]] = {
    "ours": Ours,
    "transformers": Transformers,
    "mistralrs": MistralRs,
    "xllamacpp": LlamaCpp,
}
PEERS = {"mistralrs": "mistralrs", "xllamacpp": "gguf"}
"""Optional contenders, and what they need beside themselves."""


class Process:
    """A contender at the other end of a pipe."""

    def __init__(self, name: str, folder: Path, dtype: str, max_tokens: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.reference_engine", "--serve", name,
                   "--folder", str(folder), "--dtype", dtype, "--max-tokens", str(max_tokens)]  # fmt: skip
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if self._read() != "ready":
            raise RuntimeError(f"{name} did not start")

    def run(self, first: int, count: int) -> Round:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{first} {count}\n")
        self._child.stdin.flush()
        return Round(**self._read())

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)

    def _read(self) -> Any:
        assert self._child.stdout is not None
        while line := self._child.stdout.readline():
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"{self.name} ended with code {self._child.wait()}")


def serve(name: str, folder: Path, dtype: str, max_tokens: int) -> None:
    """Answer rounds that come on standard input; results go out as lines that begin with @."""
    contender = CONTENDERS[name](folder, dtype, max_tokens)
    print("@" + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        first, count = map(int, line.split())
        shown = drawings(first, count)
        before = time.process_time()
        result = replace(contender.run(shown), cpu_s=time.process_time() - before)
        print("@" + json.dumps(asdict(result)), flush=True)


def measure(
    model: str, folder: Path, plan: Mapping[str, Sequence[str]], counts: Sequence[int],
    repeats: int, max_tokens: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows for one model. plan: for each contender the dtypes in which it runs."""
    rows = []
    with ExitStack() as stack:
        processes: dict[tuple[str, str], Process] = {}
        for name, dtypes in plan.items():
            for dtype in dtypes:
                process = Process(name, folder, dtype, max_tokens)
                stack.callback(process.close)
                processes[name, dtype] = process
        for count in counts:
            found = _rounds(processes, count, repeats)
            same = {
                (name, dtype): sum(
                    a == b
                    for mine, theirs in zip(
                        found[name, dtype], found.get(("transformers", dtype), []), strict=False
                    )
                    for a, b in zip(mine.texts, theirs.texts, strict=True)
                )
                for name, dtype in found
            }
            for (name, dtype), rounds in found.items():
                rows.append(
                    _row(model, name, dtype, count, rounds) | {"same_text": same[name, dtype]}
                )
                print(_shown(rows[-1]), flush=True)
    return rows


def _rounds(
    processes: Mapping[tuple[str, str], Process], count: int, repeats: int
) -> dict[tuple[str, str], list[Round]]:
    """Contenders take turns, in the opposite order every second time; the first round is warm-up."""
    found: dict[tuple[str, str], list[Round]] = {key: [] for key in processes}
    for turn in range(repeats + 1):
        order = list(processes.items())
        for key, process in order if turn % 2 else reversed(order):
            result = process.run(1000 * turn + 100 * count, count)
            if turn:
                found[key].append(result)
    return found


def _row(model: str, name: str, dtype: str, count: int, rounds: Sequence[Round]) -> dict[str, Any]:
    def sample(value: Callable[[Round], float]) -> Sample:
        return Sample(tuple(value(one) for one in rounds))

    return {
        "model": model, "requests": count, "engine": name, "dtype": dtype,
        "tokens": statistics.median(one.tokens for one in rounds) / count,
        "tokens_per_s": sample(lambda one: one.rate).row(1),
        "answer_tokens_per_s": sample(lambda one: one.answer_rate).row(1),
        "first_token_ms": sample(lambda one: one.first_s).row(1e3),
        "request_ms": sample(lambda one: one.wall_s).row(1e3),
        "tokens_per_cpu_s": sample(lambda one: one.tokens / one.cpu_s).row(1),
    }  # fmt: skip


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: f"{value['median']:.0f} ({value['min']:.0f}-{value['max']:.0f})"
        if isinstance(value, dict)
        else value
        for key, value in row.items()
    }


def compared(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every row how many times as fast it is as transformers' best for that case."""
    for row in rows:
        best = {
            count: max(
                (
                    other
                    for other in rows
                    if (other["model"], other["engine"], other["requests"])
                    == (row["model"], "transformers", count)
                ),
                key=lambda other: float(other["tokens_per_s"]["median"]),
            )
            for count in {1, row["requests"]}
        }
        rate = row["tokens_per_s"]["median"]
        answering = row["answer_tokens_per_s"]["median"]
        theirs, single = best[row["requests"]], best[1]
        row["times_transformers"] = rate / theirs["tokens_per_s"]["median"]
        row["times_transformers_answering"] = answering / theirs["answer_tokens_per_s"]["median"]
        row["times_one_of_transformers"] = rate / single["tokens_per_s"]["median"]


def peers() -> dict[str, str]:
    """Optional contenders, and the version that is installed."""
    return {
        name: importlib.metadata.version(name)
        for name, needs in PEERS.items()
        if all(importlib.util.find_spec(module) is not None for module in (name, needs))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--models", nargs="+", default=["bundled", "2B shape"],
                        choices=["bundled", "2B shape"])  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--serve", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.folder, arguments.dtype, arguments.max_tokens)
        return
    quick = arguments.quick
    repeats = 1 if quick else arguments.repeats
    rows: list[dict[str, Any]] = []
    if "bundled" in arguments.models:
        dtypes = ["float32"] if quick else ["float32", "bfloat16"]
        plan = {"transformers": dtypes, "ours": dtypes}
        plan |= {name: ["float32"] for name in peers()}
        tokens = 16 if quick else arguments.max_tokens
        counts = [1, 4] if quick else arguments.counts
        rows += measure("bundled", BUNDLED_MODEL, plan, counts, repeats, tokens)
    if "2B shape" in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            layers = 1 if quick else 4
            folder = write_random_model(Path(scratch), BUNDLED_MODEL, layers)
            plan = {"transformers": ["bfloat16"], "ours": ["bfloat16"]}
            tokens = 4 if quick else min(32, arguments.max_tokens)
            counts = [1] if quick else arguments.counts
            rows += measure("2B shape", folder, plan, counts, min(repeats, 3), tokens)
    compared(rows)
    found = peers()
    notes = (
        "Each request is a drawing of 192x192 pixels and the ImageAnalysis task under its JSON schema, "
        f"greedy, at most {arguments.max_tokens} tokens (2B shape: 32). tokens_per_s is all tokens "
        "of all answers over the time from the pixels to the last token; answer_tokens_per_s "
        "leaves out the time before the first token; request_ms is that time for all requests "
        "of the round; tokens_per_cpu_s counts the time that all threads had a core, which a "
        "busy machine changes least. times_transformers: tokens_per_s over transformers' faster dtype with as "
        "many requests; times_one_of_transformers: over transformers with one request. "
        "same_text: answers equal to transformers' in the same dtype, of requests x rounds. "
        "The 2B shape has 4 decoder layers and 4 vision blocks of Qwen3-VL-2B's widths, random. "
        + ("Quick run: no measurement. " if quick else "")
        + (f"Peers: {found}. " if found else "")
        + "".join(f"{name} is not installed and was left out. " for name in PEERS.keys() - found)
    )
    if not quick:
        write_results("reference_engine", rows, notes)
    print(environment())
    print(markdown([_shown(row) for row in rows]))


if __name__ == "__main__":
    main()
