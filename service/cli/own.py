"""The server that the settings of the environment start on this machine, as a caller finds it.

Docker's health check runs with the environment of the server and nothing else: the port, TLS and the
name in the certificate follow from there. Flags of ``qwen3vl serve`` are not seen here.
"""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from service.cli.arguments import with_flag
from service.cli.calls import FAILED, Target, credentials
from service.settings import Settings, SettingsError, load_settings

ANY = ("0.0.0.0", "::")
WILDCARD = "*."
KINDS = ("DNS", "IP Address")
"""Of subject alternative names: those that stand for a server."""


def own_target(
    api_key: str | None, ca: Path | None, cert: Path | None, key: Path | None, timeout_s: float
) -> Target:
    """Where a call to this server goes.

    ca: in place of the certificate that the settings name, which must then be for the host called.
    Ends the command with a readable error where the settings are wrong.
    """
    try:
        settings = load_settings()
        name = certified_name(settings) if settings.tls and ca is None else None
    except SettingsError as error:
        for line in str(error).splitlines():
            typer.echo(with_flag(line), err=True)
        raise typer.Exit(FAILED) from None
    host = "localhost" if settings.host.strip("[]") in ANY else settings.host
    address = settings.model_copy(update={"host": host}).address
    given = credentials(api_key, ca or settings.tls_cert, cert, key)
    return Target(address, replace(given, tls_name=name), timeout_s)


def certified_name(settings: Settings) -> str:
    """A name that the certificate of the server is for; it need not be one of this machine."""
    try:
        names = _names(str(settings.tls_cert), str(settings.tls_key))
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"tls_cert: cannot be used with tls_key: {error}") from None
    if not names:
        raise SettingsError("tls_cert: the certificate is for no name")
    name = names[0]
    return f"any.{name.removeprefix(WILDCARD)}" if name.startswith(WILDCARD) else name


def _names(cert: str, key: str) -> list[str]:
    """Names and addresses in a certificate, from a handshake in memory: the standard library reads
    certificates of peers only."""
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(cert, key, password=_no_password)
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    there.check_hostname = False
    there.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its issuer need not be in the file
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
    """OpenSSL would ask a terminal."""
    return ""
