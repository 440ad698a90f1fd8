"""Which URLs of images are fetched, and which addresses are connected to.

A URL is compared with the list and nothing else: no lookup and no connection comes before that.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from yarl import URL

from service.image_hosts import ImageHost

MAX_URL = 8192
NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
            # Of 2000::/3, to which IPv6 is limited below: Teredo and other protocols, 6to4, examples.
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        ),
    )
)
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
"""What is assigned to the Internet. Addresses with an IPv4 address inside, as those of NAT64, are not
in it."""
UNPRINTABLE = re.compile(r"[^\x21-\x7e]|\\")


class UrlRefused(ValueError):
    """A URL that is not fetched. The message says why, for the caller."""


def allowed_url(text: str, hosts: Sequence[ImageHost]) -> URL:
    """A URL of a host of the list. Raises ``UrlRefused``.

    The URL that is returned is the one that is requested: it is not parsed a second time.
    """
    if len(text) > MAX_URL:
        raise UrlRefused(f"the URL is longer than {MAX_URL} characters")
    if UNPRINTABLE.search(text):
        raise UrlRefused("the URL has blanks or characters beyond ASCII; escape them")
    try:
        url = URL(text.partition("#")[0], encoded=True)  # as it is: signatures are made of it
        host, port = (url.raw_host or "").lower(), url.port
    except ValueError:
        raise UrlRefused("the URL cannot be read") from None
    if url.scheme != "https":
        raise UrlRefused("only https URLs are fetched by this server")
    if url.raw_user is not None or url.raw_password is not None or "@" in url.raw_authority:
        raise UrlRefused("the URL must have no user and no password")
    if not any((one.name, one.port) == (host, port) for one in hosts):
        raise UrlRefused("this server fetches no images from the host and port of the URL")
    return url


def is_public(text: str) -> bool:
    """Whether an IP address is one of the Internet, and of no network inside it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # with a scope, such as fe80::1%eth0
        return False
    if address.version == 6 and address not in PUBLIC_IPV6:
        return False
    return not any(address in network for network in NOT_PUBLIC)
