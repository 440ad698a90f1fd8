"""TLS credentials of the server's port. Renewed certificate files are used for new connections."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)


def server_credentials(settings: Settings) -> grpc.ServerCredentials:
    """Credentials for TLS, or for mTLS if ``tls_client_ca`` is set. Raises ``SettingsError`` for
    unusable files."""
    try:
        files = CertificateFiles(settings)
    except ssl.SSLError as error:
        raise SettingsError(
            "tls_cert, tls_key, tls_client_ca: must be PEM files, and tls_key the key of tls_cert, "
            "without a password"
        ) from error
    except OSError as error:
        raise SettingsError(f"tls_cert, tls_key, tls_client_ca: {error.strerror}") from error
    return grpc.dynamic_ssl_server_credentials(
        files.current,
        files.renewed,  # type: ignore[arg-type]  # None means unchanged; the stub forgot it
        require_client_authentication=settings.tls_client_ca is not None,
    )


class CertificateFiles:
    """The certificate files and their timestamps when they were last read."""

    def __init__(self, settings: Settings) -> None:
        assert settings.tls_cert is not None
        assert settings.tls_key is not None
        self._cert: Path = settings.tls_cert
        self._key: Path = settings.tls_key
        self._client_ca = settings.tls_client_ca
        self._stamp = self._stamped()
        self.current = self._read()

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration if a file has changed, else None. gRPC calls this before each
        handshake."""
        try:
            stamp = self._stamped()
            if stamp == self._stamp:
                return None
            self.current = self._read()
            self._stamp = stamp
        except OSError as error:  # a renewal is incomplete: keep the old certificates
            log.warning("certificate files cannot be used now: %s", error.strerror)
            return None
        log.info("certificate files were renewed")
        return self.current

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files; with invalid files gRPC would only fail to listen.

        Raises ``OSError``, also for a key that does not belong to the certificate or that needs a
        password.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key, password=lambda: "")
        if self._client_ca is not None:
            context.load_verify_locations(self._client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._cert.read_bytes())],
            root_certificates=self._client_ca.read_bytes() if self._client_ca else None,
        )

    def _stamped(self) -> tuple[int, ...]:
        paths = (self._cert, self._key, self._client_ca)
        return tuple(path.stat().st_mtime_ns for path in paths if path is not None)
