"""What the hook of DeepStack costs: time of a call that is of no interest to it, and of one that is.

``python -m benchmarks.deepstack_hook`` from the repository root. The calls go through a small
module that is compiled here and calls an empty function as TurboMind calls its norm.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import Sample, write_results
from lmdeploy_ext.deepstack import library
from lmdeploy_ext.deepstack.binding import Event, Hook

PLAIN = "norm of a step without images, not hooked"
HOOKED = "the same, hooked"
ADDED = "added by the hook"
TOLD = "an event that Python is told of"
NOTES = (
    "A call through the table of a small module that does nothing, as TurboMind makes two in each "
    "decoder layer: a decode step of a model of 36 layers makes 72. Processor time."
)
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


def nanoseconds(call: Callable[[], object], count: int, repeats: int) -> list[float]:
    """Processor time of one of ``count`` calls that ``call`` makes, of each round."""
    times = []
    for _ in range(repeats):
        begin = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - begin) / count)
    return times


def measure(calls: int, repeats: int) -> dict[str, list[float]]:
    """Nanoseconds of each round, by what is measured. Hooked and not hooked take turns."""
    found: dict[str, list[float]] = {name: [] for name in (PLAIN, HOOKED, ADDED, TOLD)}
    with tempfile.TemporaryDirectory() as folder:
        module, hook = build(Path(folder))
        module.norms.argtypes = [ctypes.c_long]

        def ignore(event: Event) -> None:
            """As Python's part does nothing."""

        hook.listen(ignore, [0], 1)
        for _ in range(repeats):
            found[PLAIN] += nanoseconds(lambda: module.norms(calls), calls, 1)
            problem = hook.attach(f"{folder}/module.so")
            if problem is not None:
                raise RuntimeError(problem)
            found[HOOKED] += nanoseconds(lambda: module.norms(calls), calls, 1)
            found[ADDED].append(found[HOOKED][-1] - found[PLAIN][-1])
            found[TOLD] += nanoseconds(lambda: [module.forward() for _ in range(1000)], 2000, 1)
            hook.detach()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="see that it runs")
    parser.add_argument("--calls", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    calls, repeats = (10_000, 2) if options.quick else (options.calls, options.repeats)
    rows = []
    for name, values in measure(calls, repeats).items():
        rows.append({"what": name, "ns a call": Sample(tuple(values)).row(1)})
        print(f"{name:<48} {rows[-1]['ns a call']['median']:>10.2f} ns")
    write_results("deepstack_hook", rows, NOTES)


if __name__ == "__main__":
    main()
