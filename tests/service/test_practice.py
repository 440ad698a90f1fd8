"""Schemas as they come from practice, through a real server: each has the outcome its user expects.

The schemas here are made for these tests. A folder of others, with values that fit and that do not,
is read where it is there.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.client import read_error
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.types import Grammar, GrammarKind
from tests.service.harness import Running, failure, inline, run_request, running
from tests.service.schema_compiler import schemas

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[3] / "shared" / "cases" / "schemas"
DRAFT7 = "https://json-schema.org/draft-07/schema#"
MISSPELT, NULLABLE, OTHER_DRAFT, UNUSED = (
    pb.SCHEMA_WARNING_KIND_MISSPELT_KEYWORD,
    pb.SCHEMA_WARNING_KIND_NULLABLE,
    pb.SCHEMA_WARNING_KIND_OTHER_DRAFT,
    pb.SCHEMA_WARNING_KIND_UNUSED,
)
SERVED: list[tuple[str, Any, list[Any], list[Any], list[tuple[str, int]]]] = [
    (
        "a definition that leads nowhere and that nothing uses",
        {"$schema": DRAFT7, "properties": {"n": {"type": "null"}}, "type": "object",
         "definitions": {"old": {"items": {"$ref": "#/definitions/older"}}}},
        [{"n": None}], [{"n": 1}], [("/definitions/old/items/$ref", UNUSED)],
    ),
    (
        "a newer keyword in draft-04",
        {"$schema": "http://json-schema.org/draft-04/schema#", "propertyNames": {"maxLength": 2},
         "type": "object"},
        [{"ab": 1}], [{"abc": 1}], [("/propertyNames", OTHER_DRAFT)],
    ),
    ("values twice", {"$schema": "http://json-schema.org/draft-06/schema", "enum": ["x", "y", "y"]},
     ["x", "y"], ["z"], []),
    ("a look-ahead inside", {"type": "string", "pattern": "^x(?:(?!.*__)[x_]*x)$"}, ["xx", "x_x"],
     ["x__x", "x_"], []),
    ("anchors of Python", {"type": "string", "pattern": r"\A\d+\Z"}, ["12"], ["1a", "12\n"], []),
    ("https in $schema", {"$schema": DRAFT7, "type": "boolean"}, [True], [1], []),
    ("OpenAPI's exclusive bound", {"type": "integer", "maximum": 9, "exclusiveMaximum": True}, [8],
     [9], [("/exclusiveMaximum", OTHER_DRAFT)]),
    ("OpenAPI's nullable", {"type": "integer", "nullable": True}, [8], [None],
     [("/nullable", NULLABLE)]),
    ("a tuple", {"type": "array", "items": [{"type": "null"}], "additionalItems": False}, [[None], []],
     [[1], [None, 1]], [("/items", OTHER_DRAFT)]),
    ("a typing error", {"type": "object", "patternPropertie": {"^a": {"type": "null"}},
                        "additionalProperties": False}, [{}], [{"a": None}],
     [("/patternPropertie", MISSPELT)]),
]  # fmt: skip


@cache
def grammar(text: str) -> Any:
    asked = Grammar(GrammarKind.JSON_SCHEMA, text)
    return schemas.compiled(analyse(asked, DEFAULT_LIMITS).grammar.ebnf)


async def report(started: Running, text: str) -> pb.ValidateSchemaResponse:
    request = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=text))
    found: pb.ValidateSchemaResponse = await started.stub.ValidateSchema(request, timeout=60)
    return found


async def given_out(text: str, value: Any) -> bool:
    """Whether a server gives a value out that a model has answered with."""
    async with running(FakeEngine(json.dumps(value, ensure_ascii=False))) as started:
        try:
            await started.stub.RunTask(run_request(inline(json_schema=text)), timeout=60)
        except grpc.aio.AioRpcError as error:
            reason = read_error(error).reason
        else:
            return True
    assert reason == "OUTPUT_INVALID"
    return False


@pytest.mark.parametrize(
    ("schema", "fits", "fits_not", "warnings"),
    [case[1:] for case in SERVED],
    ids=[case[0] for case in SERVED],
)
async def test_schemas_from_practice_are_served(
    schema: Any, fits: list[Any], fits_not: list[Any], warnings: list[tuple[str, int]]
) -> None:
    text = json.dumps(schema)
    async with running() as started:
        told = await report(started, text)
    assert [(one.pointer, one.kind) for one in told.warnings] == warnings
    for value in fits:
        assert schemas.accepts_value(grammar(text), value), value
        assert await given_out(text, value), value
    for value in fits_not:
        assert not schemas.accepts_value(grammar(text), value), value
        assert not await given_out(text, value), value


async def test_the_envelope_of_a_tool() -> None:
    text = json.dumps({"name": "t", "input_schema": {"type": "object"}})
    request = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=text))
    async with running() as started:
        error = await failure(started.stub.ValidateSchema(request, timeout=60))
        run = await failure(started.stub.RunTask(run_request(inline(json_schema=text)), timeout=60))
    assert error.reason == run.reason == "SCHEMA_ENVELOPE"
    assert error.metadata["pointer"] == run.metadata["pointer"] == "/input_schema"


# The folder

ENVELOPES = {"d3-tool-wrapper.json": "/input_schema", "openai_wrapper.json": "/schema"}
WARNED = {
    "b4-ref-nowhere-unreached.json": [("/definitions/unused/$ref", UNUSED)],
    "b5-draft04-newer-keyword.json": [("/properties/n/const", OTHER_DRAFT)],
    "d7-openapi30-exclusive.json": [("/exclusiveMinimum", OTHER_DRAFT)],
    "d8-openapi30-nullable.json": [("/properties/a/nullable", NULLABLE)],
    "typo.json": [("/propertes", MISSPELT), ("/requried", MISSPELT)],
    "zod_receipt_oas.json": [
        ("/properties/note/nullable", NULLABLE),
        ("/properties/pos/exclusiveMinimum", OTHER_DRAFT),
    ],
}
FILES = sorted(FOLDER.glob("*.json"))


def test_the_folder_is_there() -> None:
    if not FILES:
        pytest.skip("the folder of schemas from practice is not there")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
async def test_a_file_has_the_outcome_that_its_user_expects(path: Path) -> None:
    content = json.loads(path.read_text())
    alone = set(content) != {"schema", "valid", "invalid"}
    text = json.dumps(content if alone else content["schema"])
    async with running() as started:
        if path.name in ENVELOPES:
            request = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=text))
            error = await failure(started.stub.ValidateSchema(request, timeout=60))
            assert error.reason == "SCHEMA_ENVELOPE"
            assert error.metadata["pointer"] == ENVELOPES[path.name]
            return
        told = await report(started, text)
    warned = [(one.pointer, one.kind) for one in told.warnings]
    assert warned == WARNED.get(path.name, [])
    for value in [] if alone else content["valid"]:
        assert await given_out(text, value), value
    for value in [] if alone else content["invalid"]:
        assert not await given_out(text, value), value
