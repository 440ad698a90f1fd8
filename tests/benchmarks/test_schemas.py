"""The benchmarks on a collection of schemas: how they count, not what they measure."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collection import Case, read_collection
from benchmarks.judge import Judge, judged
from benchmarks.mask_engines import ENGINES, Refused, instance_text
from benchmarks.mask_outcomes import Outcome
from benchmarks.maskbench import row
from benchmarks.outcome_plot import parts, write_outcome_plot
from benchmarks.schema_answers import Call, documented
from benchmarks.schema_answers import row as answers_row
from benchmarks.schema_answers import table as answers_table

OUTCOMES = [
    Outcome("served", 0.001, enforced=True, enforced_alone=True),
    Outcome(
        "served",
        0.002,
        accepts_invalid=[1],
        passes_invalid=[1],
        enforced=True,
        enforced_alone=False,
    ),
    Outcome("served", 0.003, accepts_invalid=[1], rejects_valid=[0], enforced=False),
    Outcome("served", 0.004, rejects_valid=[0], bytes=10, mask_s=1e-4, enforced=False),
    Outcome("refused", 0.001, reason="SCHEMA_TOO_LARGE", located=True),
    Outcome("refused", 0.001),
    Outcome("empty", 0.001, reason="SCHEMA_UNSATISFIABLE"),
    Outcome("timeout", 5.0),
    Outcome("crash", 0.1),
]


def test_each_outcome_is_counted_in_its_column() -> None:
    found = row("ours", OUTCOMES)
    assert {key: found[key] for key in list(found)[2:15]} == {
        "exact": 2,
        "accepts invalid": 2,
        "rejects valid": 2,
        "OK answers invalid": 1,
        "served": 4,
        "rightly unsatisfiable": 1,
        "enforced": 2,
        "enforced by the grammar alone": 1,
        "enforced, yet accepts invalid": 1,
        "refused": 2,
        "refused without reason and place": 1,
        "timeouts": 1,
        "crashes": 1,
    }
    assert found["compile max ms"] == 5000
    assert found["mask us per byte"] == pytest.approx(10)


@pytest.mark.slow
def test_each_schema_is_drawn_once(tmp_path: Path) -> None:
    found = row("ours", OUTCOMES)
    assert list(parts(found).values()) == [2, 1, 2, 2, 2]
    plot = tmp_path / "plot.svg"
    assert write_outcome_plot({"maskbench": {"rows": [found]}}, plot)
    first = plot.read_bytes()
    assert ET.fromstring(first).tag.endswith("svg")
    write_outcome_plot({"maskbench": {"rows": [found]}}, plot)
    assert plot.read_bytes() == first
    assert not write_outcome_plot({}, plot)


@pytest.mark.slow
def test_lengths_beside_the_grammar_count_for_ours() -> None:
    """A text that only the limits beside the grammar refuse is refused, and the report says both."""
    grammar = ENGINES["ours"]().compile('{"type": "string", "maxLength": 100}')
    assert (grammar.enforced, grammar.enforced_alone) == (True, False)
    assert grammar.follow(instance_text("é" * 100)).accepted
    refused = grammar.follow(instance_text("é" * 101))
    assert (refused.accepted, refused.bytes) == (False, 201)


def test_a_missing_collection_is_skipped_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_collection(tmp_path / "none.jsonl") is None
    assert "Left out: there is no collection" in capsys.readouterr().out


def test_only_newlines_separate_the_lines_of_a_collection(tmp_path: Path) -> None:
    """A line separator of Unicode within a string is no end of a line."""
    path = tmp_path / "some.jsonl"
    entry = {"name": "a", "schema": {"const": "x\u2028y"}}
    path.write_text(json.dumps(entry, ensure_ascii=False) + "\n")
    assert read_collection(path) == [Case("a", {"const": "x\u2028y"}, [])]


@pytest.mark.parametrize(
    ("schema", "text", "verdict"),
    [
        ({"type": "integer"}, "1", "valid"),
        ({"type": "integer"}, '"1"', "invalid"),
        (True, '{"a": 1, "a": 1}', "invalid"),
        (True, "NaN", "invalid"),
        (True, "[-1e999]", "invalid"),
        (True, '"\\ud800"', "invalid"),
        (True, "{", "invalid"),
        (False, "1", "invalid"),
        ({"format": "ipv4"}, '"a"', "valid"),
        ({"not": {"format": "ipv4"}}, '"a"', "valid"),
        ({"not": {"format": "ipv4"}}, '"10.0.0.1"', "invalid"),
        ({"pattern": "\\p{L}"}, '"a"', "unknown"),
        ({"items": {"multipleOf": 0.01}}, "[0.07, 0.29, 19.99, 8.21, 1e2, 7, -597.56]", "valid"),
        ({"multipleOf": 0.01}, "0.005", "invalid"),
        ({"maximum": 0.1}, "0.1000000000000000000001", "invalid"),
        ({"enum": [0.1, 1.0]}, "1", "valid"),
        ({"enum": [0.1, 1.0]}, "0.10", "valid"),
        ({"enum": [0.1, 1.0]}, "0.10000000000000001", "invalid"),
        ({"type": "integer"}, "1e2", "valid"),
        ({"type": "integer"}, "1.00000000000000000000001", "invalid"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer"}, "1.0", "invalid"),
        ({"type": "integer"}, "1e-999999999", "unknown"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 1,
          "exclusiveMaximum": True}, "1", "invalid"),
    ],
)  # fmt: skip
def test_the_judge_returns_valid_invalid_or_unknown(schema: Any, text: str, verdict: str) -> None:
    assert judged(json.dumps(schema), text) == verdict


@pytest.mark.slow
async def test_the_judge_returns_unknown_for_a_pattern_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.judge.LIMIT_S", 3.0)
    judge = Judge()
    assert await judge.verdict('{"pattern": "^(a+)+$"}', json.dumps("a" * 40 + "b")) == "unknown"
    assert await judge.verdict('{"type": "string"}', '"a"') == "valid"
    await judge.close()


def test_calls_are_counted_by_outcome() -> None:
    calls = [
        Call(0, "OK", 1.0, "valid", enforcement=1),
        Call(0, "OK", 1.0, "invalid", attempts=2),
        Call(1, "OUTPUT_TRUNCATED", 1.0),
        Call(1, "INVENTED", 1.0),
        Call(2, "SCHEMA_TOO_LARGE", 1.0),
        Call(2, "", 1.0),
    ]
    found = answers_row([Case("", True, [])] * 3, calls)
    assert (found["schemas"], found["schemas with an OK answer"], found["calls"]) == (2, 1, 6)
    assert (found["OK"], found["OK, invalid"], found["second attempts"]) == (2, 1, 1)
    assert (found["truncated"], found["refused"], found["other"]) == (1, 1, 2)
    assert found["undocumented"] == 2


def test_each_temperature_has_a_line_and_all_of_them_one() -> None:
    calls = [
        Call(0, "OK", 1.0, "valid", text="12", temperature=2.0),
        Call(0, "OUTPUT_TRUNCATED", 1.0, temperature=1.5),
        Call(0, "OK", 1.0, "invalid", text="1234", temperature=1.5),
    ]
    found = answers_table([Case("", True, [])], calls)
    assert [line["temperature"] for line in found] == ["2", "1.5", "all"]
    assert [line["OK"] for line in found] == [1, 1, 2]
    assert [line["OK, invalid"] for line in found] == [0, 1, 1]
    assert [line["OK, median characters"] for line in found] == [2, 4, 3]
    assert len(answers_table([Case("", True, [])], calls[:1])) == 1


def test_the_documented_reasons_are_found() -> None:
    assert {"SCHEMA_INVALID", "OUTPUT_INVALID", "OVERLOADED"} <= documented()


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_engines_match_a_text_byte_by_byte(name: str) -> None:
    if name.startswith("llguidance"):
        pytest.importorskip("llguidance", reason="llguidance is not installed")
    schema = {"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"],
              "additionalProperties": False}  # fmt: skip
    grammar = ENGINES[name]().compile(json.dumps(schema))
    text = instance_text({"é": 12})
    followed = grammar.follow(text)
    assert followed.accepted
    assert followed.bytes == len(text.encode()) == 10
    refused = grammar.follow('{"é": true}')
    assert not refused.accepted
    assert refused.bytes == len('{"é": '.encode())
    assert not grammar.follow('{"é": 1').accepted
    with pytest.raises(Refused):
        ENGINES[name]().compile('{"type": "thing"}')
