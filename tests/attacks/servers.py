"""What the scripts of this folder share: a server of their own, or one that runs already."""

from __future__ import annotations

import argparse
import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.service.harness import separate

KEY = "the key of an ordinary caller"
OTHER_KEY = "the key of a caller who sends too much"
SERVICE = b"/qwen3vl.v1.VisionService/"


@dataclass(frozen=True)
class Target:
    """A server under attack. process: None where it is not of this machine."""

    host: str
    port: int
    key: str | None
    process: psutil.Process | None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What an ordinary caller sends."""
        return (("x-api-key", self.key),) if self.key else ()

    def memory_mib(self) -> float:
        """Resident memory of the server; 0 where it cannot be seen."""
        return self.process.memory_info().rss / 2**20 if self.process else 0.0

    def reset_peak(self) -> None:
        """Let ``peak_mib`` begin anew. Linux only."""
        if self.process:
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak_mib(self) -> float:
        """Maximum resident memory since ``reset_peak``, as the kernel counts it: an attacker that keeps
        its own process busy cannot miss it. 0 where it cannot be seen."""
        if not self.process:
            return 0.0
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--server", help="HOST:PORT of a running server; default: one of its own")
    parser.add_argument("--key", help="API key of the running server")
    parser.add_argument("--pid", type=int, help="process of the running server, for its memory")
    return parser


@contextmanager
def target(
    options: argparse.Namespace, *, keys: bool = False, delay_s: float = 0.0, pieces: int = 16
) -> Iterator[Target]:
    """The server that the options name, or one on the fake engine in a process of its own."""
    if options.server:
        host, _, port = options.server.rpartition(":")
        yield Target(host, int(port), options.key, options.pid and psutil.Process(options.pid))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {}
        if keys:
            path = Path(folder) / "keys"
            named = (("ordinary", KEY), ("other", OTHER_KEY))
            lines = (f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n" for name, key in named)
            path.write_text("".join(lines))
            environment["QWEN3VL_API_KEYS_FILE"] = str(path)
        with separate(grace_s=30, delay_s=delay_s, pieces=pieces, environment=environment) as (
            process,
            address,
        ):
            host, _, port = address.rpartition(":")
            yield Target(host, int(port), KEY if keys else None, psutil.Process(process.pid))
