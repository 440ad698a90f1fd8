"""Imports xgrammar without the heavy packages that it imports.

torch and transformers take seconds and 700 MB, and a process that only compiles grammars needs
neither: this module replaces them by stubs with the few names that xgrammar's modules use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


def import_xgrammar() -> Any:
    """The module xgrammar. Only for a process that never needs torch or transformers.

    Raises ImportError, AttributeError or TypeError if a release of xgrammar needs more than the
    stubs.
    """
    absent = ("torch", "transformers", "cuda", "sentencepiece", "tiktoken")
    # None makes an import fail; xgrammar's own dependencies all handle that.
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    importlib.import_module("tvm_ffi")
    names: dict[str, dict[str, Any]] = {
        "torch": dict.fromkeys(("Tensor", "LongTensor", "FloatTensor", "int32"), object)
        | {"tensor": lambda *_, **__: None},
        "transformers": dict.fromkeys(
            ("PreTrainedTokenizerBase", "PreTrainedTokenizerFast", "LogitsProcessor"), object
        ),
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
    return importlib.import_module("xgrammar")
