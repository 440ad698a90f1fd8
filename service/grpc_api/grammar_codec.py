"""Converts between proto messages and plain values for grammars and their reports. Pure
functions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import Message

from service.errors import InvalidRequest
from service.inference.calls import Validation
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.schema_compiler.report import (
    Enforcement,
    GrammarReport,
    KeywordReport,
    Rewrite,
    SchemaWarning,
    WarningKind,
)
from service.types import Grammar, GrammarKind, PropertyOrder

M = TypeVar("M", bound=Message)

GRAMMAR_KINDS = {
    GrammarKind.JSON_SCHEMA: pb.GRAMMAR_KIND_JSON_SCHEMA,
    GrammarKind.REGEX: pb.GRAMMAR_KIND_REGEX,
    GrammarKind.EBNF: pb.GRAMMAR_KIND_EBNF,
    GrammarKind.CHOICE: pb.GRAMMAR_KIND_CHOICE,
}
PROPERTY_ORDERS = {
    pb.PROPERTY_ORDER_UNSPECIFIED: None,
    pb.PROPERTY_ORDER_DECLARED: PropertyOrder.DECLARED,
    pb.PROPERTY_ORDER_ANY: PropertyOrder.ANY,
}
ENFORCEMENTS = {
    Enforcement.ENFORCED: pb.ENFORCEMENT_ENFORCED,
    Enforcement.CHECKED: pb.ENFORCEMENT_CHECKED,
    Enforcement.ANNOTATION: pb.ENFORCEMENT_ANNOTATION,
}
WARNING_KINDS = {
    WarningKind.CONSTRAINS_NOTHING: pb.SCHEMA_WARNING_KIND_CONSTRAINS_NOTHING,
    WarningKind.MISSPELT_KEYWORD: pb.SCHEMA_WARNING_KIND_MISSPELT_KEYWORD,
    WarningKind.NULLABLE: pb.SCHEMA_WARNING_KIND_NULLABLE,
    WarningKind.OTHER_DRAFT: pb.SCHEMA_WARNING_KIND_OTHER_DRAFT,
    WarningKind.IGNORED: pb.SCHEMA_WARNING_KIND_IGNORED,
    WarningKind.UNUSED: pb.SCHEMA_WARNING_KIND_UNUSED,
}
REPORT_BYTES = 1024 * 1024
"""Maximum size of the report on a grammar, in bytes: by default, gRPC clients refuse messages over
4 MiB."""
CHECKED_BYTES = 64 * 1024
"""Maximum size of the keywords in each answer, in bytes."""
WARNING_BYTES = 16 * 1024
"""Maximum size of the warnings in each answer, in bytes."""


OF_SCHEMAS = "is for a json_schema alone; leave it out"


def decode_grammar(grammar: pb.Grammar, path: str) -> Grammar:
    """Grammar -> Grammar. The text of the grammar is checked later, by the analysis."""
    kind = grammar.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest(path, "one of json_schema, regex, ebnf and choice is required")
    order = decode_property_order(grammar, f"{path}.property_order")
    close_objects = decode_close_objects(grammar, f"{path}.close_objects")
    if kind == "choice":
        source = json.dumps(list(grammar.choice.options), ensure_ascii=False)
        return Grammar(GrammarKind.CHOICE, source)
    source = getattr(grammar, kind)
    return Grammar(GrammarKind(kind), source, property_order=order, close_objects=close_objects)


def decode_property_order(grammar: pb.Grammar, path: str) -> PropertyOrder | None:
    """Grammar.property_order -> PropertyOrder; None for a caller that sets none."""
    if grammar.property_order not in PROPERTY_ORDERS:
        known = ", ".join(pb.PropertyOrder.Name(value) for value in PROPERTY_ORDERS)
        raise InvalidRequest(path, f"is {grammar.property_order}, which is none of {known}")
    order = PROPERTY_ORDERS[grammar.property_order]
    if order is not None and not grammar.HasField("json_schema"):
        raise InvalidRequest(path, OF_SCHEMAS)
    return order


def decode_close_objects(grammar: pb.Grammar, path: str) -> bool | None:
    """Grammar.close_objects -> bool; None for a caller that does not set it."""
    if not grammar.HasField("close_objects"):
        return None
    if not grammar.HasField("json_schema"):
        raise InvalidRequest(path, OF_SCHEMAS)
    return grammar.close_objects


def encode_grammar(grammar: Grammar) -> pb.Grammar:
    """Grammar -> Grammar."""
    if grammar.kind is GrammarKind.CHOICE:
        return pb.Grammar(choice=pb.Choice(options=json.loads(grammar.source)))
    order = next(one for one, value in PROPERTY_ORDERS.items() if value is grammar.property_order)
    found = pb.Grammar(property_order=order, close_objects=grammar.close_objects)
    setattr(found, grammar.kind.value, grammar.source)
    return found


def encode_validation(validation: Validation) -> pb.ValidateSchemaResponse:
    """Validation -> ValidateSchemaResponse."""
    report = validation.report
    keywords = [encode_keyword(keyword) for keyword in report.keywords]
    rewrites = [encode_rewrite(rewrite) for rewrite in report.rewrites]
    warnings = [encode_warning(warning) for warning in report.warnings]
    first = sorted(keywords, key=lambda keyword: ORDER.index(keyword.enforcement))
    kept = set(map(id, fitting([*warnings, *first, *rewrites], REPORT_BYTES)))
    return pb.ValidateSchemaResponse(
        enforcement=ENFORCEMENTS[report.enforcement],
        keywords=[keyword for keyword in keywords if id(keyword) in kept],
        rewrites=[rewrite for rewrite in rewrites if id(rewrite) in kept],
        omitted=len(warnings) + len(keywords) + len(rewrites) - len(kept),
        grammar_bytes=report.ebnf_bytes,
        analysis_seconds=report.seconds,
        compile_seconds=validation.compile_s,
        reason=report.why,
        warnings=[warning for warning in warnings if id(warning) in kept],
    )


ORDER = (pb.ENFORCEMENT_CHECKED, pb.ENFORCEMENT_ENFORCED, pb.ENFORCEMENT_ANNOTATION)
"""Order of the keywords in a report: CHECKED keywords first."""


def encode_report(
    report: GrammarReport | None,
) -> tuple[pb.Enforcement.ValueType, list[pb.KeywordReport], int]:
    """Enforcement of a grammar, its CHECKED keywords, and the number of omitted keywords."""
    if report is None:
        return pb.ENFORCEMENT_UNSPECIFIED, [], 0
    checked = fitting(map(encode_keyword, report.checked), CHECKED_BYTES)
    return ENFORCEMENTS[report.enforcement], checked, len(report.checked) - len(checked)


def encode_warnings(report: GrammarReport | None) -> list[pb.SchemaWarning]:
    """The first warnings on a grammar, for an answer."""
    return fitting(map(encode_warning, report.warnings if report else ()), WARNING_BYTES)


def fitting(messages: Iterable[M], limit_bytes: int) -> list[M]:
    """The first messages that fit into ``limit`` bytes. Pointers into a deep schema are long."""
    found: list[M] = []
    for message in messages:
        size = message.ByteSize()
        if size <= limit_bytes:
            limit_bytes -= size
            found.append(message)
    return found


def encode_keyword(keyword: KeywordReport) -> pb.KeywordReport:
    """KeywordReport -> KeywordReport."""
    return pb.KeywordReport(
        pointer=keyword.pointer,
        keyword=keyword.keyword,
        enforcement=ENFORCEMENTS[keyword.enforcement],
        reason=keyword.why,
    )


def encode_warning(warning: SchemaWarning) -> pb.SchemaWarning:
    """SchemaWarning -> SchemaWarning."""
    return pb.SchemaWarning(
        pointer=warning.pointer, kind=WARNING_KINDS[warning.kind], message=warning.message
    )


def encode_rewrite(rewrite: Rewrite) -> pb.Rewrite:
    """Rewrite -> Rewrite."""
    return pb.Rewrite(pointer=rewrite.pointer, what=rewrite.what)
