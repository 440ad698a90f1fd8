"""The admin port: liveness, readiness, metrics and version over plain HTTP, without keys.

For probes, Prometheus and people on the machine. It answers before the model is loaded, while the
server drains and until everything else is closed, and whether or not the other ports speak TLS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from service import metrics
from service.lifecycle import Lifecycle, Phase
from service.settings import Settings, SettingsError
from service.web import WebLimits, WebServer

LIMITS = WebLimits(connections=128, header_bytes=16 * 1024)


class AdminServer:
    """One port with four pages. ``start``, then ``stop``, however far it came.

    lifecycle: tells the phase. state: what the server is doing at this moment, for ``/metrics``.
    version: what is known of it, for ``/version``.
    """

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        state: Callable[[], Awaitable[metrics.ServerState]],
        version: Callable[[], Mapping[str, str]],
    ) -> None:
        self._lifecycle = lifecycle
        self._state = state
        self._version = version
        self._address = (settings.admin_host, settings.admin_port or 0)
        self._rendering = asyncio.Lock()
        app = Starlette(
            routes=[
                Route("/livez", self._livez),
                Route("/readyz", self._readyz),
                Route("/healthz", self._readyz),
                Route("/metrics", self._metrics),
                Route("/version", self._tell_version),
            ]
        )
        app.router.redirect_slashes = False
        self._web = WebServer(app, host=self._address[0], port=self._address[1], limits=LIMITS)

    @property
    def port(self) -> int:
        """The port that is bound."""
        return self._web.port

    async def start(self) -> None:
        """Listen. Raises ``SettingsError`` when that is not possible."""
        try:
            await self._web.start()
        except OSError:
            host, port = self._address
            raise SettingsError(
                f"admin_port: cannot listen on {host}:{port}; it is taken, or the address is not of "
                "this host"
            ) from None

    async def stop(self) -> None:
        """Close the port."""
        await self._web.stop()

    async def _livez(self, request: Request) -> Response:
        """The process and its event loop work: without the loop there is no answer."""
        return PlainTextResponse("ok\n", headers=FRESH)

    async def _readyz(self, request: Request) -> Response:
        phase = self._lifecycle.phase
        status = 200 if phase is Phase.SERVING else 503
        return PlainTextResponse(f"{phase.value}\n", status, headers=FRESH)

    async def _metrics(self, request: Request) -> Response:
        accepted = ",".join(request.headers.getlist("accept"))
        async with self._rendering:  # one thread at a time, however many ask
            text, kind = await asyncio.to_thread(metrics.page, await self._state(), accepted)
        return Response(text, headers={"content-type": kind, **FRESH})

    async def _tell_version(self, request: Request) -> Response:
        return JSONResponse(dict(self._version()), headers=FRESH)


FRESH = {"cache-control": "no-store"}
