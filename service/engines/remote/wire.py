"""HTTP to one server: connections, TLS, limits. Nothing here knows what is asked.

Redirects are not followed, proxies of the environment and cookies are not used, and bodies are
bounded before they are in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import aiohttp

MAX_BODY_BYTES = 16 << 20
"""Maximum size of an answer in bytes. 1024 tokens are some kilobytes."""
KEEP_ALIVE_S = 4.0
"""Time without use after which a connection is closed. Shorter than the 5 seconds of uvicorn and
llama.cpp, so that no request is sent on a connection that the server is about to close."""
DRAIN_S = 0.02
"""How long the end of a body is waited for before the connection is closed instead."""
SCHEMES = ("http", "https", "grpc", "grpcs")


@dataclass(frozen=True, slots=True)
class WireOptions:
    """How a server is connected to.

    key: API key, sent as a bearer token. ca: PEM file of the authority of the server's certificate;
    None takes those of the system. cert, cert_key: PEM files of this client's certificate.
    connect_s: time limit for making a connection.
    """

    key: str | None = None
    ca: Path | str | None = None
    cert: Path | str | None = None
    cert_key: Path | str | None = None
    connect_s: float = 5.0

    def __repr__(self) -> str:
        """Without the key, which must not get into a log."""
        return f"WireOptions(ca={self.ca}, cert={self.cert})"


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer. headers: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON. Raises ``ValueError`` for anything else."""
        return json.loads(self.body)


class WireError(Exception):
    """The exchange failed after the request was sent, in whole or in part. ``str``: how, for logs."""


class Unreachable(WireError):
    """No connection could be made, so nothing was sent. permanent: trying again does not help, as
    with a certificate that is not trusted."""

    def __init__(self, text: str, *, permanent: bool = False) -> None:
        super().__init__(text)
        self.permanent = permanent


class Silence(WireError):
    """The server sent nothing for too long."""


class TooLarge(WireError):
    """The answer is larger than ``MAX_BODY_BYTES``."""


class Incoming:
    """An answer whose body has not been read yet. Leaving its ``with`` block early closes the
    connection, which is how servers learn that nobody waits any more."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._size = 0

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ``TooLarge``."""
        while piece := await self._piece():
            yield piece

    async def drained(self) -> None:
        """Wait a moment for the end of a body that has been read, so that the connection can be
        used again: the last bytes of a stream often come by themselves."""
        with contextlib.suppress(asyncio.TimeoutError, WireError):
            if not self._response.content.at_eof():
                await asyncio.wait_for(self._read(), DRAIN_S)

    async def _piece(self) -> bytes:
        """The next bytes of the body; empty at its end. Raises ``TooLarge``."""
        if self.headers.get("content-encoding", "identity") != "identity":
            raise WireError("the answer is compressed, which was not asked for")
        piece = await self._read()
        self._size += len(piece)
        if self._size > MAX_BODY_BYTES:
            raise TooLarge(f"the answer is larger than {MAX_BODY_BYTES} bytes")
        return piece

    async def _read(self) -> bytes:
        import aiohttp

        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, RuntimeError) as error:
            raise _broken(error) from None  # RuntimeError: closed meanwhile

    async def body(self) -> bytes:
        """The whole body. Raises ``TooLarge``, before reading where the server tells the size."""
        if int(self.headers.get("content-length", 0)) > MAX_BODY_BYTES:
            raise TooLarge(f"the answer is larger than {MAX_BODY_BYTES} bytes")
        pieces = []
        while piece := await self._piece():
            pieces.append(piece)
        return b"".join(pieces)


class Wire:
    """Connections to one server.

    base: URL without ``/v1``, see `parse_url`. Belongs to the event loop that uses it first.
    """

    def __init__(self, base: str, options: WireOptions) -> None:
        self.base = base
        self._options = options
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        silence_s: float | None,
        limit_s: float | None = None,
        keep: bool = True,
    ) -> AsyncIterator[Incoming]:
        """Send a request; the body of the ``with`` block reads the answer.

        silence_s: maximum time without a byte. limit_s: maximum time of everything. keep: use the
        connection again.
        Raises ``Unreachable`` if nothing was sent, ``Silence``, or ``WireError``.
        """
        import aiohttp

        if self._closed:
            raise Unreachable("the connections are closed")
        timeout = aiohttp.ClientTimeout(
            total=limit_s,
            connect=None,
            sock_connect=self._options.connect_s,
            sock_read=silence_s,
            ceil_threshold=3600,
        )
        headers = {} if body is None else {"content-type": "application/json"}
        if not keep:
            headers["connection"] = "close"
        try:
            response = await self._opened().request(
                method,
                self.base + path,
                data=body,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            )
        except (
            aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, RuntimeError
        ) as error:  # fmt: skip  # RuntimeError: closed meanwhile
            raise _unsent(error) from None
        incoming = Incoming(response)
        try:
            yield incoming
            if keep:
                await incoming.drained()
        finally:
            if keep and response.content.at_eof():
                response.release()
            else:
                response.close()

    async def fetch(
        self, method: str, path: str, body: bytes | None = None, *, limit_s: float
    ) -> Reply:
        """Send a request and read the whole answer."""
        exchange = self.request(method, path, body, silence_s=limit_s, limit_s=limit_s)
        async with exchange as incoming:
            return Reply(incoming.status, incoming.headers, await incoming.body())

    async def close(self) -> None:
        """Close all connections. Calling it twice does no harm."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            options = self._options
            headers = {"accept-encoding": "identity"}
            if options.key is not None:
                headers["authorization"] = f"Bearer {options.key}"
            connector = aiohttp.TCPConnector(
                ssl=tls_context(options) if self.base.startswith("https:") else False,
                limit=0,  # the members bound their requests; health checks never wait
                keepalive_timeout=KEEP_ALIVE_S,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                skip_auto_headers=("user-agent",),
            )
        return self._session


def tls_context(options: WireOptions) -> ssl.SSLContext:
    """TLS with the files of the options. Raises ``OSError`` (``ssl.SSLError``) for a file that
    cannot be used."""
    context = ssl.create_default_context(cafile=options.ca)
    if options.cert is not None:
        context.load_cert_chain(options.cert, options.cert_key, password=_no_password)
    return context


def _no_password() -> str:
    """Return no password; OpenSSL would ask for one at the terminal."""
    return ""


def parse_url(text: str) -> str:
    """The base URL of a server, without a final slash and without ``/v1``.

    Raises ``ValueError`` that says what is wrong.
    """
    url = urlsplit(text.strip())
    if url.scheme not in SCHEMES or not url.hostname:
        raise ValueError(
            f"must be a URL such as http://127.0.0.1:8000 or grpc://127.0.0.1:50051, with one of "
            f"the schemes {', '.join(SCHEMES)}"
        )
    if url.username or url.password:
        raise ValueError("must not contain a name or password; set the key by remote_key_file")
    if url.query or url.fragment:
        raise ValueError("must not have a query or a fragment")
    try:
        url.port  # noqa: B018
    except ValueError:
        raise ValueError("has a port that is not a number from 0 to 65535") from None
    if url.scheme.startswith("grpc"):
        if url.port is None or url.path.strip("/"):
            raise ValueError("must be grpc://HOST:PORT, without a path")
        return f"{url.scheme}://{url.netloc}"
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def _unsent(error: Exception) -> WireError:
    """The error of a request whose answer has not begun."""
    import aiohttp

    if isinstance(
        error, (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError)
    ):
        return Unreachable(f"TLS failed: {_cause(error)}", permanent=True)
    if isinstance(error.__cause__ or error, aiohttp.ClientConnectionResetError):
        return Unreachable(f"the server closed the connection meanwhile: {_cause(error)}")
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return Unreachable(f"no connection: {_cause(error)}")
    if isinstance(error, (ssl.SSLError, FileNotFoundError)):
        return Unreachable(f"TLS cannot be set up: {_cause(error)}", permanent=True)
    return _broken(error)


def _broken(error: Exception) -> WireError:
    import aiohttp

    if isinstance(error, (aiohttp.ServerTimeoutError, asyncio.TimeoutError)):
        return Silence("the server sent nothing for too long")
    return WireError(f"the connection broke: {_cause(error)}")


def _cause(error: Exception) -> str:
    """The name of an error and of what caused it; its text has addresses, and goes to logs only."""
    return f"{type(error).__name__}: {error}"[:300]
