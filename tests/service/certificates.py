"""Certificates made for a test by the openssl command."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


def openssl(arguments: str, folder: Path) -> None:
    """Run openssl in a folder, with arguments as one writes them in a shell."""
    subprocess.run(
        ["openssl", *shlex.split(arguments)], cwd=folder, check=True, capture_output=True
    )


@dataclass(frozen=True)
class Authority:
    """A certificate authority for one test."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Authority:
        """Make its certificate; skips the test where there is no openssl."""
        if shutil.which("openssl") is None:
            pytest.skip("the openssl command makes the certificates, and it is not installed")
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        openssl("ecparam -name prime256v1 -out curve", folder)
        openssl(
            "req -x509 -newkey ec:curve -nodes -days 1 -keyout ca.key -out ca.pem "
            "-subj '/CN=test authority'",
            folder,
        )
        return cls(folder)

    @property
    def cert(self) -> Path:
        return self.folder / "ca.pem"

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for localhost, signed by this authority."""
        openssl(
            f"req -newkey ec:curve -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}",
            self.folder,
        )
        openssl(
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 "
            f"-out {name}.pem -extfile names",
            self.folder,
        )
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"
