"""``python -m lmdeploy_ext verify``: compares the installed LMDeploy with the verified release.

`verified.json` records the parts of the verified release that this extension uses: the native
functions that the hook intercepts and the number of call slots of each, the parameters of every
function that the extension imports, overrides or replaces, and the fields of configurations and
outcomes. ``--record`` rewrites the file, after the tests have passed on a new release.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import Enum
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from lmdeploy_ext import host
from lmdeploy_ext.patch import drift

VERIFIED = Path(__file__).with_name("verified.json")
FIELDS = (
    "lmdeploy.messages:TurbomindEngineConfig",
    "lmdeploy.messages:PytorchEngineConfig",
    "lmdeploy.messages:GenerationConfig",
    "lmdeploy.messages:ResponseType",
    "lmdeploy.messages:EventType",
    "lmdeploy.vl.constants:Modality",
)
"""Dataclasses and enumerations whose members are compared."""
NATIVE = "TurboMind's "
_SYMTAB, _RELOCATIONS, _DYNAMIC = 11, 4, 6  # types of sections
_CALLED = {
    (62, 7),
    (62, 6),
    (183, 1026),
    (183, 1025),
}  # relocation types of calls and addresses on x86-64 and AArch64
_FLAGS, _FLAGS_1, _SYMBOLIC, _NOW = 30, 0x6FFFFFFB, 16, 24
_HOOKED = (
    "_ZN9turbomind22invokeMropePositionIdsEPiPKNS_12MropeSegmentEiiP11CUstream_st",
    "_ZN9turbomind24invokeFusedPosEmbedMergeEPvPKvS2_PKiS2_iiNS_8DataTypeEP11CUstream_st",
    "_ZN9turbomind27invokeResidualBiasLayerNormEPvS0_PKvS2_S2_NS_8DataTypeEiifP11CUstream_st",
    "_ZN9turbomind25invokeResidualBiasRMSNormEPvS0_PKvS2_NS_8DataTypeEiifbP11CUstream_st",
)
"""The same as in ``hook.c``; a test compares both."""

Listing = dict[str, dict[str, Any]]
"""Kind of item -> name -> description."""


def run(record: bool) -> int:
    """Print the differences from the verified release. Returns the exit code: 0 for no differences.

    Raises:
        lmdeploy_ext.host.HostUnavailable: LMDeploy is missing, or its native module does not load.
    """
    release = host.installed_version()
    host._check_native_module()
    found = listing()
    if record:
        content = {"lmdeploy": release, **found}
        VERIFIED.write_text(json.dumps(content, indent=1) + "\n")
        print(f"LMDeploy {release} is written down in {VERIFIED}")
        return 0
    verified = json.loads(VERIFIED.read_text())
    known = verified.pop("lmdeploy")
    lines = list(differences(verified, found))
    size = sum(len(part) for part in found.values())
    print(f"LMDeploy {release} against {known}: {size} things compared, {len(lines)} differ")
    for line in lines:
        print(f"  {line}")
    return 1 if lines else 0


def listing() -> Listing:
    """The items of the installed LMDeploy."""
    turbomind = importlib.import_module("lmdeploy.turbomind")
    symbols = Symbols(Path(turbomind._tm.__file__))
    return {
        "functions": symbols.hooked(),
        "parameters": dict(_parameters()),
        "fields": {**dict(_fields()), **dict(_native_fields(turbomind._tm))},
    }


def differences(verified: Mapping[str, Mapping[str, Any]], found: Listing) -> Iterator[str]:
    """One line for each removed, new or changed item."""
    for kind in found:
        old, new = verified.get(kind, {}), found[kind]
        for name in sorted({*old, *new}):
            if name not in new:
                yield f"{name} is gone"
            elif name not in old:
                yield f"{name} is new: {new[name]}"
            elif isinstance(old[name], list) and isinstance(new[name], list):
                yield from _members(name, old[name], new[name])
            elif old[name] != new[name]:
                yield f"{name}: {new[name]}; was: {old[name]}"


def _members(name: str, old: list[str], new: list[str]) -> Iterator[str]:
    gone = [one for one in old if one not in new]
    added = [one for one in new if one not in old]
    if gone or added:
        yield f"{name}: gone: {', '.join(gone) or 'nothing'}; new: {', '.join(added) or 'nothing'}"


def _parameters() -> Iterator[tuple[str, str]]:
    from lmdeploy_ext.patches import PATCHES

    own = {record.target: getattr(record, "signature", None) for record in PATCHES}
    for target, signature in {**host.NAMES, **own}.items():
        problem = drift(target, signature, own=target in host.NAMES)
        yield target, "as expected" if problem is None else problem


def _fields() -> Iterator[tuple[str, list[str] | str]]:
    for target in FIELDS:
        module, _, name = target.partition(":")
        kind = getattr(importlib.import_module(module), name, None)
        if kind is None:
            yield target, "does not exist"
        elif isinstance(kind, type) and issubclass(kind, Enum):
            yield target, [member.name for member in kind]
        else:
            yield target, [field.name for field in dataclasses.fields(kind)]


def _native_fields(module: Any) -> Iterator[tuple[str, list[str]]]:
    for name in dir(module):
        if name.endswith("Config") and not name.startswith("_"):
            kind = getattr(module, name)
            yield NATIVE + name, [one for one in dir(kind) if not one.startswith("_")]


class Symbols:
    """The functions of a native module, read from its file without loading it.

    Args:
        path: a 64-bit, little-endian ELF file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if content[:6] != b"\x7fELF\x02\x01":
                raise ValueError(f"{path.name} is no ELF file of 64 bits")
            self._machine = struct.unpack_from("<H", content, 18)[0]
            begin, size, count = (
                struct.unpack_from("<Q", content, 40)[0],
                *struct.unpack_from("<HH", content, 58),
            )
            headers = [
                struct.unpack_from("<IIQQQQIIQQ", content, begin + size * n) for n in range(count)
            ]
            self._read(content, headers)

    def _read(self, content: mmap, headers: list[tuple[int, ...]]) -> None:
        table = next(header for header in headers if header[1] == _SYMTAB)
        texts = headers[table[6]][4]
        self.names: list[str] = []
        self.defined: set[str] = set()
        for place in range(table[4], table[4] + table[5], 24):
            text, _, _, section = struct.unpack_from("<IBBH", content, place)
            end = content.find(b"\0", texts + text)
            self.names.append(content[texts + text : end].decode(errors="replace"))
            if section:
                self.defined.add(self.names[-1])
        self.slots: Counter[str] = Counter()
        self.sealed = self.bound = False
        for header in headers:
            if header[1] == _RELOCATIONS and headers[header[6]] == table:
                self._relocations(content, header[4], header[5])
            elif header[1] == _DYNAMIC:
                self._dynamic(content, header[4], header[5])

    def _relocations(self, content: mmap, begin: int, size: int) -> None:
        for place in range(begin, begin + size, 24):
            info = struct.unpack_from("<Q", content, place + 8)[0]
            if (self._machine, info & 0xFFFFFFFF) in _CALLED:
                self.slots[self.names[info >> 32]] += 1

    def _dynamic(self, content: mmap, begin: int, size: int) -> None:
        for place in range(begin, begin + size, 16):
            tag, value = struct.unpack_from("<QQ", content, place)
            self.bound |= tag == _SYMBOLIC or (tag == _FLAGS and bool(value & 2))
            self.sealed |= tag == _NOW or (tag == _FLAGS and bool(value & 8))
            self.sealed |= tag == _FLAGS_1 and bool(value & 1)

    def hooked(self) -> dict[str, str]:
        """Description of each function that the hook intercepts."""
        found = {}
        for name in _HOOKED:
            if name in self.defined:
                slots = self.slots[name]
                found[name] = f"exported, called through {slots} slot{'s' if slots != 1 else ''}"
            else:
                close = difflib.get_close_matches(name, self._namesakes(name), n=3, cutoff=0.3)
                found[name] = f"does not exist; there is {', '.join(close) or 'nothing like it'}"
        found["calls among exported functions"] = "bound at link time" if self.bound else "lazy"
        found["table of calls"] = "read-only once loaded" if self.sealed else "writable"
        return found

    def _namesakes(self, name: str) -> list[str]:
        """Exported functions with a similar name."""
        plain = name.partition("invoke")[2].partition("E")[0] or name
        return [one for one in self.defined if plain[:8] in one or plain[-8:] in one]


def main(arguments: list[str]) -> int:
    """The command; see the module."""
    unknown = [word for word in arguments if word != "--record"]
    if unknown:
        print(f"python -m lmdeploy_ext verify: there is no option {unknown[0]}", file=sys.stderr)
        return 2
    return run("--record" in arguments)
