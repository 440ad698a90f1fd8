"""``lmdeploy serve api_server`` on the host runtime: the real command in a process of its own."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.host_runtime.runner import ROOT, ChildFailed, Mode, end, environment, tail
from tests.ports import free_port

LMDEPLOY = (str(Path(sys.executable).with_name("lmdeploy")),)
"""The plain command, as a user types it."""
OPTIONS = (
    "--session-len", "512", "--max-batch-size", "8", "--cache-max-entry-count", "0.1",
    "--max-prefill-token-num", "256", "--dtype", "bfloat16", "--backend", "turbomind",
)  # fmt: skip
CALL_TIMEOUT_S = 120


@dataclass(frozen=True)
class Server:
    """A server that answers. ``url`` is its base address; ``log`` gathers what it prints."""

    host: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def call(
        self, path: str, content: Any = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> tuple[int, str]:
        """One HTTP call, POST where there is content; returns the status and the body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            if content is None:
                connection.request("GET", path)
            else:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", path, json.dumps(content), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()


@contextmanager
def serve(
    checkpoint: Path,
    folder: Path,
    *options: str,
    command: Sequence[str] = LMDEPLOY,
    mode: Mode = "null",
    timeout_s: float = 240,
    extra: Mapping[str, str] | None = None,
    **variables: Any,
) -> Iterator[Server]:
    """Serve a checkpoint until the context ends.

    Args:
        folder: takes the server's log.
        options: more options of ``lmdeploy serve api_server``, behind `OPTIONS`.
        command: what to start in place of ``lmdeploy``, for example ``python -m lmdeploy_ext``.
        timeout_s: until the server answers for the first time.
        mode, extra, variables: see `tests.host_runtime.runner.environment`.

    Raises:
        ChildFailed: the server ended, or does not answer in time; the text has its output.
    """
    port, log = free_port(), folder / "server.log"
    arguments = [*command, "serve", "api_server", str(checkpoint), "--server-name", "127.0.0.1"]
    arguments += ["--server-port", str(port), *OPTIONS, *options]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            arguments, env=environment(mode, extra=extra, **variables), cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    server = Server("127.0.0.1", port, log, process)
    try:
        _wait_until_healthy(server, timeout_s)
        yield server
    except BaseException:
        print(tail(log))  # pytest shows it with the failed test
        raise
    finally:
        end(process)


def _wait_until_healthy(server: Server, timeout_s: float) -> None:
    last = time.monotonic() + timeout_s
    while time.monotonic() < last:
        if server.process.poll() is not None:
            raise ChildFailed(
                f"the server ended with {server.process.returncode}\n{tail(server.log)}"
            )
        try:
            if server.call("/health", timeout_s=5)[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise ChildFailed(f"the server does not answer after {timeout_s:g} s\n{tail(server.log)}")
