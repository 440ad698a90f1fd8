"""Ports for servers that a test starts later, or twice on the same port."""

from __future__ import annotations

import random
import socket

PORTS = range(15_000, 32_000)
"""Below those from which the system takes the ports of outgoing connections and of port 0, any of
which another test may get between two uses."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # somebody listens there
                continue
        return port
