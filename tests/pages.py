"""What pages of the documentation hold: blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """Bodies of the blocks of code in this language; "" for those that name none."""
    return [found["body"] for found in FENCE.finditer(text) if found["language"] == language]


def section(text: str, name: str) -> str:
    """What stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``."""
    (found,) = re.findall(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    return str(found)


def without(text: str, name: str) -> str:
    """The page without that section."""
    return text.replace(section(text, name), "")


def commands(text: str) -> list[list[str]]:
    """Words of every ``$ …`` line of the console blocks, without comments and line breaks."""
    lines = "\n".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def own_commands(text: str) -> list[list[str]]:
    """Words of every ``$ qwen3vl …`` line behind the name."""
    return [words[1:] for words in commands(text) if words[0] == "qwen3vl"]


def standard_input(words: Sequence[str]) -> tuple[list[str], bytes | None]:
    """A command without ``< FILE``, and the bytes of that file."""
    if "<" not in words:
        return list(words), None
    *before, _, file = words
    return before, (ROOT / file).read_bytes()
