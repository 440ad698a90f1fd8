"""Explains the errors of calls at the terminal: what is wrong, where, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import grpc

from service.cli.inputs import name_of
from service.client import host_of, proxy_of, read_error

FLAGS = {
    "task.inline.grammar.json_schema": "--schema",
    "task.inline.grammar.regex": "--regex",
    "task.inline.grammar.ebnf": "--ebnf",
    "task.inline.grammar.choice.options": "--choice",
    "task.inline.grammar.choice": "--choice",
    "task.inline.grammar.property_order": "--property-order",
    "task.inline.grammar.close_objects": "--close-objects",
    "task.inline.schema_in_prompt": "--schema-in-prompt",
    "grammar.json_schema": "FILE",
    "grammar.property_order": "--property-order",
    "task.inline.system": "--system",
    "task.inline.user": "--prompt",
    "task.name": "--task",
    "accept_empty": "--accept-empty",
    "raise max_tokens": "raise --max-tokens",
    "which strict requires": "which --strict requires",
    "or leave out strict": "or leave out --strict",
    "schema_in_prompt: false leaves": "--no-schema-in-prompt leaves",
    "ValidateSchema": "`qwen3vl schema`",
}
"""Words of an error -> the same with the option of the command line. Most are paths of request fields."""

TLS = (  # part of gRPC's error text -> explanation
    (
        "CERTIFICATE_VERIFY_FAILED",
        "The certificate of {server} is not signed by --ca (default: QWEN3VL_TLS_CERT). Give the "
        "certificate of its CA.",
    ),
    (
        "Hostname Verification",
        "The certificate of the server is not for the name in {server}. Call it by its own name.",
    ),
    (
        "WRONG_VERSION_NUMBER",
        "{server} does not use TLS. Leave out --ca (QWEN3VL_CA).",
    ),
    (
        "security handshaker",
        "--ca does not hold a certificate in PEM that can be used.",
    ),
)
CONNECTION = (
    (
        "Socket closed",
        "{server} closes the connection; if it speaks TLS, name its CA with --ca, and where it asks "
        "callers for a certificate, give yours with --cert and --key.",
    ),
    (
        "Misformatted domain name",
        "{server} is not an address; write HOST:PORT, for example localhost:50051.",
    ),
    (
        "Domain name not found",
        "There is no host of the name in {server}.",
    ),
)


def explain(
    error: grpc.RpcError, server: str, timeout_s: float, images: Sequence[Path] = ()
) -> str:
    """An explanation of one or more lines.

    server: HOST:PORT that was called. timeout_s: deadline of the call. images: the files that
    became ``images`` of the request, to name the one that is wrong.
    """
    found = read_error(error)
    if not found.reason:
        return _without_reason(found.code, found.message, server, timeout_s)
    lines = [f"{found.code.name} ({found.reason}): {_in_options(found.message, images)}"]
    if len(found.field_violations) > 1:
        lines += [f"  {_in_options(path, images)}: {text}" for path, text in found.field_violations]
    if found.reason.startswith("API_KEY_"):
        lines.append("  Give the key with --api-key, or in QWEN3VL_API_KEY.")
    if found.retry_after_s is not None:
        lines.append(f"  Try again in {found.retry_after_s:.1f} s.")
    if found.request_id:
        lines.append(f"  Request id: {found.request_id}")
    return "\n".join(lines)


def _without_reason(code: grpc.StatusCode, message: str, server: str, timeout_s: float) -> str:
    """Explain an error that a qwen3vl server did not send: no server, a proxy, or another
    program."""
    proxy = proxy_of(server)
    direct = proxy and (
        f"the proxy {proxy.address} that {proxy.variable} names. Check the proxy, or add "
        f"{host_of(server)} to no_proxy to call it directly."
    )
    if code is grpc.StatusCode.UNAVAILABLE:
        for part, meaning in TLS:
            if part in message:
                return meaning.format(server=server)
        if direct:
            refused = re.search(r"HTTP proxy returned response code (\d+)", message)
            answer = f"HTTP status {refused[1]} came" if refused else "No server answers"
            return f"{server}: {answer} through {direct}"
        for part, meaning in CONNECTION:
            if part in message:
                return meaning.format(server=server)
        return (
            f"No server answers at {server}. Start one with `qwen3vl serve`, name another with "
            "--server, or leave the server out with --local."
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        through = f" The call goes through {direct}" if direct else ""
        return (
            f"{server} did not answer within {timeout_s:g} s. Give it longer with --timeout."
            f"{through}"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"What answers at {server} is not a qwen3vl server, or an older one: {message}"
    return f"{code.name}: {message}"


def _in_options(text: str, images: Sequence[Path]) -> str:
    """The text, with request fields replaced by the options and files that set them."""

    def file(found: re.Match[str]) -> str:
        index = int(found[1])
        return name_of(images[index]) if index < len(images) else found[0]

    text = re.sub(r"\bimages\[(\d+)\](?:\.data)?", file, text)
    for path, flag in FLAGS.items():
        text = text.replace(path, flag)
    # All of the prompt: texts and images.
    text = re.sub(r"^task(?:\.inline\.messages)?(?=: |$)", "the prompt", text)
    return re.sub(r"\bsampling\.([a-z_]+)", lambda found: "--" + found[1].replace("_", "-"), text)
