"""Reads settings from flags and the environment; errors name the flags."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import get_args

import typer
from pydantic import SecretStr
from pydantic_settings import SettingsError as ParseError

from service.cli.settings_help import print_help
from service.settings import RENAMED, Settings, SettingsError, load_settings

PREFIX = "QWEN3VL_"
UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (?P<flag>\S+)")


def read_settings(command: str, arguments: Sequence[str]) -> Settings | None:
    """Read the settings. Prints an error for each invalid setting and returns None.

    ``--help`` prints the list of settings and ends the process with exit code 0.
    """
    if {"-h", "--help"} & set(arguments):
        print_help(command)
        raise typer.Exit
    try:
        _refuse_secrets(arguments)
        return load_settings(
            _cli_parse_args=[_current(argument) for argument in arguments],
            _cli_prog_name=f"qwen3vl {command}",
            _cli_kebab_case=True,
            _cli_implicit_flags=True,
            _cli_hide_none_type=True,
            _cli_exit_on_error=False,
        )
    except ParseError as error:
        problems = [_parse_problem(str(error))]
    except SettingsError as error:
        problems = [with_flag(line) for line in str(error).splitlines()]
    for problem in problems:
        typer.echo(f"qwen3vl {command}: {problem}", err=True)
    typer.echo(f"`qwen3vl {command} --help` lists the settings.", err=True)
    return None


def _refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise ``SettingsError`` for a key in a flag, which every user of the machine can read."""
    given = {argument.partition("=")[0] for argument in arguments}
    for name, field in Settings.model_fields.items():
        if SecretStr in (field.annotation, *get_args(field.annotation)) and flag_of(name) in given:
            variable = f"{PREFIX}{name.upper()}"
            raise SettingsError(f"{name}: is secret; set the variable {variable}, not the flag")


def with_flag(line: str) -> str:
    """``max_batch: too many`` as ``--max-batch (QWEN3VL_MAX_BATCH): too many``."""
    name, colon, problem = line.partition(": ")
    if not colon or name not in Settings.model_fields:
        return line
    return f"{flag_of(name)} ({PREFIX}{name.upper()}): {problem}"


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def _current(argument: str) -> str:
    """The argument with the current name of its flag. An old name still works, with a warning."""
    flag, equals, value = argument.partition("=")
    for old, new in RENAMED.items():
        if flag == flag_of(old):
            typer.echo(f"{flag} is now called {flag_of(new)}.", err=True)
            return flag_of(new) + equals + value
    return argument


def _parse_problem(text: str) -> str:
    text = text.removeprefix("error parsing CLI: ")
    found = UNKNOWN_FLAG.search(text)
    if found is None:
        return text
    flag = found["flag"].partition("=")[0]
    return f"there is no setting {flag}.{_close(flag, [flag_of(n) for n in Settings.model_fields])}"


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f" Did you mean {close[0]}?" if close else ""
