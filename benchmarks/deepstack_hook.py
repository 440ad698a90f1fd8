"""What the hook of DeepStack costs: time of a call that is of no interest to it, and of one that is.

``python -m benchmarks.deepstack_hook`` from the repository root. The calls go through a small
module that is compiled here and calls an empty function as TurboMind calls its norm.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lmdeploy_ext.deepstack import library
from lmdeploy_ext.deepstack.binding import Event, Hook

SYMBOLS = {
    "MROPE": "_ZN9turbomind22invokeMropePositionIdsEPiPKNS_12MropeSegmentEiiP11CUstream_st",
    "MERGE": "_ZN9turbomind24invokeFusedPosEmbedMergeEPvPKvS2_PKiS2_iiNS_8DataTypeEP11CUstream_st",
    "LN": "_ZN9turbomind27invokeResidualBiasLayerNormEPvS0_PKvS2_S2_NS_8DataTypeEiifP11CUstream_st",
    "RMS": "_ZN9turbomind25invokeResidualBiasRMSNormEPvS0_PKvS2_NS_8DataTypeEiifbP11CUstream_st",
}
MODULE = """
#include <stdbool.h>
typedef void *P; typedef const void *C;
void MROPE(int *a, C b, int c, int d, P s) {}
void MERGE(P a, C b, C c, const int *d, C e, int f, int g, int h, P s) {}
void LN(P a, P b, C c, C d, C e, int f, int g, int h, float i, P s) {}
void RMS(P a, P b, C c, C d, int e, int f, int g, float h, bool i, P s) {}
void set_up(void) { MROPE(0, 0, 1, 9, 0); LN(0, 0, 0, 0, 0, 0, 0, 0, 0, 0); }
void norms(long n) { for (long i = 0; i < n; ++i) RMS(0, 0, 0, 0, 8, 48, 20, 0.25f, true, 0); }
void forward(void) { MERGE(0, 0, 0, 0, 0, 4, 4, 7, 0); norms(2); }
"""


def build(folder: Path) -> tuple[ctypes.CDLL, Hook]:
    """The module, and a hook library that is not attached yet."""
    (folder / "module.c").write_text(MODULE)
    names = [f"-D{key}={name}" for key, name in SYMBOLS.items()]
    command = [library.find_compiler(), "-shared", "-fPIC", "-O2", "-fno-inline", *names]
    module = folder / "module.so"
    subprocess.run([*command, str(folder / "module.c"), "-o", str(module)], check=True)
    library.build(folder / "hook.so")
    return ctypes.CDLL(str(module)), Hook(folder / "hook.so")


def nanoseconds(call: Callable[[], object], count: int, repeats: int) -> float:
    """Median time of one of ``count`` calls that ``call`` makes."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / count)
    return statistics.median(times)


def measure(calls: int, repeats: int) -> dict[str, float]:
    """Nanoseconds by what is measured."""
    with tempfile.TemporaryDirectory() as folder:
        module, hook = build(Path(folder))
        module.norms.argtypes = [ctypes.c_long]

        def norms() -> float:
            return nanoseconds(lambda: module.norms(calls), calls, repeats)

        def ignore(event: Event) -> None:
            """As Python's part does nothing."""

        plain = norms()
        problem = hook.attach(f"{folder}/module.so")
        if problem is not None:
            raise RuntimeError(problem)
        hook.listen(ignore, [0], 1)
        hooked = norms()
        told = nanoseconds(lambda: [module.forward() for _ in range(1000)], 2000, repeats)
        hook.detach()
    return {
        "norm of a step without pictures, not hooked": plain,
        "the same, hooked": hooked,
        "added by the hook": hooked - plain,
        "an event that Python is told of": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    found = measure(options.calls, options.repeats)
    rows = [{"what": name, "ns": round(value, 2)} for name, value in found.items()]
    for row in rows:
        print(f"{row['what']:<48} {row['ns']:>10}")


if __name__ == "__main__":
    main()
