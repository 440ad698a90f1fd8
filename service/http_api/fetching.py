"""Fetches images by URL, from the hosts of the operator's list alone.

What a caller can make the server do is small: one GET without credentials, to a public address of a
listed host over TLS with a valid certificate, within limits of size and time. The address that is
checked is the one that is connected to. Redirects are followed by hand, and each is checked like the
first URL.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from service.deadlines import Deadline
from service.errors import ImageError, InvalidRequest
from service.http_api.image_urls import UrlRefused, allowed_url, is_public
from service.http_api.images import RemoteImage
from service.image_hosts import ImageHost
from service.inference.admission import Admission
from service.logs import pairs
from service.observation import current
from service.quotas import Caller
from service.settings import Settings, SettingsError

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
AT_ONCE = 4
"""Images of one request that are fetched at the same time."""
DNS_THREADS = 4
MAX_ADDRESSES = 8
"""Addresses of a host that are tried."""
HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "qwen3vl"}

log = logging.getLogger(__name__)


class _Failed(Exception):
    """An image could not be fetched. The message is for the caller."""


class ImageFetcher:
    """One for a server. Not thread-safe: belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._hosts = settings.allowed_image_hosts
        self._max_bytes = settings.max_image_bytes
        self._max_total = settings.max_message_bytes
        self._limit_s = settings.image_fetch_timeout_s
        # The images of all calls that fetch at the same time fit into the memory for images.
        at_once = max(1, settings.max_encoded_bytes // settings.max_message_bytes)
        self._slots = Admission(at_once, settings.max_queue)
        self._threads = ThreadPoolExecutor(DNS_THREADS, "image-dns")
        try:
            self._tls = ssl.create_default_context(
                cafile=None if settings.image_hosts_ca is None else str(settings.image_hosts_ca)
            )
        except OSError:
            raise SettingsError("image_hosts_ca: must be a PEM file with certificates") from None

    async def fill(
        self, remote: Sequence[RemoteImage], own_bytes: int, deadline: Deadline, caller: Caller
    ) -> None:
        """Fetch the bytes of all images of a request.

        own_bytes: bytes of the other images of the request. Raises ``InvalidRequest`` for the first
        image that cannot be fetched, ``Overloaded`` when too many calls wait.
        """
        urls = [self._allowed(one) for one in remote]
        total = _Total(self._max_total, own_bytes)
        turns = asyncio.Semaphore(AT_ONCE)
        async with self._slots.slot(deadline, caller):
            with current().span("fetch images", images=len(remote)):
                connector = aiohttp.TCPConnector(
                    resolver=_Pinned(self._hosts, self._threads),
                    use_dns_cache=False,
                    ssl=self._tls,
                    limit=AT_ONCE,
                )
                async with aiohttp.ClientSession(
                    connector=connector,
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trust_env=False,
                    auto_decompress=False,
                    headers=HEADERS,
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as session:
                    tasks = [
                        asyncio.create_task(self._one(url, one, session, turns, total))
                        for url, one in zip(urls, remote, strict=True)
                    ]
                    try:
                        await asyncio.gather(*tasks)
                    finally:
                        for task in tasks:
                            task.cancel()
                        await asyncio.wait(tasks)

    def close(self) -> None:
        """End the threads; a lookup that runs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _allowed(self, one: RemoteImage) -> URL:
        try:
            return allowed_url(one.url, self._hosts)
        except UrlRefused as error:
            raise _refused(one.image.field, error) from None

    async def _one(
        self,
        url: URL,
        one: RemoteImage,
        session: aiohttp.ClientSession,
        turns: asyncio.Semaphore,
        total: _Total,
    ) -> None:
        field = one.image.field
        try:
            async with turns:
                limit = Deadline(self._limit_s)
                fetching = self._fetched(url, session, field, total)
                one.image.data = await limit.wait(fetching, self._late)
        except UrlRefused as error:
            raise _refused(field, error) from None
        except (_Failed, aiohttp.ClientError, OSError, ValueError) as error:
            # The URL stays out of the log: its query may be a key.
            kind = type(error.__cause__ or error).__name__
            log.info("image not fetched %s", pairs(host=url.raw_host, error=kind))
            text = f"could not be fetched: {_why(error)}"
            raise ImageError(field, text, reason="IMAGE_FETCH_FAILED") from None

    async def _fetched(
        self, url: URL, session: aiohttp.ClientSession, field: str, total: _Total
    ) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            async with session.get(url, allow_redirects=False) as answer:
                if answer.status not in REDIRECTS:
                    return await self._body(answer, field, total)
                target = answer.headers.get("location", "")
                answer.close()
            try:
                url = allowed_url(str(url.join(URL(target, encoded=True))), self._hosts)
            except UrlRefused as error:
                raise UrlRefused(f"the host redirects, and {error}") from None
        raise _Failed(f"the host redirects more than {MAX_REDIRECTS} times")

    async def _body(self, answer: aiohttp.ClientResponse, field: str, total: _Total) -> bytes:
        if answer.status != 200:
            raise _Failed(f"the host answered with the status {answer.status}")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Failed("the host sent it compressed, which was not asked for")
        if (answer.content_length or 0) > self._max_bytes:
            raise self._too_large(field)
        pieces: list[bytes] = []
        size = 0
        async for piece in answer.content.iter_any():
            size += len(piece)
            if size > self._max_bytes:
                answer.close()
                raise self._too_large(field)
            total.add(len(piece))
            pieces.append(piece)
        return b"".join(pieces)

    def _too_large(self, field: str) -> ImageError:
        return ImageError(
            field,
            f"has more than {self._max_bytes} bytes, which is the most that is allowed",
            reason="IMAGE_TOO_LARGE",
            metadata={"limit": str(self._max_bytes)},
        )

    def _late(self) -> _Failed:
        return _Failed(f"it did not come within {self._limit_s:g} s")


class _Total:
    """Counts the bytes of all images of one request."""

    def __init__(self, limit: int, used: int) -> None:
        self._limit = limit
        self._used = used

    def add(self, size: int) -> None:
        self._used += size
        if self._used > self._limit:
            raise InvalidRequest(
                "images",
                f"have more than {self._limit} bytes together",
                reason="REQUEST_TOO_LARGE",
                metadata={"limit": str(self._limit)},
            )


class _Pinned(AbstractResolver):
    """Looks a host of the list up once, and gives its addresses only if all of them are public."""

    def __init__(self, hosts: Sequence[ImageHost], threads: ThreadPoolExecutor) -> None:
        self._hosts = hosts
        self._threads = threads

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        entry = next(one for one in self._hosts if (one.name, one.port) == (host.lower(), port))
        addresses = [entry.address] if entry.address else await self._looked_up(host)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses[:MAX_ADDRESSES]
        ]

    async def close(self) -> None:
        """Nothing: the threads are those of the fetcher."""

    async def _looked_up(self, host: str) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, addresses_of, host)
        if not all(map(is_public, found)):
            raise UrlRefused("its host has an address that is not public")
        return found


def addresses_of(host: str) -> list[str]:
    """The IP addresses of a host, by the resolver of the system. Raises ``OSError``."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _refused(field: str, error: UrlRefused) -> InvalidRequest:
    return InvalidRequest(field, str(error), reason="IMAGE_URL_REFUSED")


def _why(error: Exception) -> str:
    """What went wrong, without names and addresses."""
    if isinstance(error, _Failed):
        return str(error)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "the certificate of its host is not valid"
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return "its host does not speak TLS as it has to be"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "its host is not known"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "its host cannot be connected to"
    return "its host did not answer as it has to be"
