"""Finds the server on this machine that runs with the settings of this environment.

Docker's health check only has the environment of the server. The port, TLS and the name in the
certificate follow from it. Flags of ``qwen3vl serve`` are not visible to it.
"""

from __future__ import annotations

import http.client
import ssl
import time
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import typer

from service.cli import calls
from service.cli.arguments import with_flag
from service.cli.calls import FAILED, Target, credentials
from service.cli.output import echo
from service.settings import Settings, SettingsError, load_settings

ANY = ("0.0.0.0", "::")
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Address of all interfaces -> the one to call from the same machine."""
MAX_TEXT_BYTES = 200
WILDCARD = "*."
KINDS = ("DNS", "IP Address")
"""Kinds of subject alternative names that identify a server."""


def own_health(
    api_key: str | None,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    timeout_s: float,
    wait_s: float,
) -> int:
    """Print the health of the server; exit code 0 only for SERVING.

    Asks the admin port where there is one and no certificates are given: it speaks no TLS and asks
    for no client certificate, so that the health check of a container needs neither.
    """
    settings = _settings()
    if settings.admin_port and ca is cert is key is None:
        return _admin_health(settings, timeout_s, wait_s)
    return calls.health(own_target(api_key, ca, cert, key, timeout_s), wait_s)


def _admin_health(settings: Settings, timeout_s: float, wait_s: float) -> int:
    host = LOOPBACK.get(settings.admin_host.strip("[]"), settings.admin_host.strip("[]"))
    deadline = time.monotonic() + wait_s
    while True:
        code, text = _readiness(host, settings.admin_port or 0, timeout_s)
        if code == HTTPStatus.OK or time.monotonic() >= deadline:
            break
        time.sleep(calls.HEALTH_INTERVAL_S)
    if code is None:
        typer.echo(text, err=True)
        return FAILED
    echo("SERVING" if code == HTTPStatus.OK else f"NOT_SERVING ({text})")
    return 0 if code == HTTPStatus.OK else FAILED


def _readiness(host: str, port: int, timeout_s: float) -> tuple[int | None, str]:
    """Status and text of the readiness page; None and what is wrong where nothing answers."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)  # knows no proxy
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_TEXT_BYTES).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return None, f"No admin port answers at {host}:{port} (--admin-port, QWEN3VL_ADMIN_PORT)."
    finally:
        connection.close()


def own_target(
    api_key: str | None, ca: Path | None, cert: Path | None, key: Path | None, timeout_s: float
) -> Target:
    """The target of calls to this server.

    ca: replaces the certificate of the settings; the server's certificate must then be valid for
    the host that is called. Ends the command with an error message if the settings are invalid.
    """
    settings = _settings()
    try:
        name = certified_name(settings) if settings.tls and ca is None else None
    except SettingsError as error:
        raise _exit(error) from None
    host = "localhost" if settings.host.strip("[]") in ANY else settings.host
    address = settings.model_copy(update={"host": host}).address
    given = credentials(api_key, ca or settings.tls_cert, cert, key)
    return Target(address, replace(given, tls_name=name), timeout_s)


def _settings() -> Settings:
    try:
        return load_settings()
    except SettingsError as error:
        raise _exit(error) from None


def _exit(error: SettingsError) -> typer.Exit:
    """The end of the command, after a line for each setting that is wrong."""
    for line in str(error).splitlines():
        typer.echo(with_flag(line), err=True)
    return typer.Exit(FAILED)


def certified_name(settings: Settings) -> str:
    """A name for which the server's certificate is valid; it may be no name of this machine."""
    try:
        names = _names(str(settings.tls_cert), str(settings.tls_key))
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"tls_cert: cannot be used with tls_key: {error}") from None
    if not names:
        raise SettingsError("tls_cert: the certificate has no subject alternative name")
    name = names[0]
    return f"any.{name.removeprefix(WILDCARD)}" if name.startswith(WILDCARD) else name


def _names(cert: str, key: str) -> list[str]:
    """The names and addresses in a certificate, read by a handshake in memory, because the standard
    library only parses certificates of peers."""
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(cert, key, password=_no_password)
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    there.check_hostname = False
    # The file may lack the issuer's certificate.
    there.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    there.load_verify_locations(cert)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server, client = here.wrap_bio(up, down, server_side=True), there.wrap_bio(down, up)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    found: Any = client.getpeercert() or {}
    names = [str(value) for kind, value in found.get("subjectAltName", ()) if kind in KINDS]
    subject = [pair for part in found.get("subject", ()) for pair in part]
    return names or [str(value) for kind, value in subject if kind == "commonName"]


def _no_password() -> str:
    """Return no password; OpenSSL would ask for one at the terminal."""
    return ""
