"""Mutants that change nothing that a user could see: ``equivalent.yaml`` lists them with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

LIST = Path(__file__).with_name("equivalent.yaml")


@dataclass(frozen=True)
class Entry:
    """Mutants that are equivalent, and why.

    file: the one that they change, or None for every file. was, becomes: the changed lines, without
    indentation; without a file ``was`` is a regular expression that they contain. operator: a regular
    expression that matches the name of Cosmic Ray's operator.
    """

    why: str
    file: str | None = None
    was: str = ""
    becomes: str | None = None
    operator: str = ".*"

    def speaks_of(self, file: str, operator: str, was: str, becomes: str) -> bool:
        found = re.search(self.was, was) is not None
        here = found if self.file is None else (self.file, self.was) == (file, was)
        same = self.becomes is None or self.becomes == becomes
        return here and same and re.fullmatch(self.operator, operator) is not None


def entries() -> list[Entry]:
    return [Entry(**one) for one in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def reason(every: list[Entry], file: str, operator: str, was: str, becomes: str) -> str | None:
    """Why a mutant is equivalent, if somebody judged so."""
    return next((one.why for one in every if one.speaks_of(file, operator, was, becomes)), None)


def changed_lines(diff: str) -> tuple[str, str]:
    """The lines of a diff before and after, without indentation."""
    lines = diff.splitlines()
    was = [line[1:].strip() for line in lines if re.match(r"-(?!--)", line)]
    becomes = [line[1:].strip() for line in lines if re.match(r"\+(?!\+\+)", line)]
    return "\n".join(was), "\n".join(becomes)
