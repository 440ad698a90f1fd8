"""The operator's list of hosts from which images are fetched that callers name by a URL."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

HTTPS_PORT = 443
LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"(?=.{{1,253}}$)({LABEL}\.)*[a-z]([a-z0-9-]{{0,61}}[a-z0-9])?")
"""Names of hosts; the last label begins with a letter, so that no number is a name."""


@dataclass(frozen=True, slots=True)
class ImageHost:
    """An entry of the list. address: that of the host, in place of a lookup; any address is good."""

    name: str
    port: int = HTTPS_PORT
    address: str = ""


def parse_hosts(text: str) -> tuple[ImageHost, ...]:
    """``name[:port][=address], …`` -> entries. Raises ``ValueError``, which names the entry."""
    return tuple(_entry(one.strip()) for one in text.split(",") if one.strip())


def _entry(text: str) -> ImageHost:
    place, equals, address = text.partition("=")
    name, colon, port = place.strip().lower().partition(":")
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{text!r} is not a host; write the name of a host, such as images.example.org, "
            "host:port or host=address"
        )
    if colon and not (port.isdecimal() and 0 < int(port) <= 65_535):
        raise ValueError(f"{text!r} has no port from 1 to 65535 behind the colon")
    if equals:
        try:
            address = str(ipaddress.ip_address(address.strip()))
        except ValueError:
            raise ValueError(f"{text!r} has no IP address behind the equals sign") from None
    return ImageHost(name, int(port) if colon else HTTPS_PORT, address)
