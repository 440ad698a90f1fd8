"""The commands and their options; ``calls``, ``serving`` and ``check`` implement them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service import __version__
from service.cli.inputs import STDIN

app = typer.Typer(
    help="Structured vision inference with Qwen3-VL over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT_SERVER = "localhost:50051"


def _address(text: str | None) -> str | None:
    """Check a server address. Without this check, gRPC would use port 443 by default, and take a
    URL for a host name."""
    if text is None:
        return None
    if re.match(r"https?://", text) or not re.search(r":\d+$|^unix:.", text):
        raise typer.BadParameter(f"{text!r} is not HOST:PORT, for example {DEFAULT_SERVER}")
    port = re.search(r":(\d+)$", text)
    if port and not text.startswith("unix:") and not 1 <= int(port[1]) <= 65_535:
        raise typer.BadParameter(f"{port[1]} in {text!r} is not a port; ports are 1 to 65535")
    return text


def _input(value: Any) -> Any:
    """Check input files, where - is standard input. A usage error, before any file is read."""
    for path in value if isinstance(value, (list, tuple)) else [value]:
        if path is None or str(path) == STDIN:
            continue
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder, not a file")
        if not path.exists():
            raise typer.BadParameter(f"there is no file {path}")
        if not os.access(path, os.R_OK):
            raise typer.BadParameter(f"{path} cannot be read by this user")
    return value


Server = Annotated[
    str,
    typer.Option(
        envvar="QWEN3VL_SERVER",
        metavar="HOST:PORT",
        help="Server to call.",
        show_default=True,
        callback=_address,
    ),
]


def _api_key(text: str | None) -> str | None:
    """Check an API key: for other characters, gRPC's own error is not helpful. The error does not
    show the key."""
    text = None if text is None else text.strip()  # the line break at the end of a key file
    if text is not None and not re.fullmatch(r"[ -~]+", text):
        raise typer.BadParameter("is empty or has characters other than printable ASCII")
    return text


Key = Annotated[
    str | None,
    typer.Option(
        envvar="QWEN3VL_API_KEY",
        help="API key, where the server asks for one.",
        callback=_api_key,
    ),
]
Ca = Annotated[
    Path | None,
    typer.Option(
        envvar="QWEN3VL_CA", exists=True, dir_okay=False, help="CA certificate, PEM; turns TLS on."
    ),
]
Cert = Annotated[
    Path | None,
    typer.Option(
        envvar="QWEN3VL_CERT",
        exists=True,
        dir_okay=False,
        help="Your own certificate, PEM, where the server asks callers for one.",
    ),
]
CertKey = Annotated[
    Path | None,
    typer.Option(
        "--key", envvar="QWEN3VL_KEY", exists=True, dir_okay=False, help="Private key of --cert."
    ),
]
Local = Annotated[
    bool, typer.Option("--local", help="Run the model in this process; no server is called.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the whole response as JSON.")]
Images = Annotated[
    list[Path],
    typer.Argument(
        callback=_input,
        metavar="IMAGE…",
        help="JPEG, PNG or WebP files; - is standard input.",
    ),
]
Prompt = Annotated[str | None, typer.Option(help="Text of the user turn; - is standard input.")]
System = Annotated[str, typer.Option(help="Text of the system turn; - is standard input.")]
SchemaFile = Annotated[
    Path | None,
    typer.Option(callback=_input, help="File with a JSON schema; - is standard input."),
]
Regex = Annotated[str | None, typer.Option(help="The whole answer matches it.")]
Ebnf = Annotated[
    Path | None,
    typer.Option(callback=_input, help="File with an EBNF grammar; - is standard input."),
]
Choice = Annotated[list[str] | None, typer.Option(help="An allowed answer; give it several times.")]
Examples = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="File with a list of examples (user, images, assistant), YAML or JSON.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse a grammar that does not enforce every keyword.")
]
Order = Annotated[
    Literal["declared", "any"] | None,
    typer.Option(help="Order of properties: as declared, or any. Default: the server's."),
]
Closed = Annotated[
    bool | None,
    typer.Option(
        "--close-objects/--leave-objects-open",
        help="Forbid properties that the schema does not list. Default: the server's setting.",
    ),
]
Shown = Annotated[
    bool | None,
    typer.Option(
        "--schema-in-prompt/--no-schema-in-prompt",
        help="Show the schema to the model. Default: the server's, or the model's.",
    ),
]
Timeout = Annotated[float, typer.Option(min=0.001, help="Deadline of the call, in seconds.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; up to 2.")]
TopP = Annotated[float | None, typer.Option(help="Above 0, at most 1.")]
TopK = Annotated[int | None, typer.Option(help="At least 1.")]
Penalty = Annotated[float | None, typer.Option(help="Above 0, at most 10; 1 is off.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of tokens in the answer; default 1024, or less where the context is nearly full."
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"qwen3vl {__version__}")
        raise typer.Exit


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Run the gRPC server. `qwen3vl serve --help` lists the settings."""
    from service.cli.serving import serve_command

    raise typer.Exit(serve_command(context.args))


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    add_help_option=False,
)
def check(context: typer.Context) -> None:
    """Check settings, tasks, port, model and one warm-up; takes the settings of `serve`. With
    --print-settings, print the settings in effect."""
    from service.cli.check import check_command
    from service.cli.serving import progress

    raise typer.Exit(check_command(context.args, progress))


@app.command()
def analyze(
    images: Images,
    server: Server = DEFAULT_SERVER,
    local: Local = False,
    as_json: AsJson = False,
    accept_empty: Annotated[
        bool, typer.Option(help="Accept an answer without any information about the image.")
    ] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    timeout: Timeout = 300.0,
    api_key: Key = None,
    ca: Ca = None,
    cert: Cert = None,
    key: CertKey = None,
) -> None:
    """Describe one image, or several keyframes of one scene, in nine typed fields."""
    from service.cli import calls, inputs

    inputs.check_stdin(images=images)
    sampling = calls.sampling(temperature, top_p, top_k, repetition_penalty, seed, max_tokens)
    target = calls.Target(server, calls.credentials(api_key, ca, cert, key), timeout, local)
    raise typer.Exit(calls.analyze(target, images, sampling, accept_empty, as_json))


@app.command()
def run(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            callback=_input,
            metavar="[IMAGE…]",
            help="JPEG, PNG or WebP files; - is standard input.",
        ),
    ] = None,
    prompt: Prompt = None,
    task: Annotated[str | None, typer.Option(help="A registered task instead of a prompt.")] = None,
    system: System = "",
    schema: SchemaFile = None,
    regex: Regex = None,
    ebnf: Ebnf = None,
    choice: Choice = None,
    property_order: Order = None,
    close_objects: Closed = None,
    schema_in_prompt: Shown = None,
    examples: Examples = None,
    strict: Strict = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print text as it is generated.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    local: Local = False,
    as_json: AsJson = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    thinking: Annotated[
        bool,
        typer.Option(
            "--thinking",
            help="Let a model with optional thinking think first; without a grammar only.",
        ),
    ] = False,
    timeout: Timeout = 300.0,
    api_key: Key = None,
    ca: Ca = None,
    cert: Cert = None,
    key: CertKey = None,
) -> None:
    """Run a prompt, or a registered task, on images. The answer matches the grammar, or the call
    fails."""
    from service.cli import calls, inputs

    inputs.check_stdin(images=images, prompt=prompt, system=system, schema=schema, ebnf=ebnf)
    work = calls.task(
        prompt,
        task,
        system,
        schema,
        regex,
        ebnf,
        choice or [],
        property_order,
        close_objects,
        schema_in_prompt,
        examples,
    )
    sampling = calls.sampling(
        temperature, top_p, top_k, repetition_penalty, seed, max_tokens, thinking or None
    )
    target = calls.Target(server, calls.credentials(api_key, ca, cert, key), timeout, local)
    raise typer.Exit(calls.run(target, work, images or [], sampling, strict, stream, as_json))


@app.command()
def schema(
    file: Annotated[
        Path,
        typer.Argument(
            callback=_input,
            metavar="FILE",
            help="A JSON schema; - is standard input.",
        ),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Print every keyword and every rewrite.")
    ] = False,
    stage: Annotated[
        Literal["normalized", "ir", "grammar", "report", "prompt"] | None,
        typer.Option(help="Compile the schema in this process and print a stage of the compiler."),
    ] = None,
    property_order: Order = None,
    close_objects: Closed = None,
    server: Server = DEFAULT_SERVER,
    local: Local = False,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
    api_key: Key = None,
    ca: Ca = None,
    cert: Cert = None,
    key: CertKey = None,
) -> None:
    """Show whether the grammar enforces a schema, and which keywords are only checked; exit code 0
    or 3. With --stage, print what the compiler makes of it; no server is called."""
    from service.cli import calls
    from service.cli.schema import print_stage, validate

    if stage is not None:
        raise typer.Exit(print_stage(file, stage, property_order, bool(close_objects)))
    target = calls.Target(server, calls.credentials(api_key, ca, cert, key), timeout, local)
    raise typer.Exit(validate(target, file, property_order, close_objects, everything, as_json))


@app.command()
def tasks(
    server: Server = DEFAULT_SERVER,
    local: Local = False,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
    api_key: Key = None,
    ca: Ca = None,
    cert: Cert = None,
    key: CertKey = None,
) -> None:
    """List the tasks that the server offers."""
    from service.cli import calls

    raise typer.Exit(
        calls.tasks(
            calls.Target(server, calls.credentials(api_key, ca, cert, key), timeout, local), as_json
        )
    )


@app.command()
def health(
    server: Annotated[
        str | None,
        typer.Option(
            envvar="QWEN3VL_SERVER",
            metavar="HOST:PORT",
            help="Server to call; default: the one that the variables of this environment "
            "(QWEN3VL_PORT, QWEN3VL_TLS_CERT, …) start on this machine.",
            callback=_address,
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for SERVING, while it starts or loads.")
    ] = 0.0,
    timeout: Timeout = 3.0,
    api_key: Key = None,
    ca: Ca = None,
    cert: Cert = None,
    key: CertKey = None,
) -> None:
    """Print the health of the server; exit code 0 only when it is SERVING."""
    from service.cli import calls, own

    if server is None:
        raise typer.Exit(own.own_health(api_key, ca, cert, key, timeout, wait))
    target = calls.Target(server, calls.credentials(api_key, ca, cert, key), timeout)
    raise typer.Exit(calls.health(target, wait))


@app.command()
def discover(
    urls: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[URL…]",
            help="Servers, such as http://127.0.0.1:8080 or grpc://HOST:PORT; without one, "
            "VLLM_MLX_ENDPOINT and the usual ports of this machine.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Describe this model only; default: every model.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of the servers; default: found out.")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option(help="Try out with short requests what a server does not tell."),
    ] = True,
    as_json: AsJson = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Maximum time to try out one model, in seconds.")
    ] = 600.0,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QWEN3VL_REMOTE_KEY",
            help="API key of the servers. Not sent to servers that were not named.",
            callback=_api_key,
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="CA of their certificates, PEM; default: the system's.",
        ),
    ] = None,
) -> None:
    """Describe model servers: kind, version, context, images, grammars and options, each with its
    evidence."""
    from service.cli import discover as servers

    request = servers.Request(model, kind, probe, timeout)
    raise typer.Exit(servers.discover(urls or [], request, api_key, ca, as_json))


@app.command()
def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="Parquet files, a folder of images, or WebDataset tars: a path, or a URI such as "
            "s3://bucket/folder.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="Folder of the answers, Parquet files. A run that was stopped goes on where it was.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="A registered task, such as image-analysis.")
    ] = None,
    prompt: Prompt = None,
    system: System = "",
    schema: SchemaFile = None,
    regex: Regex = None,
    ebnf: Ebnf = None,
    choice: Choice = None,
    property_order: Order = None,
    close_objects: Closed = None,
    schema_in_prompt: Shown = None,
    examples: Examples = None,
    strict: Strict = False,
    accept_empty: Annotated[
        bool, typer.Option(help="Accept analyses without any information about the image.")
    ] = False,
    input_kind: Annotated[
        Literal["parquet", "images", "tars"] | None,
        typer.Option(help="What IN has; default: by the names of its files."),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="Parquet column with the bytes of images; default: the only such one."),
    ] = None,
    path_column: Annotated[
        str | None, typer.Option(help="Parquet column with paths or URIs of image files instead.")
    ] = None,
    images_root: Annotated[
        str | None, typer.Option(help="Folder of relative paths; default: that of IN.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Parquet column that the answers keep; give it several times. Default: all but the "
            "image."
        ),
    ] = None,
    shard_rows: Annotated[
        int,
        typer.Option(
            min=1, help="Rows of one file of OUT; a run that is killed repeats up to a few."
        ),
    ] = 512,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of `qwen3vl serve`, such as engine=lmdeploy; give it several times. "
            "Variables QWEN3VL_… apply, too.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, or auto; default: Ray on this machine alone."),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(min=1, help="Engines; default: as many as the GPUs allow, one without GPUs."),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each engine; default: what the engine needs."),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Processors of each engine.")] = 1.0,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Answer a task for each of many images, on this machine or on a Ray cluster. An image that cannot
    be used is a row with an error."""
    from service.cli import batch as batches
    from service.cli import calls, inputs
    from service.pb.qwen3vl.v1 import vision_pb2 as pb

    inputs.check_stdin(prompt=prompt, system=system, schema=schema, ebnf=ebnf)
    work = calls.task(
        prompt,
        task,
        system,
        schema,
        regex,
        ebnf,
        choice or [],
        property_order,
        close_objects,
        schema_in_prompt,
        examples,
    )
    sampling = calls.sampling(temperature, top_p, top_k, repetition_penalty, seed, max_tokens)
    request = pb.RunTaskRequest(**calls.asked(work, []), sampling=sampling, strict=strict)
    raise typer.Exit(
        batches.batch(
            source,
            output,
            request,
            accept_empty=accept_empty,
            chosen=settings or [],
            input_options={
                "kind": input_kind,
                "image_column": image_column,
                "path_column": path_column,
                "root": images_root,
                "keep": None if keep is None else tuple(keep),
            },
            rows_per_shard=shard_rows,
            resources={"address": address, "actors": actors, "cpus": cpus, "gpus": gpus},
        )
    )
