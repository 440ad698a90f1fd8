"""Finds the server on this machine that runs with the settings of this environment.

Docker's health check only has the environment of the server. The port, TLS and the name in the
certificate follow from it. Flags of ``qwen3vl serve`` are not visible to it.
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
"""Kinds of subject alternative names that identify a server."""


def own_target(
    api_key: str | None, ca: Path | None, cert: Path | None, key: Path | None, timeout_s: float
) -> Target:
    """The target of calls to this server.

    ca: replaces the certificate of the settings; the server's certificate must then be valid for
    the host that is called. Ends the command with an error message if the settings are invalid.
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
