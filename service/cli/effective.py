"""``qwen3vl check --print-settings``: the settings that would be used, and where each comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from service.cli.arguments import flag_of
from service.settings import PREFIX, RENAMED, ServerSettings, Settings

FLAG = "--print-settings"


def print_settings(settings: Settings, arguments: Sequence[str]) -> None:
    """Print one line for each setting: name, value, origin.

    Settings of other engines are left out. A secret is printed as ``**********``.

    arguments: the flags that were given.
    """
    own = settings.engine_settings
    lines = []
    for name in Settings.model_fields:
        if name in ServerSettings.model_fields:
            value = getattr(settings, name)
        elif name in type(own).model_fields:
            value = getattr(own, name)
        else:
            continue
        lines.append((name, "unset" if value is None else str(value), _origin(name, arguments)))
    width = max(len(name) for name, _, _ in lines)
    for name, text, origin in lines:
        typer.echo(f"{name:<{width}}  {text}  ({origin})")


def _origin(name: str, arguments: Sequence[str]) -> str:
    names = [name, *(old for old, new in RENAMED.items() if new == name)]
    flags = {
        flag.replace("--", dashes, 1) for flag in map(flag_of, names) for dashes in ("--", "--no-")
    }
    for argument in arguments:
        if argument.partition("=")[0] in flags:
            return f"flag {argument.partition('=')[0]}"
    variables = {f"{PREFIX}{one}".upper() for one in names}
    for variable in os.environ:
        if variable.upper() in variables:
            return f"variable {variable}"
    return "default"
