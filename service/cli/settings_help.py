"""``qwen3vl serve --help``: lists every setting as a flag, in groups, in the style of the other
commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from service.settings import PREFIX, Settings, setting_groups

INTRODUCTION = {
    "serve": "Run the gRPC server until SIGTERM or Ctrl-C.",
    "check": "Check the settings of `serve`, the tasks, the port, the model and one warm-up. With "
    "--print-settings: print each setting, its value and where the value comes from, and end.",
}


def print_help(command: str) -> None:
    """Print the help page of a command that takes settings."""
    app = typer.Typer(
        add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.command(
        help=f"{INTRODUCTION[command]}\n\nEach setting is also an environment variable: "
        f"--max-batch is {PREFIX}MAX_BATCH. Flags win over variables."
    )(_with_flags())
    app(["--help"], prog_name=f"qwen3vl {command}", standalone_mode=False)


def _with_flags() -> Callable[..., None]:
    """A function with one parameter per setting, from whose signature typer builds the help
    page."""

    def page(**settings: object) -> None:
        raise NotImplementedError("the page is only printed")

    parameters, titles = [], setting_groups()
    for name, field in Settings.model_fields.items():
        option = _option(name, field, titles[name])
        kind = bool if _is_switch(field) else str
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_shown(name, field.default),
                annotation=Annotated[kind | None, option],
            )
        )
    page.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    page.__annotations__ = {one.name: one.annotation for one in parameters}
    return page


def _option(name: str, field: FieldInfo, title: str) -> Any:
    switch = _is_switch(field)
    on = switch and field.default is True
    return typer.Option(
        ("--no-" if on else "--") + name.replace("_", "-"),
        metavar=None if switch else _metavar(_without_none(field.annotation), field),
        help=("Turn off: " if on else "") + _text(field),
        show_default=field.default is not None and not switch,
        rich_help_panel=title,
    )


def _text(field: FieldInfo) -> str:
    """The description of a setting and its allowed names."""
    kind = _without_none(field.annotation)
    names = f" One of {', '.join(get_args(kind))}." if get_origin(kind) is Literal else ""
    return (field.description or "") + names


def _is_switch(field: FieldInfo) -> bool:
    return _without_none(field.annotation) is bool


def _without_none(annotation: Any) -> Any:
    """``X`` of ``X | None``."""
    if isinstance(annotation, UnionType) or get_origin(annotation) is not None:
        given = [one for one in get_args(annotation) if one is not type(None)]
        if get_origin(annotation) is not Literal and len(given) == 1:
            return given[0]
    return annotation


def _metavar(kind: Any, field: FieldInfo) -> str:
    """The placeholder for a value, with its range."""
    if get_origin(kind) is Literal:
        return "NAME"
    low, high = (_bound(field, *marks) for marks in (("ge", "gt"), ("le", "lt")))
    name = {int: "INT", float: "FLOAT", Path: "PATH"}.get(kind, "TEXT")
    if low and high:
        return f"{name} {low}..{high}"
    return f"{name} from {low}" if low else name


def _bound(field: FieldInfo, inclusive: str, exclusive: str) -> str:
    """A bound as text; brackets mark an exclusive bound."""
    for one in field.metadata:
        if hasattr(one, inclusive):
            return f"{getattr(one, inclusive)}"
        if hasattr(one, exclusive):
            return f"({getattr(one, exclusive)})"
    return ""


def _shown(name: str, default: Any) -> Any:
    """A default as a user would type it; sizes also in a larger unit."""
    if not name.endswith("_bytes") or default is None:
        return default
    unit, size = ("MiB", 1024**2) if default >= 1024**2 else ("KiB", 1024)
    return f"{default} ({default / size:g} {unit})"
