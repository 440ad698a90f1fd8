"""Proto <-> plain values: nothing is lost, nothing is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.grpc_api import codec, grammar_codec
from service.inference.calls import (
    ANALYZE_TASK,
    Answer,
    Call,
    InlineTask,
    TaskDescription,
    Validation,
)
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.schema_compiler.report import (
    Enforcement,
    GrammarReport,
    KeywordReport,
    Rewrite,
    SchemaWarning,
    WarningKind,
)
from service.settings import Settings
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.types import (
    TEXT_AND_IMAGES,
    TEXT_ONLY,
    Capabilities,
    Enforcer,
    FinishReason,
    Grammar,
    GrammarKind,
    Modality,
    PropertyOrder,
    Sampling,
    Timings,
    Usage,
)

LIMITS = Settings()
INLINE = pb.Task(inline=pb.InlineTask(user="Describe.", grammar=pb.Grammar(json_schema="true")))
IMAGE = pb.Image(data=b"image", max_pixels=1_000_000)
ASKED = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Look.")])
CALLED = pb.Message(
    role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(name="zoom", arguments_json="{}")]
)
SHOWN = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(image=IMAGE)])
TOOL = pb.ToolDefinition(name="zoom", parameters_json="{}")


def conversation(*messages: pb.Message) -> pb.Task:
    return pb.Task(inline=pb.InlineTask(messages=messages, tools=[TOOL]))


# Every field of every request


def leaves(message: Descriptor, path: tuple[FieldDescriptor, ...] = ()) -> Iterator[Any]:
    """The fields below a message type that hold a value, each as a path of fields."""
    for field in message.fields:
        if field.message_type is None:
            yield (*path, field)
        else:
            yield from leaves(field.message_type, (*path, field))


def value_of(field: FieldDescriptor) -> Any:
    """A value that is allowed, and neither a default nor one of the base requests."""
    if field.name in ("arguments_json", "parameters_json"):
        return '{"other": 1}'
    if field.type == FieldDescriptor.TYPE_STRING:
        return "other"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return b"other"
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    return 0.5 if field.type == FieldDescriptor.TYPE_DOUBLE else 7


def change(message: Message, path: tuple[FieldDescriptor, ...]) -> None:
    """Set the field at the end of the path; in a list, that of the first item."""
    first, *rest = path
    if rest:
        inner = getattr(message, first.name)
        if first.is_repeated:
            inner = inner[0] if len(inner) else inner.add()
        inner.SetInParent()
        change(inner, tuple(rest))
    elif first.is_repeated:
        getattr(message, first.name).append(value_of(first))
    else:
        setattr(message, first.name, value_of(first))


def decode_validate(request: pb.ValidateSchemaRequest, limits: Settings) -> Grammar:
    return codec.decode_validate(request)


def fits(base: Message, names: set[str]) -> bool:
    """Whether a field belongs to the form of the task that the request has."""
    if base.DESCRIPTOR.name not in ("RunTaskRequest", "StreamTaskRequest"):
        return True
    messages = base.task.inline.messages  # type: ignore[attr-defined]
    if not messages:
        return not names & {"messages", "tools"}
    if messages[0].tool_calls:
        return "tool_calls" in names
    if messages[0].parts[0].HasField("image"):
        return {"messages", "image"} <= names
    return (
        "image" not in names and bool(names & {"messages", "tools"}) and "tool_calls" not in names
    )


DECODED: list[tuple[Message, Callable[[Any, Settings], Call | Grammar]]] = [
    (pb.AnalyzeImageRequest(images=[IMAGE]), codec.decode_analyze),
    (pb.RunTaskRequest(task=INLINE, images=[IMAGE]), codec.decode_run),
    (pb.StreamTaskRequest(task=INLINE, images=[IMAGE]), codec.decode_run),
    (pb.RunTaskRequest(task=conversation(ASKED)), codec.decode_run),
    (pb.RunTaskRequest(task=conversation(SHOWN)), codec.decode_run),
    (pb.RunTaskRequest(task=conversation(CALLED, ASKED)), codec.decode_run),
    (pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema="true")), decode_validate),
]
CHOSEN_BEFORE = "model"
"""Field that the handler reads before it decodes the rest: the model's limits apply to the rest."""
FIELDS = [
    pytest.param(base, decode, path, id=".".join([base.DESCRIPTOR.name, *(f.name for f in path)]))
    for base, decode in DECODED
    for path in leaves(base.DESCRIPTOR)
    if fits(base, {field.name for field in path}) and path[0].name != CHOSEN_BEFORE
]


@pytest.mark.parametrize(("base", "decode", "path"), FIELDS)
def test_every_field_of_a_request_is_read(
    base: Message,
    decode: Callable[[Any, Settings], Call | Grammar],
    path: tuple[FieldDescriptor, ...],
) -> None:
    changed = type(base)()
    changed.CopyFrom(base)
    change(changed, path)
    assert decode(changed, LIMITS) != decode(base, LIMITS)


def test_requests_without_fields_are_known() -> None:
    """The methods that are not in DECODED. A new method has to be put into one of the two."""
    decoded = {base.DESCRIPTOR.name for base, _ in DECODED}
    service = pb.DESCRIPTOR.services_by_name["VisionService"]
    others = {method.input_type.name for method in service.methods} - decoded
    assert others == {
        "ListTasksRequest",
        "ListModelsRequest",
        "GetModelRequest",
        "GetTaskRequest",
    }
    assert not pb.ListTasksRequest.DESCRIPTOR.fields
    assert not pb.ListModelsRequest.DESCRIPTOR.fields
    assert [field.name for field in pb.GetModelRequest.DESCRIPTOR.fields] == ["name"]
    assert [field.name for field in pb.GetTaskRequest.DESCRIPTOR.fields] == ["name"]


def test_the_enums_of_requests() -> None:
    """Proto3 keeps unknown enum numbers as they are: each of them needs a rule, and a test of it."""
    service = pb.DESCRIPTOR.services_by_name["VisionService"]
    found = {
        path[-1].full_name
        for method in service.methods
        for path in leaves(method.input_type)
        if path[-1].enum_type is not None
    }
    assert found == {"qwen3vl.v1.Grammar.property_order", "qwen3vl.v1.Message.role"}


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (pb.PROPERTY_ORDER_UNSPECIFIED, None),
        (pb.PROPERTY_ORDER_DECLARED, PropertyOrder.DECLARED),
        (pb.PROPERTY_ORDER_ANY, PropertyOrder.ANY),
    ],
)
def test_property_order(number: pb.PropertyOrder.ValueType, order: PropertyOrder | None) -> None:
    grammar = pb.Grammar(json_schema="true", property_order=number)
    decoded = codec.decode_validate(pb.ValidateSchemaRequest(grammar=grammar))
    assert decoded == Grammar(GrammarKind.JSON_SCHEMA, "true", property_order=order)
    assert grammar_codec.encode_grammar(decoded) == grammar


@pytest.mark.parametrize("wish", [None, False, True])
def test_close_objects(wish: bool | None) -> None:
    grammar = pb.Grammar(json_schema="true", close_objects=wish)
    decoded = codec.decode_validate(pb.ValidateSchemaRequest(grammar=grammar))
    assert decoded == Grammar(GrammarKind.JSON_SCHEMA, "true", close_objects=wish)
    assert grammar_codec.encode_grammar(decoded) == grammar


def test_an_unknown_property_order_is_refused() -> None:
    grammar = pb.Grammar.FromString(
        b"\x28\x03" + pb.Grammar(json_schema="true").SerializeToString()
    )
    request = pb.RunTaskRequest(task=pb.Task(inline=pb.InlineTask(user="Hi", grammar=grammar)))
    with pytest.raises(InvalidRequest) as found:
        codec.decode_run(request, LIMITS)
    (violation,) = found.value.violations
    assert violation.field == "task.inline.grammar.property_order"
    assert "PROPERTY_ORDER_DECLARED, PROPERTY_ORDER_ANY" in violation.description


@pytest.mark.parametrize(
    "grammar", [pb.Grammar(regex="a"), pb.Grammar(choice=pb.Choice(options=["a"]))]
)
def test_a_property_order_without_a_json_schema_is_refused(grammar: pb.Grammar) -> None:
    grammar.property_order = pb.PROPERTY_ORDER_DECLARED
    with pytest.raises(InvalidRequest) as found:
        codec.decode_validate(pb.ValidateSchemaRequest(grammar=grammar))
    (violation,) = found.value.violations
    assert violation.field == "grammar.property_order"


def test_a_kind_of_grammar_that_is_not_known() -> None:
    grammar = pb.Grammar.FromString(b"\x32\x01x")  # field 6, a kind of a newer API
    request = pb.RunTaskRequest(task=pb.Task(inline=pb.InlineTask(user="Hi", grammar=grammar)))
    with pytest.raises(InvalidRequest) as found:
        codec.decode_run(request, LIMITS)
    assert found.value.reason == "UNKNOWN_FIELD"
    assert found.value.violations[0].field == "task.inline.grammar"


# Requests


def test_analyze() -> None:
    request = pb.AnalyzeImageRequest(images=[IMAGE, pb.Image(data=b"2")], accept_empty=True)
    call = codec.decode_analyze(request, LIMITS)
    assert (call.task, call.accept_empty, call.sampling) == (ANALYZE_TASK, True, Sampling())
    first, second = call.images
    assert (first.field, first.data) == ("images[0].data", b"image")
    assert (first.min_pixels, first.max_pixels) == (None, 1_000_000)
    assert (second.field, second.min_pixels, second.max_pixels) == ("images[1].data", None, None)


def test_run_with_a_registered_and_an_inline_task() -> None:
    named = codec.decode_run(pb.RunTaskRequest(task=pb.Task(name="faces")), LIMITS)
    assert (named.task, named.images) == ("faces", ())
    inline = codec.decode_run(
        pb.RunTaskRequest(task=pb.Task(inline=pb.InlineTask(system="Be brief.", user="Hi"))), LIMITS
    )
    assert inline.task == InlineTask("Be brief.", "Hi", None)


sampling = st.builds(
    Sampling,
    max_tokens=st.integers(1, 2**32 - 1),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(1, 2**32 - 1),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)


@given(sampling)
def test_sampling_options_arrive_as_they_were_sent(options: Sampling) -> None:
    names = pb.SamplingOptions.DESCRIPTOR.fields_by_name
    message = pb.SamplingOptions(**{name: getattr(options, name) for name in names})
    sent = pb.SamplingOptions.FromString(message.SerializeToString())
    assert codec.decode_sampling(sent) == options


def test_options_that_are_not_sent_have_the_documented_defaults() -> None:
    assert codec.decode_sampling(pb.SamplingOptions()) == Sampling()
    assert codec.decode_sampling(pb.SamplingOptions(seed=0)) == Sampling(seed=0)
    assert codec.decode_sampling(pb.SamplingOptions(temperature=0)) == Sampling()
    assert Sampling() == Sampling(None, 0.0, 1.0, 0, 1.0, None)
    assert Sampling().answer_limit(room=1025) == 1024
    assert Sampling().answer_limit(room=1023) == 1023


grammars = st.one_of(
    st.builds(
        Grammar,
        st.sampled_from([GrammarKind.JSON_SCHEMA, GrammarKind.REGEX, GrammarKind.EBNF]),
        st.text(),
    ),
    st.lists(st.text()).map(
        lambda options: Grammar(GrammarKind.CHOICE, json.dumps(options, ensure_ascii=False))
    ),
)


@given(grammars)
def test_grammars_survive_both_ways(grammar: Grammar) -> None:
    message = grammar_codec.encode_grammar(grammar)
    sent = pb.Grammar.FromString(message.SerializeToString())
    assert grammar_codec.decode_grammar(sent, "grammar") == grammar


def test_every_kind_of_grammar_has_its_number_and_its_field() -> None:
    assert set(grammar_codec.GRAMMAR_KINDS) == set(GrammarKind)
    assert len(set(grammar_codec.GRAMMAR_KINDS.values())) == len(pb.GrammarKind.keys()) - 1
    fields = {field.name for field in pb.Grammar.DESCRIPTOR.oneofs_by_name["kind"].fields}
    assert fields == {kind.value for kind in GrammarKind}
    for kind, number in grammar_codec.GRAMMAR_KINDS.items():
        assert pb.GrammarKind.Name(number) == f"GRAMMAR_KIND_{kind.name}"


def test_every_enforcement_has_its_number() -> None:
    assert len(grammar_codec.ENFORCEMENTS) == len(Enforcement) == len(pb.Enforcement.keys()) - 1
    for enforcement, number in grammar_codec.ENFORCEMENTS.items():
        assert pb.Enforcement.Name(number) == f"ENFORCEMENT_{enforcement.name}"


# Responses

LONG = "/x" * 600_000
REPORT = GrammarReport(
    Enforcement.CHECKED,
    keywords=(
        KeywordReport("/title", "title", Enforcement.ANNOTATION),
        KeywordReport("/uniqueItems", "uniqueItems", Enforcement.CHECKED, "is relational"),
        KeywordReport("/type", "type", Enforcement.ENFORCED),
        KeywordReport(LONG, "not", Enforcement.CHECKED, "is too much"),
    ),
    rewrites=(Rewrite("/allOf", "merged"),),
    ebnf_bytes=77,
    seconds=0.5,
    why="is too large",
    warnings=(SchemaWarning("/requried", WarningKind.MISSPELT_KEYWORD, "is no keyword"),),
)
ANSWER = Answer(
    text='{"a": 1}',
    value={"a": 1},
    json='{"a": 1}',
    finish_reason=FinishReason.STOP,
    usage=Usage(30, 20, 10),
    timings=Timings(0.1, 0.2, 0.3),
    model="some-model",
    report=REPORT,
    attempts=2,
)
CAPABILITIES = Capabilities(
    model="some-model",
    engine="some-engine",
    modalities=TEXT_AND_IMAGES,
    grammar_kinds=frozenset(GrammarKind),
    sampling_options=frozenset({"top_p", "max_tokens"}),
    context_length=4096,
    max_images=8,
    details={"dtype": "float32"},
    schema_in_prompt=True,
)
ANALYSIS = IMAGE_ANALYSIS.parse(  # type: ignore[misc]
    json.dumps(
        {
            name: [f"{name}-1", f"{name}-2"] if field.is_repeated else f"a {name}"
            for name, field in pb.ImageAnalysis.DESCRIPTOR.fields_by_name.items()
        }
    )
)
SCHEMA = Grammar(
    GrammarKind.JSON_SCHEMA, "{}", property_order=PropertyOrder.ANY, close_objects=True
)
ENCODED: list[Message] = [
    codec.encode_analysis(replace(ANSWER, value=ANALYSIS)),
    pb.RunTaskResponse(result=codec.encode_result(ANSWER)),
    codec.encode_event(ANSWER),
    pb.GetTaskResponse(task=codec.encode_task(TaskDescription("a", "b", True, SCHEMA, REPORT))),
    grammar_codec.encode_validation(Validation(REPORT, 0.25)),
    codec.encode_model(CAPABILITIES, LIMITS),
]


def unset(message: Message, path: str = "") -> Iterator[str]:
    """The fields that a message leaves empty; of a oneof, one is enough."""
    for field in message.DESCRIPTOR.fields:
        chosen = field.containing_oneof
        if chosen is not None and message.WhichOneof(chosen.name) not in (None, field.name):
            continue
        name = f"{path}.{field.name}".lstrip(".")
        if field not in [found for found, _ in message.ListFields()]:
            yield name
        elif field.message_type is not None and not field.is_repeated:
            yield from unset(getattr(message, field.name), name)


@pytest.mark.parametrize("message", ENCODED, ids=lambda message: message.DESCRIPTOR.name)
def test_every_field_of_a_response_is_filled(message: Message) -> None:
    assert list(unset(message)) == []


def test_results() -> None:
    result = codec.encode_result(ANSWER)
    assert (result.text, result.json, result.model) == (ANSWER.text, ANSWER.json, "some-model")
    assert result.finish_reason == pb.FINISH_REASON_STOP
    assert result.usage == pb.Usage(prompt_tokens=30, image_tokens=20, output_tokens=10)
    timings = (
        result.timings.queue_seconds,
        result.timings.first_token_seconds,
        result.timings.total_seconds,
    )
    assert timings == (0.1, 0.2, 0.3)
    assert codec.encode_event("piece") == pb.StreamTaskResponse(delta="piece")


def reported(keywords: Any) -> list[tuple[str, str, int, str]]:
    return [(one.pointer, one.keyword, one.enforcement, one.reason) for one in keywords]


def test_a_result_lists_only_checked_keywords() -> None:
    result = codec.encode_result(ANSWER)
    assert result.enforcement == pb.ENFORCEMENT_CHECKED
    assert reported(result.checked) == [("/uniqueItems", "uniqueItems", 2, "is relational")]
    assert (result.checked_omitted, result.attempts) == (1, 2)
    plain = codec.encode_result(replace(ANSWER, report=None))
    assert (plain.enforcement, list(plain.checked)) == (pb.ENFORCEMENT_UNSPECIFIED, [])


def test_a_validation_lists_every_keyword_that_fits() -> None:
    fits = replace(REPORT, keywords=REPORT.keywords[:3])
    told = grammar_codec.encode_validation(Validation(fits, 0.25))
    assert reported(told.keywords) == [
        ("/title", "title", 3, ""),
        ("/uniqueItems", "uniqueItems", 2, "is relational"),
        ("/type", "type", 1, ""),
    ]
    assert [(one.pointer, one.what) for one in told.rewrites] == [("/allOf", "merged")]
    assert (told.omitted, told.grammar_bytes, told.reason) == (0, 77, "is too large")
    assert (told.analysis_seconds, told.compile_seconds) == (0.5, 0.25)


TASK = TaskDescription("a", "b", True, SCHEMA, REPORT)


def test_warnings_go_with_a_validation_an_answer_and_a_task() -> None:
    told = grammar_codec.encode_validation(Validation(REPORT, 0.25))
    for message in (told, codec.encode_result(ANSWER), codec.encode_task(TASK)):
        (one,) = message.warnings
        assert (one.pointer, one.message) == ("/requried", "is no keyword")
        assert one.kind == pb.SCHEMA_WARNING_KIND_MISSPELT_KEYWORD
    for kind, number in grammar_codec.WARNING_KINDS.items():
        assert pb.SchemaWarningKind.Name(number) == f"SCHEMA_WARNING_KIND_{kind.name}"
    assert set(grammar_codec.WARNING_KINDS) == set(WarningKind)


def test_the_warnings_of_an_answer_are_bounded() -> None:
    several = (SchemaWarning(LONG[:5000], WarningKind.UNUSED, "is wrong"),) * 9
    report = replace(REPORT, warnings=several)
    assert len(codec.encode_result(replace(ANSWER, report=report)).warnings) == 3
    assert codec.encode_result(replace(ANSWER, report=None)).warnings == []
    assert len(grammar_codec.encode_validation(Validation(report, 0.25)).warnings) == 9


def test_omitted_keywords_of_a_report_are_counted() -> None:
    """The most important first, so that the long pointers of a hostile schema hide nothing."""
    enforced = tuple(replace(REPORT.keywords[2], pointer=LONG[:4000]) for _ in range(300))
    checked = replace(REPORT.keywords[1], pointer=LONG[:5000])
    report = replace(REPORT, keywords=(*enforced, checked, *REPORT.keywords[:3]))
    told = grammar_codec.encode_validation(Validation(report, 0.25))
    assert 1_000_000 < told.ByteSize() < 1_060_000
    assert [one.keyword for one in told.keywords][-4:] == [
        "uniqueItems",
        "title",
        "uniqueItems",
        "type",
    ]
    assert told.omitted == 305 - len(told.keywords) - len(told.rewrites)
    assert told.omitted > 30


def test_an_analysis_keeps_its_fields() -> None:
    analysis = codec.encode_analysis(replace(ANSWER, value=ANALYSIS)).analysis
    for field in pb.ImageAnalysis.DESCRIPTOR.fields:
        value = getattr(ANALYSIS, field.name)
        assert value
        assert getattr(analysis, field.name) == (list(value) if field.is_repeated else value)


def test_the_limits_are_the_settings() -> None:
    limits = codec.encode_limits(LIMITS)
    for field in pb.Limits.DESCRIPTOR.fields:
        setting = field.name.replace("_seconds", "_s")
        assert getattr(limits, field.name) == getattr(LIMITS, setting)


def test_get_model_reports_the_capabilities() -> None:
    message = codec.encode_model(CAPABILITIES, LIMITS).capabilities
    assert message.vision
    assert list(message.modalities) == [pb.MODALITY_TEXT, pb.MODALITY_IMAGE]
    assert message.enforcer == pb.ENFORCER_MASK
    assert list(message.grammar_kinds) == [1, 2, 3, 4]
    assert list(message.sampling_options) == ["max_tokens", "top_p"]
    assert (message.context_length, message.max_images) == (4096, 8)


def test_a_model_without_vision_takes_text_alone() -> None:
    found = replace(CAPABILITIES, modalities=TEXT_ONLY, enforcer=Enforcer.VALIDATION)
    message = codec.encode_model(found, LIMITS).capabilities
    assert not message.vision
    assert list(message.modalities) == [pb.MODALITY_TEXT]
    assert message.enforcer == pb.ENFORCER_VALIDATION


def test_every_modality_and_enforcer_has_its_number() -> None:
    for one, number in codec.MODALITIES.items():
        assert pb.Modality.Name(number) == f"MODALITY_{one.name}"
    for enforcer, number in codec.ENFORCERS.items():
        assert pb.Enforcer.Name(number) == f"ENFORCER_{enforcer.name}"
    assert (codec.MODALITIES.keys(), codec.ENFORCERS.keys()) == (set(Modality), set(Enforcer))
