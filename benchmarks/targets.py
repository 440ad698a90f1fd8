"""What was asked for, and how to read it from the rows of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.vocabulary import BYTES, QWEN

Row = Mapping[str, Any]
UNTRAINED = "json_schema, schema_in_prompt"
"""The row of `benchmarks.goodput` with prompts that the bundled model was not trained on."""


@dataclass(frozen=True)
class Target:
    """One line of the table of targets.

    benchmark: name of the JSON file. rows: which rows count. value: reads a row; the worst of the
    rows is held against ``bound``; None: the value is only shown. at_least: whether more is better.
    """

    benchmark: str
    text: str
    rows: Callable[[Row], bool]
    value: Callable[[Row], float]
    bound: float | None
    at_least: bool = True
    unit: str = "×"
    best: bool = False
    """Whether the best of the rows counts instead: a choice that the user has, such as the dtype."""

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The value that counts; None where there is no such row."""
        values = [self.value(row) for row in rows if self.rows(row)]
        if not values:
            return None
        return min(values) if self.at_least != self.best else max(values)

    def met(self, value: float) -> bool | None:
        """None where there is no bound."""
        if self.bound is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound

    def wanted(self) -> str:
        if self.bound is None:
            return "-"
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{self._suffix}"

    def shown(self, value: float) -> str:
        return f"{value:.3g}{self._suffix}" if value < 1000 else f"{value:.0f}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return self.unit if self.unit == "×" else f" {self.unit}"


def _median(row: Row) -> float:
    return float(row["values"]["median"])


def _is(key: str, value: object) -> Callable[[Row], bool]:
    return lambda row: row[key] == value


def _pipeline(row: Row) -> bool:
    """Our row on the collection for which the numbers were set."""
    return row["engine"] == "ours" and row["schemas"] == 1089


def _pipeline_with_lengths(row: Row) -> bool:
    """The same, of a run that followed the lengths beside the grammar: older runs counted without them."""
    return _pipeline(row) and "enforced by the grammar alone" in row


def _percent(key: str) -> Callable[[Row], float]:
    """A number of schemas as a share of all."""
    return lambda row: 100 * float(row[key]) / float(row["schemas"])


def _number(key: str) -> Callable[[Row], float]:
    return lambda row: float(row[key])


def _ours(requests: int) -> Callable[[Row], bool]:
    return lambda row: (row["model"], row["engine"], row["requests"]) == (
        "bundled", "ours", requests,
    )  # fmt: skip


def _starts(key: str, text: str) -> Callable[[Row], bool]:
    return lambda row: str(row[key]).startswith(text)


def _is_quantile(name: str) -> Callable[[Row], bool]:
    """The row of a collection with this quantile."""
    return lambda row: row["schema"].startswith("collection") and row["schema"].endswith(name)


def _at_most(
    benchmark: str,
    text: str,
    rows: Callable[[Row], bool],
    value: Callable[[Row], float],
    bound: float,
    unit: str,
) -> Target:
    return Target(benchmark, text, rows, value, bound, at_least=False, unit=unit)


def _beside_raw(name: str, bound: float) -> Iterator[Target]:
    """Analysis and compilation beside xgrammar's own, over both vocabularies."""
    for vocabulary in (QWEN, BYTES):
        yield _at_most(
            "large_vocabulary",
            f"analysis and compilation beside xgrammar's own, same schemas, {vocabulary}, {name}",
            lambda row, end=f"{vocabulary}, {name}": row["schema"].endswith(end),
            _number("ours / xgrammar"),
            bound,
            "×",
        )


TARGETS = (
    Target(
        "mrope",
        "positions of 16,384 tokens with 8 images, beside `get_rope_index`",
        lambda row: (row["tokens"], row["images"]) == (16384, 8),
        _number("times faster"),
        20,
    ),
    Target(
        "preprocess",
        "one image from JPEG bytes, beside transformers' fast processor",
        lambda row: "JPEG" in row["case"] and not row["case"].startswith("8 "),
        _number("times faster"),
        1,
    ),
    Target(
        "preprocess",
        "8 images of 640×480",
        _starts("case", "8 "),
        _number("times faster"),
        2,
    ),
    Target(
        "encoder",
        "one image, beside transformers' tower, every dtype",
        lambda row: not row["images"].startswith("8 "),
        _number("times faster"),
        1,
    ),
    Target(
        "encoder",
        "8 images of mixed sizes, every dtype",
        _starts("images", "8 "),
        _number("times faster"),
        1.1,
    ),
    Target(
        "reference_engine",
        "bundled model, tokens/s of one request, beside transformers `generate`",
        _ours(1),
        _number("times_transformers"),
        3,
        best=True,
    ),
    Target(
        "reference_engine",
        "bundled model, tokens/s of 16 requests together, beside one of transformers",
        _ours(16),
        _number("times_one_of_transformers"),
        12,
        best=True,
    ),
    _at_most(
        "server_overhead",
        "text only, 1 caller, p50 over a bare echo",
        lambda row: (row["case"], row["callers"]) == ("text", 1),
        _number("overhead p50 ms"),
        1.5,
        "ms",
    ),
    Target(
        "server_overhead",
        "text only, calls/s beside a bare echo, any number of callers",
        _is("case", "text"),
        _number("ours / echo"),
        0.5,
    ),
    _at_most(
        "http_overhead",
        "HTTP, text, 1 caller, p50 over bare Starlette",
        lambda row: (row["case"], row["beside"]) == ("text, 1 caller, p50 ms", "bare Starlette"),
        _number("difference"),
        0.6,
        "ms",
    ),
    _at_most(
        "http_overhead",
        "HTTP, text, 1 caller, p50 beside LMDeploy's api_server with a stand-in engine",
        _is("beside", "LMDeploy's api_server"),
        _number("ratio"),
        0.5,
        "×",
    ),
    Target(
        "http_overhead",
        "HTTP, image of 100 KB, calls/s beside our gRPC",
        _is("beside", "our gRPC"),
        _number("ratio"),
        0.8,
    ),
    _at_most(
        "http_overhead",
        "HTTP, 64 streams, p99 between pieces beside bare Starlette",
        _starts("case", "64 streams"),
        _number("ratio"),
        2.0,
        "×",
    ),
    _at_most(
        "cold_start",
        "`qwen3vl serve` on the bundled model, process to SERVING",
        _is("what", "process to SERVING, s"),
        _median,
        12,
        "s",
    ),
    _at_most(
        "cold_start",
        "first answer after SERVING",
        _is("what", "first answer, s"),
        _median,
        2,
        "s",
    ),
    _at_most(
        "cold_start",
        "resident memory of the server with its worker processes",
        _is("what", "resident memory after two answers, MiB"),
        _median,
        1536,
        "MiB",
    ),
    _at_most(
        "maskbench",
        "OK answers that do not validate",
        _pipeline,
        _number("OK answers invalid"),
        0,
        "schemas",
    ),
    Target(
        "maskbench",
        "schemas served, of 1,089",
        _pipeline,
        _number("served"),
        1080,
        unit="schemas",
    ),
    Target(
        "maskbench",
        "grammars exact with properties in any order",
        lambda row: (row["engine"], row["schemas"]) == ("ours, any order", 1089),
        _number("exact"),
        1073,
        unit="schemas",
    ),
    Target(
        "maskbench",
        "schemas that are ENFORCED, lengths beside the grammar included",
        _pipeline_with_lengths,
        _percent("enforced"),
        97,
        unit="%",
    ),
    Target(
        "maskbench",
        "the same by the grammar alone",
        _pipeline_with_lengths,
        _percent("enforced by the grammar alone"),
        None,
        unit="%",
    ),
    _at_most(
        "maskbench",
        "ENFORCED, yet accepts an invalid instance",
        _pipeline,
        _number("enforced, yet accepts invalid"),
        0,
        "schemas",
    ),
    Target(
        "maskbench",
        "grammars exact, of 1,089",
        _pipeline,
        _number("exact"),
        1045,
        unit="schemas",
    ),
    _at_most(
        "maskbench",
        "refused without a reason and a place",
        _pipeline,
        _number("refused without reason and place"),
        0,
        "schemas",
    ),
    _at_most(
        "maskbench",
        "analysis and compilation, p50",
        _pipeline,
        _number("compile p50 ms"),
        5,
        "ms",
    ),
    _at_most(
        "maskbench",
        "analysis and compilation, p99",
        _pipeline,
        _number("compile p99 ms"),
        250,
        "ms",
    ),
    _at_most(
        "maskbench",
        "analysis and compilation, slowest",
        _pipeline,
        _number("compile max ms"),
        5000,
        "ms",
    ),
    _at_most(
        "maskbench",
        "timeouts and crashes",
        _pipeline,
        lambda row: float(row["timeouts"] + row["crashes"]),
        0,
        "schemas",
    ),
    _at_most(
        "lengths",
        "lengths of strings beside the grammar, added to a mask, p50",
        _is("by", "library"),
        _number("p50 µs"),
        10,
        "µs",
    ),
    _at_most(
        "lengths",
        "the same, p99",
        _is("by", "library"),
        _number("p99 µs"),
        60,
        "µs",
    ),
    _at_most(
        "schema_answers",
        "end to end: OK answers that do not validate",
        lambda row: True,
        _number("OK, invalid"),
        0,
        "answers",
    ),
    _at_most(
        "schema_answers",
        "end to end: outcomes that are not documented",
        lambda row: True,
        _number("undocumented"),
        0,
        "answers",
    ),
    Target(
        "schema_answers",
        "end to end: schemas run, of 1,089",
        _is("collection", 1089),
        _number("schemas"),
        1080,
        unit="schemas",
    ),
    _at_most(
        "fuzzed_schemas",
        "fuzzed and hostile schemas: stalls, and answers that do not validate or are not documented",
        lambda row: True,
        lambda row: float(row["stalls"] + row["OK, invalid"] + row["undocumented"]),
        0,
        "calls",
    ),
    _at_most(
        "remote_overhead",
        "time that the service adds to a call to llama.cpp with the bundled model, median, worst of text, "
        "image and analysis",
        _is("server", "llama.cpp"),
        _number("added, ms"),
        3,
        "ms",
    ),
    _at_most(
        "remote_overhead",
        "the same in per cent of a call to a larger model (40 million parameters), worst of the three",
        _is("server", "llama.cpp, larger model"),
        _number("added, %"),
        5,
        "%",
    ),
    _at_most(
        "remote_overhead",
        "the same in per cent of an image analysis by the bundled model, which takes 0.05 s",
        lambda row: row["server"] == "llama.cpp" and row["call"] == "analysis",
        _number("added, %"),
        5,
        "%",
    ),
    _at_most(
        "ray_overhead",
        "time that engine=ray adds to 6 chunks of the fake engine, median",
        _starts("row", "fake engine"),
        _number("added, ms"),
        8,
        "ms",
    ),
    _at_most(
        "ray_overhead",
        "the same to its first text",
        _starts("row", "fake engine"),
        _number("first text, added, ms"),
        10,
        "ms",
    ),
    _at_most(
        "ray_overhead",
        "the same to an answer of the reference engine",
        _starts("row", "reference engine"),
        _number("added, ms"),
        15,
        "ms",
    ),
    Target(
        "ray_overhead",
        "two replicas beside two bare processes, image analyses/s, 16 callers",
        _starts("row", "throughput, image-analysis"),
        _number("share"),
        0.9,
    ),
    Target(
        "ray_overhead",
        "the same for texts of 31 tokens, which take the bundled model 7 ms",
        _starts("row", "throughput, text"),
        _number("share"),
        0.9,
    ),
    Target(
        "ray_overhead",
        "a server with two replicas beside two servers, image-analysis, requests/s, 16 callers",
        lambda row: row["row"].startswith("servers"),
        _number("share"),
        0.9,
    ),
    _at_most(
        "ray_overhead",
        "a replica killed under 16 callers: requests lost that had sent nothing",
        _starts("row", "kill"),
        _number("lost without text"),
        0,
        "requests",
    ),
    _at_most(
        "ray_overhead",
        "the same: time to full service",
        _starts("row", "kill"),
        _number("full service, s"),
        10,
        "s",
    ),
    _at_most(
        "batch",
        "5,000 rows, killed three times: keys missing or doubled",
        _is("part", "killed"),
        lambda row: float(row["keys_missing"] + row["keys_doubled"]),
        0,
        "keys",
    ),
    _at_most(
        "batch",
        "the same: rows with an error whose image is good, or the other way round",
        _is("part", "killed"),
        _number("error_rows_of_good_images_or_missing"),
        0,
        "rows",
    ),
    _at_most(
        "batch",
        "the same: rows that differ from a single call",
        _is("part", "single calls"),
        lambda row: float(row["rows"] - row["equal"]),
        0,
        "rows",
    ),
    _at_most(
        "batch",
        "memory of the engine, last third of a run beside the first",
        _is("part", "killed"),
        _number("engine_mib_growth_percent"),
        5,
        "%",
    ),
    Target(
        "batch_speed",
        "rows/s of a batch beside its engine alone, behind the start",
        _is("part", "speed"),
        _number("ratio"),
        0.9,
    ),
    _at_most(
        "large_vocabulary",
        "analysis and compilation over Qwen's tokens, median",
        _is_quantile("median"),
        _number("ours: compile s"),
        0.06,
        "s",
    ),
    _at_most(
        "large_vocabulary",
        "the same, 90 %",
        _is_quantile("90 %"),
        _number("ours: compile s"),
        0.25,
        "s",
    ),
    _at_most(
        "large_vocabulary",
        "the same, slowest",
        _is_quantile("slowest"),
        _number("ours: compile s"),
        4,
        "s",
    ),
    *_beside_raw("p50", 0.8),
    *_beside_raw("p99", 0.5),
    _at_most(
        "large_vocabulary",
        "first call with an ordinary invoice",
        _starts("schema", "invoice.json"),
        _number("ours: compile s"),
        0.25,
        "s",
    ),
    Target(
        "goodput",
        "calls that end OK, tasks that the bundled model was trained on, every kind of grammar",
        lambda row: True,
        _number("OK, %"),
        99,
        unit="%",
    ),
    _at_most(
        "goodput",
        "right answers that a grammar costs, every kind of grammar",
        lambda row: row["grammar"] != UNTRAINED,
        _number("tax, points"),
        0.3,
        "points",
    ),
)
