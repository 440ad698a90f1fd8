"""The front end for HTTP: a port with OpenAI's API on a ``Runtime``."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.routing import BaseRoute

from service.errors import InvalidRequest
from service.http_api.answers import dumps
from service.http_api.app import build_app
from service.http_api.errors import body_of
from service.http_api.reading import BODY
from service.lifecycle import Phase
from service.logs import pairs
from service.runtime import Runtime
from service.settings import SettingsError
from service.unread import DROP_AFTER_S
from service.web import WebLimits, WebServer, server_tls

if TYPE_CHECKING:
    from service.http_api.fetching import ImageFetcher

log = logging.getLogger(__name__)

BAD_REQUEST = dumps(
    body_of(
        InvalidRequest(BODY, "this is not HTTP/1.1 as it has to be", reason="MALFORMED_REQUEST")
    )
)
"""The answer to bytes that are no HTTP request."""


class HttpFrontEnd:
    """HTTP on a runtime. See ``FrontEnd``.

    routes: further ones on the same port, tried before those of OpenAI's API.
    """

    def __init__(self, runtime: Runtime, routes: Sequence[BaseRoute] = ()) -> None:
        assert runtime.settings.http_port is not None
        self._runtime = runtime
        self._routes = routes
        self._server: WebServer | None = None
        self._fetcher: ImageFetcher | None = None
        self._port = runtime.settings.http_port

    @property
    def port(self) -> int:
        """The TCP port that is bound."""
        return self._port if self._server is None else self._server.port

    @property
    def place(self) -> str:
        """Where it listens, for people."""
        scheme = "https" if self._runtime.settings.tls else "http"
        host = self._runtime.settings.http_host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def enter(self, phase: Phase) -> None:
        """Nothing: the health pages read the phase when they are asked."""

    async def start(self) -> None:
        """Listen. Raises ``SettingsError`` when the port or the certificate cannot be used."""
        settings = self._runtime.settings
        if settings.image_hosts:
            from service.http_api.fetching import ImageFetcher

            self._fetcher = ImageFetcher(settings)
        self._server = WebServer(
            build_app(self._runtime, self._routes, self._fetcher),
            host=settings.http_host,
            port=self._port,
            tls=self._tls(),
            # A call that nobody reads is dropped by itself, with an entry in the log, before that.
            limits=WebLimits(write_s=settings.inference_timeout_s + 2 * DROP_AFTER_S),
            bad_request=BAD_REQUEST,
        )
        try:
            await self._server.start()
        except OSError:
            address = f"{settings.http_host}:{self._port}"
            raise SettingsError(
                f"http_port: cannot listen on {address}; it is taken, or the address is not of "
                "this host"
            ) from None
        log.info("listening %s", pairs(http=settings.http_host, port=self.port, tls=settings.tls))

    async def serve(self) -> None:
        """Raises an error when the server has ended without being told to."""
        assert self._server is not None
        await self._server.serve()

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            await self._server.stop()
        if self._fetcher is not None:
            self._fetcher.close()

    def _tls(self) -> ssl.SSLContext | None:
        settings = self._runtime.settings
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        try:
            return server_tls(settings.tls_cert, settings.tls_key)
        except OSError as error:  # also of the certificate and of the key
            raise SettingsError(
                "tls_cert, tls_key: must be PEM files, and tls_key the key of tls_cert, without a "
                "password"
            ) from error
