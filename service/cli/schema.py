"""``qwen3vl schema``: shows which keywords of a JSON schema are enforced, as text or JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from service.cli.calls import PROPERTY_ORDERS, WORDS, Target, calling, print_json
from service.cli.inputs import read_text
from service.cli.output import echo
from service.errors import ServiceError
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.schema_compiler.api import Options
from service.schema_compiler.stages import STAGES
from service.types import PropertyOrder

NOT_ENFORCED = 3
"""Exit code for a valid schema that ``strict`` refuses."""


def validate(
    target: Target,
    schema: Path,
    property_order: str | None,
    close_objects: bool | None,
    everything: bool,
    as_json: bool,
) -> int:
    """Call ValidateSchema; prints the warnings and the keywords that are not enforced, or all
    keywords.

    Returns 0 for a schema that ``strict`` accepts, ``NOT_ENFORCED`` for another valid schema.
    """
    text = read_text(schema, "FILE")
    order = PROPERTY_ORDERS[property_order]
    grammar = pb.Grammar(json_schema=text, property_order=order, close_objects=close_objects)
    request = pb.ValidateSchemaRequest(grammar=grammar)
    enforced = False

    def call(stub: VisionServiceStub) -> None:
        nonlocal enforced
        response = stub.ValidateSchema(request, timeout=target.timeout_s)
        enforced = response.enforcement == pb.ENFORCEMENT_ENFORCED and not any(
            one.kind == pb.SCHEMA_WARNING_KIND_MISSPELT_KEYWORD for one in response.warnings
        )
        if as_json:
            return print_json(response)
        for line in lines(response, everything):
            echo(line)
        typer.echo(
            f"\n{response.grammar_bytes} bytes of grammar, analysed in"
            f" {response.analysis_seconds:.3f} s, compiled in {response.compile_seconds:.3f} s, once for"
            " all requests",
            err=True,
        )
        if not enforced:
            typer.echo(
                f"Requests may use this schema, except with `strict` (exit code {NOT_ENFORCED}).",
                err=True,
            )

    failed = calling(target, call)
    return failed or (0 if enforced else NOT_ENFORCED)


def print_stage(schema: Path, stage: str, property_order: str | None, close_objects: bool) -> int:
    """Print a stage of the compiler: ``normalized``, ``ir``, ``grammar``, ``report`` or ``prompt``, for
    an engine that limits lengths of strings. Returns 0, or 1 for a schema that cannot be used."""
    order = PropertyOrder.ANY if property_order == "any" else PropertyOrder.DECLARED
    options = Options(order, close_objects, lengths_beside=True)
    try:
        for line in STAGES[stage](read_text(schema, "FILE"), options):
            echo(line)
    except ServiceError as error:
        typer.echo(f"{error.message} [{error.reason}]", err=True)
        return 1
    return 0


def lines(response: pb.ValidateSchemaResponse, everything: bool) -> Iterator[str]:
    """The lines of the report: summary, warnings, keywords with reasons, and rewrites."""
    keywords = [one for one in response.keywords if one.enforcement != pb.ENFORCEMENT_ANNOTATION]
    checked = [one for one in keywords if one.enforcement == pb.ENFORCEMENT_CHECKED]
    if response.enforcement == pb.ENFORCEMENT_ENFORCED:
        yield (
            "ENFORCED: the model can only write what fits the schema. Every finished answer is valid;"
            " one that max_tokens cuts off is the error OUTPUT_TRUNCATED."
        )
    else:
        yield (
            "CHECKED: the model can only write what fits the schema, except for"
            f" {len(checked)} of its {len(keywords)} keywords. The server checks these in the finished"
            " answer: one that violates them is the error OUTPUT_INVALID."
        )
    for warning in response.warnings:
        yield f"  {'warning':<11}{_place(warning.pointer)}: {warning.message}"
    for one in response.keywords if everything else (one for one in keywords if one.reason):
        remark = one.enforcement == pb.ENFORCEMENT_ENFORCED and one.reason
        word = "note" if remark else WORDS.get(one.enforcement, "?")
        yield f"  {word:<11}{one.pointer}" + (f": {one.reason}" if one.reason else "")
    for rewrite in response.rewrites if everything else ():
        yield f"  {'rewritten':<11}{_place(rewrite.pointer)}: {rewrite.what}"
    if response.omitted:
        yield f"  … and {response.omitted} more"


def _place(pointer: str) -> str:
    """A JSON pointer for people: that of the root is empty."""
    return pointer or "the schema"
