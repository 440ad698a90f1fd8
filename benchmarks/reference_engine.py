"""The reference engine beside transformers' ``generate``: same weights, prompts and grammar masks.

``python -m benchmarks.reference_engine [--quick]`` from the repository root. Every contender runs in
a process of its own and they take turns. One round is: N requests at once, each a drawing and the
schema of the ImageAnalysis task, from the picture's pixels to the last token, so pre-processing,
vision tower, prompt and answer all count. Every picture is new to the engine, whose memory of
pictures is off. transformers gets the N prompts as one batch, padded on the left.

Peers run where their package is installed: ``mistralrs``, one request at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Sample, environment, markdown, write_results
from benchmarks.random_model import write_random_model
from examples.drawings.scenes import HELD_OUT_SEED, draw, scene
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.types import GenerateRequest, Image, Sampling
from service.wiring import BUNDLED_MODEL

PICTURE = (192, 192)  # width, height in pixels
TASK = IMAGE_ANALYSIS


@dataclass(frozen=True)
class Round:
    """What N requests took.

    wall_s: from handing them over to the last token of the last one. first_s: median over the
    requests until the first token. step_s: seconds of one request from first to last token.
    tokens: of all answers. texts: the answers.
    """

    wall_s: float
    first_s: float
    answering_s: float
    tokens: int
    texts: list[str]

    @property
    def rate(self) -> float:
        """Tokens a second, everything included."""
        return self.tokens / self.wall_s

    @property
    def answer_rate(self) -> float:
        """Tokens a second behind the first token, of all requests together."""
        return (self.tokens - len(self.texts)) / self.answering_s


def pictures(first: int, count: int) -> list[np.ndarray]:
    """Drawings (height, width, 3), uint8, that no model has been trained on."""
    seeds = range(HELD_OUT_SEED + first, HELD_OUT_SEED + first + count)
    return [np.array(draw(scene(seed), seed, PICTURE)) for seed in seeds]


class Contender(ABC):
    """An engine that answers a batch of requests. Lives in its own process."""

    @abstractmethod
    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None: ...

    @abstractmethod
    def run(self, shown: Sequence[np.ndarray]) -> Round: ...


class Ours(Contender):
    """`ReferenceEngine`."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None:
        from service.engines.reference import ReferenceEngine

        self._engine = ReferenceEngine(folder, dtype=dtype, vision_cache_bytes=0)
        self._max_tokens = max_tokens
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.start())

    def run(self, shown: Sequence[np.ndarray]) -> Round:
        return self._loop.run_until_complete(self._all(shown))

    async def _all(self, shown: Sequence[np.ndarray]) -> Round:
        begun = time.perf_counter()
        answers = await asyncio.gather(*(self._one(pixels) for pixels in shown))
        wall_s = time.perf_counter() - begun
        first_s = [one[1].timings.first_token_s for one in answers]
        return Round(
            wall_s,
            statistics.median(first_s),
            wall_s - min(first_s),
            sum(one[1].usage.output_tokens for one in answers),
            [one[0] for one in answers],
        )

    async def _one(self, pixels: np.ndarray) -> tuple[str, Any]:
        request = GenerateRequest(
            "benchmark", TASK.user, TASK.system, (Image(pixels),), TASK.grammar,
            Sampling(max_tokens=self._max_tokens),
        )  # fmt: skip
        chunks = [chunk async for chunk in self._engine.generate(request)]
        return "".join(chunk.text for chunk in chunks), chunks[-1]


class Transformers(Contender):
    """``generate`` with xgrammar's LogitsProcessor."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from service.engines.reference.chat import Chat
        from service.engines.reference.config import TextConfig
        from service.engines.reference.grammar import GrammarCompiler

        self._torch = torch
        self._processor = AutoProcessor.from_pretrained(folder)
        self._processor.tokenizer.padding_side = "left"
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        config = TextConfig.from_checkpoint(folder)
        chat = Chat(folder, config)
        assert TASK.grammar is not None
        compiler = GrammarCompiler(chat.table, config.stop_ids)
        self._grammar = compiler.compile(TASK.grammar).automaton
        self._stop = set(config.stop_ids) | {self._processor.tokenizer.pad_token_id}
        self._max_tokens = max_tokens

    def run(self, shown: Sequence[np.ndarray]) -> Round:
        from xgrammar.contrib.hf import LogitsProcessor

        times: list[float] = []

        def clock(ids: Any, scores: Any) -> Any:
            times.append(time.perf_counter())
            return scores

        begun = time.perf_counter()
        inputs = self._processor.apply_chat_template(
            [self._messages(pixels) for pixels in shown],
            tokenize=True, add_generation_prompt=True, return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True},
        )  # fmt: skip
        masks = LogitsProcessor([self._grammar] * len(shown))
        with self._torch.inference_mode():
            out = self._model.generate(
                **inputs, max_new_tokens=self._max_tokens, do_sample=False,
                logits_processor=[masks, clock],
            )  # fmt: skip
        end = time.perf_counter()
        answers = [[token for token in row if token not in self._stop]
                   for row in out[:, inputs["input_ids"].shape[1] :].tolist()]  # fmt: skip
        texts = self._processor.tokenizer.batch_decode(answers)
        wall_s, first_s = end - begun, times[0] - begun
        return Round(wall_s, first_s, wall_s - first_s, sum(map(len, answers)), texts)

    def _messages(self, pixels: np.ndarray) -> list[dict[str, Any]]:
        user = [{"type": "image", "image": pixels}, {"type": "text", "text": TASK.user}]
        system = [{"type": "text", "text": TASK.system}]
        turns = [{"role": "system", "content": system}] if TASK.system else []
        return [*turns, {"role": "user", "content": user}]


class MistralRs(Contender):
    """mistral.rs through its Python package; one request after the other."""

    def __init__(self, folder: Path, dtype: str, max_tokens: int) -> None:
        import mistralrs

        self._api = mistralrs
        architecture = mistralrs.MultimodalArchitecture.Qwen3VL
        kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
        which = mistralrs.Which.MultimodalPlain(
            model_id=str(folder), arch=architecture, dtype=getattr(mistralrs.ModelDType, kind)
        )
        self._runner = mistralrs.Runner(
            which=which, no_paged_attn=True, prefix_cache_n=0, token_source="none"
        )
        self._max_tokens = max_tokens

    def run(self, shown: Sequence[np.ndarray]) -> Round:
        begun = time.perf_counter()
        texts, first_s, tokens = [], [], 0
        for pixels in shown:
            start, pieces = time.perf_counter(), []
            for chunk in self._runner.send_chat_completion_request(self._request(pixels)):
                piece = chunk.choices[0].delta.content
                if piece:
                    pieces.append(piece)
                    if len(pieces) == 1:
                        first_s.append(time.perf_counter() - start)
            texts.append("".join(pieces))
            tokens += len(pieces)
        wall_s = time.perf_counter() - begun
        return Round(wall_s, statistics.median(first_s), wall_s - sum(first_s), tokens, texts)

    def _request(self, pixels: np.ndarray) -> Any:
        import base64
        import io

        from PIL import Image as Pillow

        buffer = io.BytesIO()
        Pillow.fromarray(pixels).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}},
                   {"type": "text", "text": TASK.user}]  # fmt: skip
        assert TASK.grammar is not None
        return self._api.ChatCompletionRequest(
            model="default", messages=[{"role": "user", "content": content}],
            max_tokens=self._max_tokens, temperature=0.0, stream=True,
            grammar=TASK.grammar.source, grammar_type="json_schema",
        )  # fmt: skip


CONTENDERS: dict[str, type[Contender]] = {
    "ours": Ours,
    "transformers": Transformers,
    "mistralrs": MistralRs,
}


class Process:
    """A contender at the other end of a pipe."""

    def __init__(self, name: str, folder: Path, dtype: str, max_tokens: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.reference_engine", "--serve", name,
                   "--folder", str(folder), "--dtype", dtype, "--max-tokens", str(max_tokens)]  # fmt: skip
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
        print("@" + json.dumps(asdict(contender.run(pictures(first, count)))), flush=True)


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
    return {name: importlib.metadata.version(name) for name in ("mistralrs",)
            if importlib.util.find_spec(name) is not None}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--models", nargs="+", default=["bundled", "2B shape"],
                        choices=["bundled", "2B shape"])  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=128)
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
        "of the round. times_transformers: tokens_per_s over transformers' faster dtype with as "
        "many requests; times_one_of_transformers: over transformers with one request. "
        "same_text: answers equal to transformers' in the same dtype, of requests x rounds. "
        "The 2B shape has 4 decoder layers and 4 vision blocks of Qwen3-VL-2B's widths, random. "
        + ("Quick run: no measurement. " if quick else "")
        + (f"Peers: {found}." if found else "mistralrs is not installed and was left out.")
    )
    if not quick:
        write_results("reference_engine", rows, notes)
    print(environment())
    print(markdown([_shown(row) for row in rows]))


if __name__ == "__main__":
    main()
