"""Who calls: API keys, kept as SHA-256 digests and compared in constant time.

A key is a long random string (``openssl rand -hex 32``), so that a plain digest cannot be guessed.
Its line in the file: ``name:`` and ``printf %s "$KEY" | sha256sum``, and behind it the quotas of the
key, such as ``concurrent=4``. Empty lines and lines that start with ``#`` are skipped.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path

from service.errors import Unauthenticated
from service.quotas import ANONYMOUS, UNBOUNDED, Caller, Quota, read_quota
from service.settings import Settings, SettingsError

LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-fA-F]{64})(?P<quota>\s.*)?")

current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)
"""Who makes the call that the current task works for."""


class Access:
    """Who may call a server, by its settings: one for all front ends. Lives on one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys: ApiKeys | None = None

    def read(self) -> None:
        """Read the files of the settings. Raises ``SettingsError`` for what cannot be used."""
        path = self._settings.api_keys_file
        self._keys = ApiKeys.read(path, self._settings.quota) if path is not None else None

    def caller(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """Who sends a call with this metadata, or with these headers; names are in lower case.

        Raises ``Unauthenticated`` for a call that is not allowed.
        """
        return ANONYMOUS if self._keys is None else self._keys.caller(metadata)


class ApiKeys:
    """The keys that a server knows, and whose they are.

    callers: SHA-256 of a key -> the caller who has it.
    """

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        self._callers = dict(callers)

    @classmethod
    def read(cls, path: Path, default: Quota = UNBOUNDED) -> ApiKeys:
        """Read a file of keys. default: quotas of lines that set none.

        Raises ``SettingsError`` that names the line which is wrong.
        """
        found: dict[bytes, Caller] = {}
        names: set[str] = set()
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError):
            raise SettingsError(
                f"api_keys_file: {path} cannot be read as UTF-8 text by this user"
            ) from None
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            parts = LINE.fullmatch(text)
            if parts is None or parts["name"] in names:
                raise SettingsError(
                    f"api_keys_file: line {number} must be 'name:SHA-256 of the key in hex', "
                    "with a name that no other line has"
                )
            try:
                quota = read_quota((parts["quota"] or "").split(), default)
            except ValueError as error:
                raise SettingsError(f"api_keys_file: line {number}: {error}") from None
            names.add(parts["name"])
            found.setdefault(bytes.fromhex(parts["digest"]), Caller(parts["name"], quota))
        if not found:
            raise SettingsError("api_keys_file: there is no key in the file")
        return cls(found)

    def caller(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """Who has the key in ``authorization: Bearer …`` or ``x-api-key``.

        Raises ``Unauthenticated`` when there is none or it is not known.
        """
        key = _key(metadata)
        if not key:
            raise Unauthenticated(
                "This server asks for an API key: send metadata 'authorization: Bearer KEY' "
                "or 'x-api-key: KEY'.",
                reason="API_KEY_MISSING",
            )
        digest = hashlib.sha256(key.encode()).digest()
        # Every digest is compared, so that the time tells nothing about which one came close.
        matches = [caller for known, caller in self._callers.items() if _same(known, digest)]
        if not matches:
            raise Unauthenticated("The API key is not known to this server.")
        return matches[0]


def _same(known: bytes, given: bytes) -> bool:
    return hmac.compare_digest(known, given)


def _key(metadata: Mapping[str, str | bytes]) -> str:
    bearer = str(metadata.get("authorization", ""))
    scheme, _, token = bearer.partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return str(metadata.get("x-api-key", ""))
