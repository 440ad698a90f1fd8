"""What the metrics of calls cost: the latency of text calls with and without them.

Two servers on the fake engine take turns under the same load, as in ``server_overhead``.

``python -m benchmarks.call_metrics`` from the repository root.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from benchmarks.common import environment, markdown, write_results
from benchmarks.server_overhead import compare, request, server

CALLERS = (1, 8)
TARGET = 0.08


def measure(seconds: float, rounds: int) -> list[dict[str, Any]]:
    rows = []
    with server("uncounted") as without, server("ours") as counted:
        servers = {"off": without, "on": counted}
        for callers in CALLERS:
            loads = asyncio.run(compare(servers, request(None), callers, seconds, rounds))
            off, on = loads["off"], loads["on"]
            rows.append(
                {
                    "callers": callers,
                    "off p50 ms": off.percentile_ms(50),
                    "on p50 ms": on.percentile_ms(50),
                    "p50 on / off": on.percentile_ms(50) / off.percentile_ms(50),
                    "off p99 ms": off.percentile_ms(99),
                    "on p99 ms": on.percentile_ms(99),
                    "off CPU ms": off.cpu_ms,
                    "on CPU ms": on.cpu_ms,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it runs")
    arguments = parser.parse_args()
    seconds, rounds = (0.2, 2) if arguments.quick else (1.0, 15)
    rows = measure(seconds, rounds)
    more = rows[0]["p50 on / off"] - 1
    notes = (
        f"Text only, 1 caller: {more:+.1%} (target at most {TARGET:+.0%}, "
        f"{'met' if more <= TARGET else 'missed'}). {rounds} rounds of {seconds:g} s, the servers "
        "taking turns; latencies over all calls. Client and servers share the machine."
    )
    write_results("call_metrics", rows, notes)
    print(environment())
    print(markdown(rows))
    print(notes)


if __name__ == "__main__":
    main()
