"""Callers with one key, in a process of their own, so that they do not delay the callers who are timed.

``python -m benchmarks.attack.flood HOST:PORT KEY CALLERS SECONDS``, with a request as stdin. Prints how many
calls were answered, and the refusals by reason.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.attack.servers import Server
from service.pb.qwen3vl.v1 import vision_pb2 as pb

ROOT = Path(__file__).parents[2]


@contextmanager
def flooding(
    server: Server, caller: str, count: int, message: pb.RunTaskRequest, seconds: float
) -> Iterator[dict[str, Any]]:
    """Callers who call again and again while the body runs, for at most so many seconds.

    Yields a dict that has ``answered`` and ``refusals`` after the body, which begins with the first call.
    """
    words = [server.address, server.keys[caller], str(count), str(seconds)]
    found: dict[str, Any] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.attack.flood", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(message.SerializeToString())
        process.stdin.close()
        process.stdout.readline()
        try:
            yield found
        finally:
            found.update(json.loads(process.stdout.read()))


def main() -> None:
    from benchmarks.attack.sharing import callers

    address, key, count, seconds = sys.argv[1:]
    server = Server(address, None, Path(), {"": key})  # type: ignore[arg-type]  # only its address
    message = pb.RunTaskRequest.FromString(sys.stdin.buffer.read())
    print("calling", flush=True)
    seen = asyncio.run(callers(server, "", int(count), message, float(seconds)))
    print(json.dumps({"answered": len(seen.seconds), "refusals": seen.refusals}), flush=True)


if __name__ == "__main__":
    main()
