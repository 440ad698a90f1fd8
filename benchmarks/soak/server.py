"""``qwen3vl serve`` with a probe: what only the process itself can count, one JSON line a second.

``python -m benchmarks.soak.server FILE [arguments of serve]``. The command is the real one; the probe
runs on its event loop.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.cli import serving
from service.engines.common.grammar import GrammarCache
from service.engines.reference.vision import FeatureSource
from service.runtime import FrontEnd, Runtime
from service.structured_output.pool import GrammarPool

PROBE_S = 1.0
HEAP_EVERY = 5
"""Probes between two looks at the heap, which takes the locks of malloc."""
MIB = 1 << 20


class _Heap(ctypes.Structure):
    """``struct mallinfo2`` of glibc: bytes of all arenas together."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap() -> dict[str, float]:
    """Memory of malloc: in use (mapped blocks too), and free but kept. Empty without glibc."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return {}
    ask.restype = _Heap
    found = ask()
    return {
        "heap_used_mib": (found.uordblks + found.hblkhd) / MIB,
        "heap_mapped_mib": found.hblkhd / MIB,
        "heap_free_mib": found.fordblks / MIB,
        "python_blocks": sys.getallocatedblocks(),
    }


class Caches:
    """Sizes of the bounded caches of the process."""

    def __init__(self) -> None:
        kinds = (GrammarPool, GrammarCache, FeatureSource)
        gc.unfreeze()  # of frozen objects, gc knows only the number
        found = [one for one in gc.get_objects() if isinstance(one, kinds)]
        gc.freeze()
        self._pools = [one for one in found if isinstance(one, GrammarPool)]
        self._grammars = [one for one in found if isinstance(one, GrammarCache)]
        self._features = [one for one in found if isinstance(one, FeatureSource)]

    def sizes(self) -> dict[str, float]:
        """In MiB."""
        return {
            "analyses_mib": sum(one.size_bytes for one in self._pools) / MIB,
            "grammars_mib": sum(one.size_bytes for one in self._grammars) / MIB,
            "features_mib": sum(one._size for one in self._features) / MIB,
        }


def counts(runtime: Runtime) -> dict[str, float]:
    """Time, tasks of the event loop, and what calls hold."""
    budgets = runtime.budgets
    return {
        "time": time.time(),
        "tasks": len(asyncio.all_tasks()),
        "calls": runtime.lifecycle.calls_in_flight,
        "slots": budgets.admission.active,
        "queued": budgets.admission.waiting,
        "encoded_bytes": budgets.encoded.held,
    }


async def report(runtime: Runtime, path: Path) -> None:
    """Append the counts to the file until cancelled."""
    caches = Caches()
    memory: dict[str, float] = {}
    probes = 0
    with path.open("a", buffering=1) as file:
        while True:
            if probes % HEAP_EVERY == 0:
                memory = {**heap(), **caches.sizes()}
            probes += 1
            file.write(json.dumps({**counts(runtime), **memory}) + "\n")
            await asyncio.sleep(PROBE_S)


def main() -> int:
    path, *arguments = sys.argv[1:]
    serve = serving.serve

    async def serve_with_probe(
        runtime: Runtime, front_ends: Sequence[FrontEnd], *, on_ready: Callable[[], None]
    ) -> None:
        probes: list[asyncio.Task[None]] = []

        def ready() -> None:
            on_ready()
            probes.append(asyncio.create_task(report(runtime, Path(path))))

        await serve(runtime, front_ends, on_ready=ready)

    serving.serve = serve_with_probe
    return serving.serve_command(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
