"""The commands that call a server: they build a request, call, and print the answer or the
error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from pydantic import TypeAdapter, ValidationError

from service.cli.explain import explain
from service.cli.inputs import option_text, read_bytes, read_text, utf8
from service.cli.output import echo
from service.client import open_channel
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.schema_compiler import jsontext
from service.tasks import yamltext
from service.tasks.examples import Example, ExampleError, read_examples
from service.types import Role, TextPart

FAILED = 1
HEALTH_INTERVAL_S = 0.1
WORDS = {
    pb.ENFORCEMENT_UNSPECIFIED: "",
    pb.ENFORCEMENT_ENFORCED: "enforced",
    pb.ENFORCEMENT_CHECKED: "checked",
    pb.ENFORCEMENT_ANNOTATION: "annotation",
}
ROLES = {Role.USER: pb.ROLE_USER, Role.ASSISTANT: pb.ROLE_ASSISTANT}
PROPERTY_ORDERS = {
    None: pb.PROPERTY_ORDER_UNSPECIFIED,
    "declared": pb.PROPERTY_ORDER_DECLARED,
    "any": pb.PROPERTY_ORDER_ANY,
}


@dataclass(frozen=True)
class Credentials:
    """API key and certificates of a call: the arguments of ``open_channel``."""

    api_key: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    tls_name: str | None = None


def credentials(
    api_key: str | None, ca: Path | None, cert: Path | None, key: Path | None
) -> Credentials:
    """The credentials from the options; a usage error for an incomplete combination."""
    if (cert is None) != (key is None):
        raise typer.BadParameter("--cert and --key belong together, give both or neither")
    if cert is not None and ca is None:
        raise typer.BadParameter("--cert and --key need --ca, which turns TLS on")
    return Credentials(api_key, ca, cert, key)


@dataclass(frozen=True)
class Target:
    """The target of a call: a server, or a model in this process."""

    server: str
    credentials: Credentials
    timeout_s: float
    local: bool = False

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """Open a channel. For a local target, start a server that stops when the block ends."""
        if self.local:
            from service.cli.serving import local_server

            with local_server() as address, open_channel(address) as channel:
                yield channel
        else:
            with open_channel(self.server, **vars(self.credentials)) as channel:
                yield channel


def sampling(
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
    max_tokens: int | None,
    thinking: bool | None = None,
) -> pb.SamplingOptions:
    """Set only the options that were given; the server's defaults apply to the others."""
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "thinking": thinking,
    }
    options = pb.SamplingOptions()
    for name, value in given.items():
        if value is None:
            continue
        try:
            setattr(options, name, value)
        except ValueError:  # does not fit the type in the request; the server checks the rest
            flag = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"{value} is not possible for {flag}") from None
    return options


def task(
    prompt: str | None,
    name: str | None,
    system: str,
    schema: Path | None,
    regex: str | None,
    ebnf: Path | None,
    choice: Sequence[str],
    property_order: str | None,
    close_objects: bool | None,
    schema_in_prompt: bool | None,
    examples: Path | None = None,
) -> pb.Task:
    """The task from the options; a usage error for contradicting options."""
    grammars: dict[str, Any] = {
        "json_schema": schema and read_text(schema, "--schema"),
        "regex": regex if regex is None else utf8(regex, "--regex"),
        "ebnf": ebnf and read_text(ebnf, "--ebnf"),
        "choice": pb.Choice(options=[utf8(one, "--choice") for one in choice]) if choice else None,
    }
    given = {kind: value for kind, value in grammars.items() if value is not None}
    if name is not None and prompt is None:
        wishes = (property_order, close_objects, schema_in_prompt)
        if given or system or examples or any(one is not None for one in wishes):
            raise typer.BadParameter("a registered task has its own texts and grammar")
        return pb.Task(name=utf8(name, "--task"))
    if name is not None or prompt is None:
        raise typer.BadParameter("give either --prompt or --task")
    if len(given) > 1:
        raise typer.BadParameter("give at most one of --schema, --regex, --ebnf, --choice")
    if property_order is not None and schema is None:
        raise typer.BadParameter("--property-order needs a --schema")
    if close_objects is not None and schema is None:
        raise typer.BadParameter("--close-objects needs a --schema")
    if schema_in_prompt is not None and schema is None:
        raise typer.BadParameter("--schema-in-prompt needs a --schema")
    order = PROPERTY_ORDERS[property_order]
    grammar = (
        pb.Grammar(**given, property_order=order, close_objects=close_objects) if given else None
    )
    inline = pb.InlineTask(
        system=option_text(system, "--system"),
        user=option_text(prompt, "--prompt"),
        grammar=grammar,
        schema_in_prompt=schema_in_prompt,
    )
    if examples is not None:
        inline.messages.extend(example_messages(examples))
    return pb.Task(inline=inline)


def example_messages(file: Path) -> Iterator[pb.Message]:
    """Read the messages of an example file: a list in YAML or JSON, like ``examples`` of a task
    file."""
    text = read_text(file, "--examples")
    try:
        items = jsontext.decode(text) if file.suffix == ".json" else yamltext.decode(text)
        examples = TypeAdapter(list[Example]).validate_python(items)
        messages, images = read_examples(examples, file.parent)
    except (jsontext.JsonTextError, yamltext.YamlTextError, ExampleError) as error:
        raise typer.BadParameter(f"--examples: {error}") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        what = f"--examples: {place or file.name}: {error.errors()[0]['msg']}"
        raise typer.BadParameter(what) from None
    remaining = iter(images)
    for message in messages:
        parts = [
            pb.Part(text=part.text)
            if isinstance(part, TextPart)
            else pb.Part(image=pb.Image(data=next(remaining).data))
            for part in message.parts
        ]
        yield pb.Message(role=ROLES[message.role], parts=parts)


def asked(work: pb.Task, images: Sequence[pb.Image]) -> dict[str, Any]:
    """The task and images of a request. With examples, the question and its images become a
    message."""
    inline = work.inline
    if not inline.messages:
        return {"task": work, "images": images}
    system = pb.Message(role=pb.ROLE_SYSTEM, parts=[pb.Part(text=inline.system)])
    question = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(image=one) for one in images])
    question.parts.append(pb.Part(text=inline.user))
    messages = [*([system] if inline.system else []), *inline.messages, question]
    given = inline.grammar if inline.HasField("grammar") else None
    return {"task": pb.Task(inline=pb.InlineTask(messages=messages, grammar=given))}


def analyze(
    target: Target,
    images: Sequence[Path],
    options: pb.SamplingOptions,
    accept_empty: bool,
    as_json: bool,
) -> int:
    """Call AnalyzeImage and print one line per field."""
    request = pb.AnalyzeImageRequest(
        images=_read(images), sampling=options, accept_empty=accept_empty
    )

    def call(stub: VisionServiceStub) -> None:
        response = stub.AnalyzeImage(request, timeout=target.timeout_s)
        if as_json:
            return print_json(response)
        for name, value in _as_dict(response.analysis).items():
            echo(f"{name + ':':<13}{value if isinstance(value, str) else _items(value)}")
        _print_footer(response)

    return calling(target, call, images)


def run(
    target: Target,
    work: pb.Task,
    images: Sequence[Path],
    options: pb.SamplingOptions,
    strict: bool,
    stream: bool,
    as_json: bool,
) -> int:
    """Call RunTask or StreamTask and print the text of the answer."""
    fields = {**asked(work, _read(images)), "sampling": options, "strict": strict}

    def call(stub: VisionServiceStub) -> None:
        if stream:
            return _stream(stub, target, pb.StreamTaskRequest(**fields), as_json)
        request = pb.RunTaskRequest(**fields)
        response = stub.RunTask(request, timeout=target.timeout_s)
        if as_json:
            return print_json(response)
        echo(_pretty(response.result))
        _print_footer(response.result)

    return calling(target, call, images)


def tasks(target: Target, as_json: bool) -> int:
    """Call ListTasks and print one line per task."""

    def call(stub: VisionServiceStub) -> None:
        response = stub.ListTasks(pb.ListTasksRequest(), timeout=target.timeout_s)
        if as_json:
            return print_json(response)
        for info in response.tasks:
            kind = info.grammar.WhichOneof("kind") if info.HasField("grammar") else "text"
            kept = WORDS.get(info.enforcement, "?")
            image = "needs an image" if info.needs_image else "image optional"
            echo(f"{info.name:<20} {kind:<12} {kept:<9} {image:<17} {info.description}")

    return calling(target, call)


def health(target: Target, wait_s: float = 0.0) -> int:
    """Call the standard health check; exit code 0 only for SERVING. Repeats the check for
    ``wait_s`` seconds."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    serving = health_pb2.HealthCheckResponse.SERVING
    deadline = time.monotonic() + wait_s
    with target.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            status, problem = None, ""
            try:
                request = health_pb2.HealthCheckRequest()
                status = stub.Check(request, timeout=target.timeout_s).status
            except grpc.RpcError as error:
                problem = explain(error, target.server, target.timeout_s)
            if status == serving or time.monotonic() >= deadline:
                break
            time.sleep(HEALTH_INTERVAL_S)
    if problem:
        typer.echo(problem, err=True)
    else:
        echo(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    return 0 if status == serving else FAILED


def calling(
    target: Target, call: Callable[[VisionServiceStub], None], images: Sequence[Path] = ()
) -> int:
    """Make a call and print an explanation of its error. Returns the exit code. images: files of
    the request's images."""
    with target.channel() as channel:
        try:
            call(VisionServiceStub(channel))
        except grpc.RpcError as error:
            typer.echo(explain(error, target.server, target.timeout_s, images), err=True)
            return FAILED
    return 0


def _stream(
    stub: VisionServiceStub, target: Target, request: pb.StreamTaskRequest, as_json: bool
) -> None:
    open_line = False
    try:
        for event in stub.StreamTask(request, timeout=target.timeout_s):
            if as_json:
                echo(json.dumps(_as_dict(event), ensure_ascii=False))
            elif event.WhichOneof("event") == "delta":
                sys.stdout.write(event.delta)
                sys.stdout.flush()
                open_line = True
            else:
                echo()
                open_line = False
                _print_footer(event.result)
    finally:
        if open_line:
            echo()


def _read(images: Sequence[Path]) -> list[pb.Image]:
    return [pb.Image(data=read_bytes(path, "IMAGE")) for path in images]


def _pretty(result: pb.TaskResult) -> str:
    """Indented JSON, or the unchanged text if parsing would change a number (1e400, 1.10)."""
    if not result.HasField("json"):
        return result.text
    value = json.loads(result.json)
    if json.dumps(value, ensure_ascii=False) != result.json:
        return result.json
    return json.dumps(value, indent=2, ensure_ascii=False)


MAX_WARNINGS = 3
"""The warnings on a schema that are printed with an answer; ``qwen3vl schema`` prints all of
them."""


def _items(values: list[str]) -> str:
    return ", ".join(values) if values else "-"


def _print_footer(response: pb.TaskResult | pb.AnalyzeImageResponse) -> None:
    """Print tokens and time to stderr; stdout has only the answer."""
    usage, timings = response.usage, response.timings
    typer.echo(
        f"\n{response.model}: {usage.prompt_tokens} prompt tokens"
        f" ({usage.image_tokens} of images), {usage.output_tokens} answer tokens,"
        f" {timings.total_seconds:.2f} s",
        err=True,
    )
    if isinstance(response, pb.TaskResult) and response.checked:
        more = len(response.checked) + response.checked_omitted - 1
        typer.echo(
            f"Checked after generation, not by the grammar: {response.checked[0].pointer}"
            + (f" and {more} more" if more else ""),
            err=True,
        )
    if isinstance(response, pb.TaskResult):
        for one in response.warnings[:MAX_WARNINGS]:
            typer.echo(f"Warning: {one.pointer or 'the schema'}: {one.message}", err=True)


def print_json(message: Message) -> None:
    """The whole message as JSON, on stdout."""
    echo(json.dumps(_as_dict(message), indent=2, ensure_ascii=False))


def _as_dict(message: Message) -> dict[str, Any]:
    """All fields in the order of the proto, including empty fields, which MessageToDict puts
    last."""
    values = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, Message) and field.name in values:
            values[field.name] = _as_dict(value)
    return {f.name: values[f.name] for f in message.DESCRIPTOR.fields if f.name in values}
