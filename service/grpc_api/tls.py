"""TLS credentials of the server's port. Renewed certificate files are used for new connections."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path

import grpc

from service.reload import Reloader, stamp
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)


def server_credentials(settings: Settings, reloader: Reloader) -> grpc.ServerCredentials:
    """Credentials for TLS, or for mTLS if ``tls_client_ca`` is set. Raises ``SettingsError`` for
    unusable files."""
    files = CertificateFiles(settings)
    reloader.watch(files.paths, files.look)
    return grpc.dynamic_ssl_server_credentials(
        files.current,
        files.renewed,  # type: ignore[arg-type]  # None means unchanged; the stub forgot it
        require_client_authentication=settings.tls_client_ca is not None,
    )


class CertificateFiles:
    """The certificate files and their state when they were last read.

    gRPC looks at them before each handshake, in a thread of its own, so that the next connection has
    the new files. The reloader looks at them as well, so that the log names files that cannot be
    used before a caller connects.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.tls_cert is not None
        assert settings.tls_key is not None
        self._cert: Path = settings.tls_cert
        self._key: Path = settings.tls_key
        self._client_ca = settings.tls_client_ca
        paths = (self._cert, self._key, self._client_ca)
        self.paths = tuple(path for path in paths if path is not None)
        self._lock = threading.Lock()
        self._stamp = stamp(self.paths)
        self.current = self._read()
        self._given = self.current

    def look(self) -> None:
        """Read the files again if one has changed.

        Raises ``SettingsError`` where they cannot be used; the old ones then stay in use.
        """
        with self._lock:
            found = stamp(self.paths)
            if found == self._stamp:
                return
            self.current = self._read()
            self._stamp = found
        log.info("certificate files were renewed")

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration if gRPC does not have it yet, else None. gRPC calls this before each
        handshake."""
        try:
            self.look()
        except SettingsError:  # a renewal is incomplete; if that lasts, the reloader logs it
            return None
        if self.current is self._given:
            return None
        self._given = self.current
        return self.current

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files; with invalid files gRPC would only fail to listen.

        Raises ``SettingsError``, also for a key that does not belong to the certificate or that needs a
        password.
        """
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._cert, self._key, password=lambda: "")
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
            return grpc.ssl_server_certificate_configuration(
                [(self._key.read_bytes(), self._cert.read_bytes())],
                root_certificates=self._client_ca.read_bytes() if self._client_ca else None,
            )
        except ssl.SSLError as error:
            raise SettingsError(
                "tls_cert, tls_key, tls_client_ca: must be PEM files, and tls_key the key of "
                "tls_cert, without a password"
            ) from error
        except OSError as error:
            raise SettingsError(f"tls_cert, tls_key, tls_client_ca: {error.strerror}") from error
