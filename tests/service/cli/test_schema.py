"""``qwen3vl schema`` and ``run --strict`` against a real server: what is printed, exit codes, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli.schema import lines
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.cli.terminal import called
from tests.service.harness import Running, running

EXAMPLES = Path(__file__).parents[3] / "examples" / "schemas"
ENFORCED = (
    "ENFORCED: the model can only write what fits the schema. Every finished answer is valid; one that"
    " max_tokens cuts off is the error OUTPUT_TRUNCATED.\n"
)
POINTER = "/properties/tags/uniqueItems"


def at(started: Running) -> tuple[str, str]:
    return ("--server", started.address)


async def test_a_schema_that_is_enforced() -> None:
    async with running() as started:
        done = await called("schema", *at(started), EXAMPLES / "objects.json")
    assert done.code == 0
    assert done.out == ENFORCED
    assert " bytes of grammar, analysed in 0." in done.err
    assert "strict" not in done.err


async def test_a_schema_that_is_partly_checked() -> None:
    async with running() as started:
        done = await called("schema", *at(started), EXAMPLES / "tags.json")
    assert done.code == 3
    summary, keyword = done.out.splitlines()
    assert ", except for 1 of its " in summary
    assert summary.endswith(" one that violates them is the error OUTPUT_INVALID.")
    assert done.err.endswith("Requests may use this schema, except with `strict` (exit code 3).\n")
    assert keyword.startswith(f"  checked    {POINTER}: ")


async def test_a_schema_in_any_order_as_far_as_it_goes(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    names = [f"name_{number}" for number in range(14)]
    members = {name: {"type": "null"} for name in names}
    schema.write_text(
        json.dumps(
            {
                "type": "object",
                "properties": members,
                "required": names,
                "additionalProperties": False,
            }
        )
    )
    words = ("schema", str(schema))
    async with running() as started:
        declared = await called(*words, *at(started))
        any_order = await called(*words, "--property-order", "any", *at(started))
    near = "near the order of `properties` or of `required`"
    kept = f"optional properties in any order, the 14 required ones {near}"
    assert (declared.code, declared.out) == (0, ENFORCED)
    assert (any_order.code, any_order.out) == (0, f"{ENFORCED}  note       /properties: {kept}\n")


async def test_all_prints_every_keyword() -> None:
    async with running() as started:
        done = await called("schema", "--all", *at(started), EXAMPLES / "tags.json")
    assert done.code == 3
    assert "  enforced   /properties/tags/minItems" in done.out.splitlines()
    assert done.out.count("  checked    ") == 1


async def test_the_report_as_json() -> None:
    async with running() as started:
        done = await called("schema", "--json", *at(started), EXAMPLES / "tags.json")
    assert (done.code, done.err) == (3, "")
    report = json.loads(done.out)
    assert report["enforcement"] == "ENFORCEMENT_CHECKED"
    checked = [one for one in report["keywords"] if one["enforcement"] == "ENFORCEMENT_CHECKED"]
    assert [one["pointer"] for one in checked] == [POINTER]


@pytest.mark.slow
async def test_the_root_of_a_schema_has_a_name_in_the_report(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"a": {"type": "integer"}}}')
    async with running() as started:
        done = await called("schema", *at(started), "--all", "--close-objects", schema)
    assert done.code == 0
    assert "  rewritten  the schema: closed by close_objects" in done.out


async def test_a_schema_that_cannot_be_used(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "thing"}')
    async with running() as started:
        done = await called("schema", *at(started), schema)
    assert (done.code, done.out) == (1, "")
    assert 'INVALID_ARGUMENT (SCHEMA_INVALID): FILE: at "/type"' in done.err


async def test_a_file_that_is_not_there() -> None:
    assert (await called("schema", "nowhere.json")).code == 2


TYPO = {"type": "object", "propertes": {"a": {"type": "string"}}, "additionalProperties": False}


async def test_a_misspelt_keyword_is_in_the_output_and_the_exit_code(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(TYPO))
    async with running(FakeEngine("{}")) as started:
        done = await called("schema", *at(started), schema)
        run = await called("run", *at(started), "--prompt", "Go.", "--schema", schema)
    assert done.code == 3
    warning = (
        "/propertes: is not a keyword of JSON Schema and constrains nothing; properties is one"
    )
    assert done.out.splitlines()[1:] == [f"  warning    {warning}"]
    assert run.code == 0
    assert run.err.splitlines()[-1] == f"Warning: {warning}"


@pytest.mark.parametrize("text", ["{}", "true"])
async def test_a_schema_that_constrains_nothing_says_so(tmp_path: Path, text: str) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(text)
    async with running() as started:
        done = await called("schema", *at(started), schema)
    assert "  warning    the schema: constrains nothing: every JSON value fits\n" in done.out


async def test_nullable_is_a_warning_alone(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "string", "nullable": true}')
    async with running() as started:
        done = await called("schema", *at(started), schema)
    assert done.code == 0
    assert "  warning    /nullable: " in done.out
    assert 'write "type": ["string", "null"]' in done.out


async def test_an_envelope_is_refused(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"name": "n", "input_schema": {"type": "object"}}))
    async with running() as started:
        done = await called("schema", *at(started), schema)
    assert (done.code, done.out) == (1, "")
    assert 'FILE: is no schema but holds one at "/input_schema"' in done.err


def keyword(pointer: str, enforcement: pb.Enforcement.ValueType) -> pb.KeywordReport:
    return pb.KeywordReport(pointer=pointer, enforcement=enforcement)


def test_the_lines_of_a_long_report() -> None:
    report = pb.ValidateSchemaResponse(
        enforcement=pb.ENFORCEMENT_CHECKED,
        keywords=[
            keyword("/title", pb.ENFORCEMENT_ANNOTATION),
            keyword("/type", pb.ENFORCEMENT_ENFORCED),
            pb.KeywordReport(pointer="/not", enforcement=pb.ENFORCEMENT_CHECKED, reason="is hard"),
        ],
        rewrites=[pb.Rewrite(pointer="/allOf", what="merged")],
        omitted=5,
    )
    summary = (
        "CHECKED: the model can only write what fits the schema, except for 1 of its 2 keywords. The"
        " server checks these in the finished answer: one that violates them is the error"
        " OUTPUT_INVALID."
    )
    more = "  … and 5 more"
    assert list(lines(report, everything=False)) == [summary, "  checked    /not: is hard", more]
    assert list(lines(report, everything=True)) == [
        summary,
        "  annotation /title",
        "  enforced   /type",
        "  checked    /not: is hard",
        "  rewritten  /allOf: merged",
        more,
    ]


# Strict, and what an answer says


@pytest.mark.parametrize("how", [[], ["--stream"]])
async def test_strict_refuses_a_checked_schema(how: list[str]) -> None:
    words = ["run", "--prompt", "Tag it.", "--schema", EXAMPLES / "tags.json", *how]
    async with running(FakeEngine('{"tags": ["a"]}')) as started:
        taken = await called(*words, *at(started))
        refused = await called(*words, *at(started), "--strict")
    assert taken.code == 0
    assert taken.err.splitlines()[-1] == (
        f"Checked after generation, not by the grammar: {POINTER}"
    )
    assert (refused.code, refused.out) == (1, "")
    assert "INVALID_ARGUMENT (SCHEMA_NOT_ENFORCED): --schema: is not fully enforced" in refused.err
    assert POINTER in refused.err
    assert "`qwen3vl schema` lists all keywords), or leave out --strict" in refused.err


async def test_strict_accepts_an_enforced_schema() -> None:
    async with running() as started:
        done = await called(
            "run", *at(started), "--prompt", "Go.", "--strict", "--choice", "a", "--choice", "b"
        )
    assert (done.code, done.out) == (0, "a\n")
    assert "Checked" not in done.err


async def test_every_keyword_that_strict_refuses_is_printed(tmp_path: Path) -> None:
    unique = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    properties = {"a": unique, "b": unique}
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"type": "object", "additionalProperties": False, "properties": properties})
    )
    async with running() as started:
        done = await called("run", *at(started), "--prompt", "Go.", "--strict", "--schema", schema)
    assert done.code == 1
    for name in ("a", "b"):
        assert f'\n  --schema: at "/properties/{name}/uniqueItems": ' in done.err


async def test_stages_are_printed_without_a_server(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"a": {"maxLength": 200}, "b": {"uniqueItems": true}}}'
    )
    done = {}
    for stage in ("normalized", "ir", "grammar", "report"):
        done[stage] = await called("schema", "--stage", stage, schema, "--server", "localhost:1")
    assert [(one.code, one.err) for one in done.values()] == [(0, "")] * 4
    assert done["normalized"].out.splitlines()[0] == "#"
    assert done["ir"].out.startswith("value 0 (root)\n  Object(")
    assert done["grammar"].out.startswith("root ::= ")
    assert "  enforced   /properties/a/maxLength\n" in done["report"].out
    assert "  checked    /properties/b/uniqueItems: " in done["report"].out


async def test_a_stage_of_a_schema_that_cannot_be_used(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "nothing"}')
    done = await called("schema", "--stage", "ir", schema)
    assert (done.code, done.out) == (1, "")
    assert "/type" in done.err
    assert "[SCHEMA_INVALID]" in done.err
