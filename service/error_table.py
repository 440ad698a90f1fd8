"""The table of errors: the meaning of each reason, its statuses, and whether a retry may succeed.

Every front end takes its statuses from this table, and ``docs/errors.md`` is generated from it
(``python -m docs.generate``). To add a reason, add a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Reason:
    """One row.

    Attributes:
        name: the ``reason`` of ``google.rpc.ErrorInfo``; never changes once released.
        grpc: name of the gRPC status.
        http: HTTP status.
        retry: whether the same call, unchanged, may succeed later.
        meaning: when it happens, for docs/errors.md; Markdown.
    """

    name: str
    grpc: str
    http: int
    retry: bool
    meaning: str


def _invalid(name: str, meaning: str) -> Reason:
    return Reason(name, "INVALID_ARGUMENT", 400, False, meaning)


def _unavailable(name: str, meaning: str) -> Reason:
    return Reason(name, "UNAVAILABLE", 503, True, meaning)


_ROWS = (
    _invalid("INVALID_FIELD", "a field is missing or out of range"),
    _invalid(
        "UNKNOWN_FIELD",
        "a field that this server does not know, from a newer API or another message type",
    ),
    _invalid(
        "MALFORMED_REQUEST",
        "the bytes are not a message of the method's type, or a text is not UTF-8",
    ),
    _invalid(
        "SAMPLING_OPTION_INVALID",
        "a sampling option is out of range, or the engine does not support it; the error names all "
        "such options",
    ),
    _invalid("TEXT_EMPTY", "the user text of an inline task is empty or blank"),
    _invalid("TEXT_TOO_LONG", "the texts of the task are over `Limits.max_text_bytes`"),
    _invalid(
        "CONTEXT_TOO_LONG",
        "the prompt leaves no room for an answer in the context of the model (field `task`, or "
        "`images` where the text alone would fit), or less room than the `max_tokens` of the request "
        "asks for (field `sampling.max_tokens`)",
    ),
    _invalid("IMAGE_REQUIRED", "the task needs an image, and the request has none"),
    _invalid("TOO_MANY_IMAGES", "more images than the server, the model or the task accepts"),
    _invalid(
        "IMAGE_URL_REFUSED",
        "over HTTP: an image by a URL that is not a `data:` URL, and that the server does not fetch; "
        "see `image_hosts` in docs/http.md",
    ),
    _invalid(
        "IMAGE_FETCH_FAILED",
        "over HTTP: an image could not be fetched from its URL: the host cannot be reached, has no "
        "valid certificate, answered with another status than 200, or took too long; in a batch: an "
        "image file cannot be read",
    ),
    _invalid("IMAGE_EMPTY", "an image has no bytes"),
    _invalid(
        "IMAGE_FORMAT_UNSUPPORTED",
        "not a file in a format that the server accepts; metadata: `found`, the format, if it is known",
    ),
    _invalid("IMAGE_TRUNCATED", "the file ends before the image is complete"),
    _invalid("IMAGE_INVALID", "the file is damaged, or has too many segments, chunks or scans"),
    _invalid("IMAGE_TOO_LARGE", "over `Limits.max_image_bytes`"),
    _invalid("IMAGE_TOO_MANY_PIXELS", "over `Limits.max_image_pixels`"),
    _invalid(
        "IMAGES_TOO_MANY_PIXELS",
        "the images of a request together are over `Limits.max_request_pixels`",
    ),
    _invalid(
        "IMAGE_NEEDS_TOO_MUCH_MEMORY",
        "decoding the image would take more memory than the server has for one image; metadata: "
        "`limit` and `actual` in bytes. A baseline JPEG or a PNG file needs the least",
    ),
    _invalid("IMAGE_TOO_SMALL", "the width or the height is 0 pixels"),
    _invalid("IMAGE_ASPECT_RATIO", "one side is more than 200 times the other"),
    _invalid("SCHEMA_NOT_JSON", "the schema is not JSON"),
    _invalid("SCHEMA_INVALID", "the JSON is not a valid JSON Schema of its draft"),
    _invalid(
        "SCHEMA_ENVELOPE",
        'an object that contains a schema was sent, such as `{"name", "strict", "schema"}` or the '
        "definition of a tool; metadata: `pointer` to the member to send",
    ),
    _invalid(
        "SCHEMA_TOO_LARGE", "over `Limits.max_schema_bytes`, or checking takes too many steps"
    ),
    _invalid("SCHEMA_TOO_DEEP", "over `Limits.max_schema_depth`"),
    _invalid("SCHEMA_REMOTE_REF", "`$ref` points outside the schema; the server fetches nothing"),
    _invalid(
        "SCHEMA_PATTERN_UNSUPPORTED",
        "a regular expression in the schema cannot be checked in bounded time: it has "
        "back-references or look-behind, or is too large",
    ),
    _invalid("SCHEMA_UNSATISFIABLE", "no value is valid against the schema; metadata: `pointer`"),
    _invalid(
        "SCHEMA_NOT_ENFORCED",
        "`strict` (over HTTP `require_enforced`) is set, and some keywords are only checked after "
        "generation, or misspelt: one violation each, as many as fit; metadata: `checked`, their "
        "number. Change the schema as the violations say, or leave the option out; "
        "`ValidateSchema` reports this before a call",
    ),
    _invalid("SCHEMA_UNSUPPORTED", "a valid schema that cannot be compiled into a grammar"),
    _invalid(
        "GRAMMAR_INVALID",
        "a regular expression, EBNF grammar or choice that is invalid or unsupported",
    ),
    _invalid("GRAMMAR_UNSATISFIABLE", "no text matches the regular expression"),
    _invalid(
        "GRAMMAR_KIND_UNSUPPORTED",
        "a kind of grammar that the engine does not support; see GetModel",
    ),
    _invalid("GRAMMAR_COMPILE_TIMEOUT", "over `Limits.compile_timeout_seconds`"),
    _invalid(
        "GRAMMAR_COMPILE_CRASHED",
        "compiling the grammar crashed a worker process, and then a second one; other calls are "
        "not affected, and the grammar is refused for 60 seconds",
    ),
    _invalid(
        "GRAMMAR_TOO_COSTLY",
        "a grammar that is too ambiguous or has large counts, so that each "
        "token takes longer; or a grammar that takes too much memory",
    ),
    Reason(
        "API_KEY_MISSING",
        "UNAUTHENTICATED",
        401,
        False,
        "the server requires an API key, and the call has none",
    ),
    Reason("API_KEY_INVALID", "UNAUTHENTICATED", 401, False, "the server does not know the key"),
    Reason(
        "CERTIFICATE_NOT_ALLOWED",
        "PERMISSION_DENIED",
        403,
        False,
        "the name in the client certificate is not on the list of the server",
    ),
    Reason("UNKNOWN_TASK", "NOT_FOUND", 404, False, "no task is registered under the name"),
    Reason("UNKNOWN_MODEL", "NOT_FOUND", 404, False, "the server has no model of the name"),
    Reason(
        "VISION_DISABLED",
        "FAILED_PRECONDITION",
        400,
        False,
        "an image for a model that runs without vision",
    ),
    Reason("UNKNOWN_PATH", "UNIMPLEMENTED", 404, False, "over HTTP: a path that is not served"),
    Reason(
        "METHOD_NOT_ALLOWED",
        "UNIMPLEMENTED",
        405,
        False,
        "over HTTP: the path takes another method",
    ),
    Reason(
        "REQUEST_TOO_LARGE",
        "INVALID_ARGUMENT",
        413,
        False,
        "over HTTP: the body is over `Limits.max_message_bytes`; metadata: `limit`",
    ),
    Reason(
        "CONTENT_TYPE_UNSUPPORTED",
        "INVALID_ARGUMENT",
        415,
        False,
        "over HTTP: the body is not `application/json`, or is compressed",
    ),
    Reason(
        "REQUEST_COMPRESSED",
        "UNIMPLEMENTED",
        415,
        False,
        "over gRPC: the request is compressed; see `compressed_requests` in "
        "[operations.md](operations.md)",
    ),
    Reason(
        "OUTPUT_TRUNCATED",
        "OUT_OF_RANGE",
        422,
        False,
        "the answer is longer than `max_tokens`, or without `max_tokens` longer than 1024 tokens or "
        "the rest of the context; or the answer repeats itself; metadata: `finish_reason`, "
        "`max_tokens` (the limit that applied), `output_tokens`, `prompt_tokens`, `image_tokens`",
    ),
    Reason(
        "OUTPUT_INVALID",
        "INTERNAL",
        500,
        False,
        "the answer is not valid against the schema, after all attempts; it is not returned; metadata: "
        "`pointer` into the answer, `keyword`, `attempts`, `output_tokens` where generation ended early",
    ),
    Reason(
        "NO_USABLE_FIELDS",
        "INTERNAL",
        500,
        False,
        "the analysis has no information; `accept_empty` accepts such an answer",
    ),
    Reason(
        "INFERENCE_TIMEOUT",
        "DEADLINE_EXCEEDED",
        504,
        False,
        "longer than `Limits.inference_timeout_seconds`, or than the deadline of the caller",
    ),
    Reason(
        "RECEIVE_TIMEOUT",
        "DEADLINE_EXCEEDED",
        504,
        False,
        "the request did not arrive within `receive_timeout_s` of the server; metadata: `limit_s`",
    ),
    Reason(
        "OVERLOADED",
        "RESOURCE_EXHAUSTED",
        429,
        True,
        "the queue is full; try again after `RetryInfo.retry_delay`",
    ),
    Reason(
        "QUOTA_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        429,
        True,
        "the caller uses as much of the server as its quota allows; metadata: `quota`, its name, and "
        "`limit`; try again after `RetryInfo.retry_delay`",
    ),
    _unavailable("ENGINE_LOADING", "the model is loading"),
    _unavailable("ENGINE_UNHEALTHY", "the engine makes no progress"),
    _unavailable("ENGINE_STALLED", "the engine made no progress for too long"),
    _unavailable("ENGINE_DEAD", "the engine has ended"),
    _unavailable("ENGINE_DRAINING", "the server is stopping"),
    _unavailable("ENGINE_CLOSED", "the engine was closed"),
    _unavailable(
        "REPLICA_LOST",
        "with `engine=ray`: the replica that ran the request has ended, after text was sent or several "
        "times in a row",
    ),
    _unavailable("ENGINE_UNAVAILABLE", "the engine cannot be used"),
    _unavailable(
        "GRAMMAR_WORKER_LOST",
        "two processes that compiled the grammar were killed or stopped from outside; the "
        "grammar is not the cause",
    ),
    _unavailable(
        "BACKEND_UNREACHABLE",
        "with `engine=remote`: no model server answers, or its connection broke before the answer was "
        "complete",
    ),
    Reason(
        "BACKEND_FAILED",
        "INTERNAL",
        502,
        False,
        "with `engine=remote`: the model server failed, or it refuses the key or the model name of "
        "this server; the operator finds its answer in the log; metadata: `status`, its HTTP status",
    ),
    Reason(
        "BACKEND_REFUSED",
        "INVALID_ARGUMENT",
        400,
        False,
        "with `engine=remote`: the model server refused the request, such as a prompt or an image "
        "that is too large for it; the operator finds its answer in the log; metadata: `status`",
    ),
    Reason(
        "BACKEND_ANSWER_INVALID",
        "INTERNAL",
        502,
        False,
        "with `engine=remote`: the model server sent no complete answer; it is not returned; metadata: "
        "`fault`, what is wrong with it",
    ),
    Reason(
        "INTERNAL",
        "INTERNAL",
        500,
        False,
        "a bug in the server; the operator finds the cause in the log under the request id",
    ),
)

REASONS: dict[str, Reason] = {row.name: row for row in _ROWS}
"""Every reason that a client can see, by its name, in the order of docs/errors.md."""


def row_of(error: ServiceError) -> Reason:
    """The row of an error's reason.

    An engine or a task of somebody else may have reasons of its own: their row is that of the
    nearest class of this service.
    """
    reasons = (error.reason, *(getattr(kind, "reason", "") for kind in type(error).__mro__))
    return next(REASONS[name] for name in reasons if name in REASONS)
