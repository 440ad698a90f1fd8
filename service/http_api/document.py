"""The OpenAPI document of the HTTP API, made from the models of its requests."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from service import __version__
from service.error_table import REASONS
from service.http_api.models import ChatRequest
from service.http_api.responses_models import ResponsesRequest

REFERENCE = "#/components/schemas/{model}"
STATUSES = {
    400: "A field is wrong; `code` is a reason of docs/errors.md, `param` the field.",
    401: "The server asks for an API key.",
    404: "There is no such model, task or path.",
    413: "The body is larger than the server allows.",
    415: "The body is not application/json.",
    422: "Under a grammar the answer was cut; no partial answer is given.",
    429: "The queue is full, or a quota is used up; come again after `Retry-After`.",
    500: "A defect, or an answer that does not fit the schema.",
    502: "The model server behind this one failed.",
    503: "The server does not take calls now; come again after `Retry-After`.",
    504: "The answer took too long.",
}


def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, made = models_json_schema(
        [(ChatRequest, "validation"), (ResponsesRequest, "validation")],
        ref_template=REFERENCE,
        title="Requests",
    )
    schemas = {**made["$defs"], **RESPONSES}
    schemas["Error"] = _error()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Qwen3-VL over HTTP",
            "version": __version__,
            "description": "OpenAI's chat completions and responses with images, and answers that fit their "
            "schema or are an error. Unknown fields are refused.",
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
        "paths": {
            "/v1/chat/completions": _generation(
                "createChatCompletion",
                "The answer to a conversation, whole or as a stream.",
                "ChatRequest",
                "ChatCompletion",
                "ChatCompletionChunk",
            ),
            "/v1/responses": _generation(
                "createResponse",
                "The same as a chat completion, in the form of the Responses API. Nothing is stored.",
                "ResponsesRequest",
                "Response",
                "ResponseEvent",
            ),
            "/v1/models": {
                "get": {
                    "operationId": "listModels",
                    "summary": "The models that are served.",
                    "responses": {
                        "200": {"description": "The models.", "content": _json("ModelList")},
                        **_errors(401, 503),
                    },
                }
            },
            "/v1/models/{model}": {
                "get": {
                    "operationId": "getModel",
                    "summary": "One model.",
                    "parameters": [
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string"},
                        }
                    ],
                    "responses": {
                        "200": {"description": "The model.", "content": _json("Model")},
                        **_errors(401, 404, 503),
                    },
                }
            },
            "/livez": _health("The process answers."),
            "/readyz": _health("The server takes calls.", 503),
            "/healthz": _health("The same as /readyz.", 503),
        },
    }


def _generation(
    operation: str, summary: str, request: str, answer: str, event: str
) -> dict[str, Any]:
    content = {**_json(answer), "text/event-stream": {"schema": _event(event)}}
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": _json(request)},
            "responses": {
                "200": {"description": "The answer.", "content": content},
                **_errors(*STATUSES),
            },
        }
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=name)}}}


def _event(name: str) -> dict[str, Any]:
    """One server-sent event: as is usual, the schema of a stream is that of each of its events."""
    data = {
        "type": "string",
        "description": f"JSON, {name} or Error; the last one of a chat completion is [DONE].",
        "contentSchema": {
            "anyOf": [{"$ref": REFERENCE.format(model=one)} for one in (name, "Error")]
        },
    }
    return _object(["data"], event={"type": "string"}, data=data)


def _errors(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {"description": STATUSES[status], "content": _json("Error")}
        for status in statuses
    }


def _health(summary: str, *others: int) -> dict[str, Any]:
    phase = {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}
    content = {"application/json": {"schema": phase}}
    responses = {
        str(status): {"description": "The phase of the server.", "content": content}
        for status in (200, *others)
    }
    return {"get": {"summary": summary, "security": [], "responses": responses}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _error() -> dict[str, Any]:
    text = {"type": "string"}
    error = _object(
        ["message", "type", "param", "code"],
        message=text,
        type=text,
        param={"type": ["string", "null"]},
        code={"type": "string", "enum": sorted(REASONS)},
        violations={
            "type": "array",
            "items": _object(["param", "message"], param=text, message=text),
        },
        metadata={"type": "object", "additionalProperties": text},
    )
    return _object(["error"], error=error)


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_SECONDS = {"type": "number", "minimum": 0}
_MODEL = _object(
    [
        *("id", "object", "created", "owned_by"),
        *("max_model_len", "input_modalities", "schema_in_prompt"),
    ],
    id=_TEXT,
    object={"const": "model"},
    created=_COUNT,
    owned_by=_TEXT,
    max_model_len=_COUNT,
    input_modalities={"type": "array", "items": {"enum": ["text", "image"]}},
    schema_in_prompt={"type": "boolean"},
)
_TOOL_CALL = _object(
    ["id", "type", "function"],
    id=_TEXT,
    type={"const": "function"},
    function=_object(["name", "arguments"], name=_TEXT, arguments=_TEXT),
)
_CHOICE = _object(
    ["index", "message", "finish_reason"],
    index={"const": 0},
    message=_object(
        ["role", "content"],
        role={"const": "assistant"},
        content={"type": ["string", "null"]},
        refusal={"type": "null"},
        tool_calls={"type": "array", "items": _TOOL_CALL},
    ),
    logprobs={"type": "null"},
    finish_reason={"enum": ["stop", "length", "tool_calls"]},
)
_REPORT = _object(
    ["enforcement", "checked", "checked_omitted", "warnings", "attempts"],
    enforcement={"enum": ["enforced", "checked", "annotation"]},
    checked={
        "type": "array",
        "items": _object(
            ["pointer", "keyword", "reason"], pointer=_TEXT, keyword=_TEXT, reason=_TEXT
        ),
    },
    checked_omitted=_COUNT,
    warnings={
        "type": "array",
        "items": _object(["pointer", "kind", "message"], pointer=_TEXT, kind=_TEXT, message=_TEXT),
    },
    attempts=_COUNT,
)
_TIMINGS = _object(
    ["queue_seconds", "first_token_seconds", "total_seconds"],
    queue_seconds=_SECONDS,
    first_token_seconds=_SECONDS,
    total_seconds=_SECONDS,
)
_OUTPUT_TEXT = _object(
    ["type", "text", "annotations", "logprobs"],
    type={"const": "output_text"},
    text=_TEXT,
    annotations={"type": "array", "maxItems": 0},
    logprobs={"type": "array", "maxItems": 0},
)
_STATUS = {"enum": ["completed", "incomplete"]}
_OUTPUT_ITEM = {
    "oneOf": [
        _object(
            ["type", "id", "status", "role", "content"],
            type={"const": "message"},
            id=_TEXT,
            status=_STATUS,
            role={"const": "assistant"},
            content={"type": "array", "items": _OUTPUT_TEXT, "minItems": 1, "maxItems": 1},
        ),
        _object(
            ["type", "id", "status", "call_id", "name", "arguments"],
            type={"const": "function_call"},
            id=_TEXT,
            status=_STATUS,
            call_id=_TEXT,
            name=_TEXT,
            arguments=_TEXT,
        ),
    ]
}
_RESPONSE = _object(
    [
        *("id", "object", "created_at", "status", "model", "output", "usage", "store", "timings"),
        *("instructions", "metadata", "temperature", "top_p", "text", "tools", "tool_choice"),
    ],
    id=_TEXT,
    object={"const": "response"},
    created_at=_COUNT,
    completed_at={"type": ["integer", "null"]},
    status=_STATUS,
    background={"const": False},
    error={"type": "null"},
    incomplete_details={
        "oneOf": [{"type": "null"}, _object(["reason"], reason={"const": "max_output_tokens"})]
    },
    model=_TEXT,
    output={"type": "array", "items": _OUTPUT_ITEM, "minItems": 1, "maxItems": 1},
    usage=_object(
        [
            *("input_tokens", "input_tokens_details", "output_tokens"),
            *("output_tokens_details", "total_tokens"),
        ],
        input_tokens=_COUNT,
        input_tokens_details=_object(
            ["cached_tokens", "image_tokens"], cached_tokens=_COUNT, image_tokens=_COUNT
        ),
        output_tokens=_COUNT,
        output_tokens_details=_object(["reasoning_tokens"], reasoning_tokens=_COUNT),
        total_tokens=_COUNT,
    ),
    instructions={"type": ["string", "null"]},
    max_output_tokens={"type": ["integer", "null"]},
    metadata={"type": "object", "additionalProperties": _TEXT},
    parallel_tool_calls={"const": False},
    previous_response_id={"type": "null"},
    store={"const": False},
    temperature={"type": "number"},
    text={"type": "object"},
    tool_choice={"type": ["string", "object"]},
    tools={"type": "array", "items": {"type": "object"}},
    top_p={"type": "number"},
    truncation={"const": "disabled"},
    timings=_TIMINGS,
    structured_output=_REPORT,
)
_USAGE = _object(
    ["prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"],
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(["image_tokens"], image_tokens=_COUNT),
)
_CHUNK = _object(
    ["id", "object", "created", "model", "choices"],
    id=_TEXT,
    object={"const": "chat.completion.chunk"},
    created=_COUNT,
    model=_TEXT,
    choices={
        "type": "array",
        "maxItems": 1,
        "items": _object(
            ["index", "delta", "finish_reason"],
            index={"const": 0},
            delta=_object(
                [],
                role={"const": "assistant"},
                content={"type": ["string", "null"]},
                refusal={"type": "null"},
                tool_calls={
                    "type": "array",
                    "items": _object(
                        ["index", "function"],
                        index={"const": 0},
                        id=_TEXT,
                        type={"const": "function"},
                        function=_object(["arguments"], name=_TEXT, arguments=_TEXT),
                    ),
                },
            ),
            logprobs={"type": "null"},
            finish_reason={"enum": [None, "stop", "length", "tool_calls"]},
        ),
    },
    usage={"anyOf": [{"type": "null"}, _USAGE]},
    timings=_TIMINGS,
    structured_output=_REPORT,
)
RESPONSES: dict[str, Any] = {
    "Response": _RESPONSE,
    "ResponseEvent": _object(
        ["type", "sequence_number"],
        type={"type": "string", "pattern": "^(response\\.|error$)"},
        sequence_number=_COUNT,
        response={"type": "object"},
        output_index={"const": 0},
        content_index={"const": 0},
        item_id=_TEXT,
        delta=_TEXT,
    ),
    "Model": _MODEL,
    "ModelList": _object(
        ["object", "data"],
        object={"const": "list"},
        data={"type": "array", "items": {"$ref": REFERENCE.format(model="Model")}},
    ),
    "ChatCompletionChunk": _CHUNK,
    "ChatCompletion": _object(
        ["id", "object", "created", "model", "choices", "usage", "timings"],
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_TEXT,
        choices={"type": "array", "items": _CHOICE, "minItems": 1, "maxItems": 1},
        usage=_USAGE,
        timings=_TIMINGS,
        structured_output=_REPORT,
    ),
}
"""What the answers look like; fields without a value are left out."""
