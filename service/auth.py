"""Authentication of callers, by API keys and by names of client certificates.

A key is a long random string (``openssl rand -hex 32``), so that a plain SHA-256 digest cannot be
guessed. Its line in the file of keys: ``name:`` and ``printf %s "$KEY" | sha256sum``. A line in the file of
certificate names is the name, in quotes where it has blanks. Behind that, both have quotas such as
``concurrent=4``. Empty lines and lines that start with ``#`` are skipped.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

from service.errors import Unauthenticated
from service.logs import pairs
from service.quotas import ANONYMOUS, UNBOUNDED, Caller, Quota, read_quota
from service.settings import Settings, SettingsError

LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-fA-F]{64})(?P<quota>\s.*)?")
ODD = re.compile(r"[^!#-&(-<>-~]")
"""What a name may not have in a log line: blanks, quotes, ``=`` and all that is not ASCII."""
NAME_LIMIT = 200
SHOWN_NAMES = 20

log = logging.getLogger(__name__)

Changed = Callable[[set[str], set[str]], object]
current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)
"""The caller of the call that the current asyncio task works for."""


class Access:
    """The callers that a server accepts, from its settings; shared by all front ends.

    A thread may reload the files while calls are checked.

    Attributes:
        changed: told the names of callers that a file adds and removes, in the thread that reads it.
    """

    def __init__(self, settings: Settings) -> None:
        self.changed: Changed = _nobody_listens
        self._settings = settings
        self._keys: ApiKeys | None = None
        self._names: CertificateNames | None = None

    @property
    def mutual_tls(self) -> bool:
        """Whether callers have certificates; ``caller`` then needs their names."""
        return self._settings.tls_client_ca is not None

    @property
    def files(self) -> list[tuple[Path, Callable[[], None]]]:
        """The files that may change -> the function that reloads each."""
        settings = self._settings
        found = (
            (settings.api_keys_file, self._read_keys),
            (settings.tls_client_names_file, self._read_names),
        )
        return [(path, read) for path, read in found if path is not None]

    def read(self) -> None:
        """Read the files for the first time. Raises ``SettingsError`` for an unusable file."""
        for _, read in self.files:
            read()

    def caller(
        self, metadata: Mapping[str, str | bytes], certificate: Sequence[str] | None = None
    ) -> Caller:
        """The caller of a call with this metadata or these headers, whose names are in lower case.

        certificate: names in the caller's certificate, common name first; None for a transport
        without client certificates. If keys are required as well, the key determines the caller.
        Raises ``Unauthenticated`` for a call that is not allowed.
        """
        caller = ANONYMOUS
        if certificate is not None and self.mutual_tls:
            caller = self._of_certificate(certificate)
        return caller if self._keys is None else self._keys.caller(metadata)

    def _of_certificate(self, names: Sequence[str]) -> Caller:
        if self._names is not None:
            return self._names.caller(names)
        name = next(iter(names), ANONYMOUS.name)
        return Caller(
            loggable(name), self._settings.quota if self._settings.quota != UNBOUNDED else None
        )

    def _read_keys(self) -> None:
        path = self._settings.api_keys_file
        assert path is not None
        found = ApiKeys.read(path, self._settings.quota)
        before, self._keys = self._keys, found
        _tell("api keys", before, found)
        self.changed(*_difference(before, found))

    def _read_names(self) -> None:
        path = self._settings.tls_client_names_file
        assert path is not None
        found = CertificateNames.read(path, self._settings.quota)
        before, self._names = self._names, found
        _tell("certificate names", before, found)
        if self._settings.api_keys_file is None:  # else the keys determine the callers
            self.changed(*_difference(before, found))


class ApiKeys:
    """The keys that a server knows, and their callers. Keys are compared in constant time.

    callers: SHA-256 of a key -> its caller.
    """

    def __init__(self, callers: Mapping[bytes, Caller]) -> None:
        self._callers = dict(callers)

    @classmethod
    def read(cls, path: Path, default: Quota = UNBOUNDED) -> ApiKeys:
        """Read a file of keys. default: quotas of lines that set none.

        Raises ``SettingsError`` that names the line which is wrong.
        """
        setting = "api_keys_file"
        found: dict[bytes, Caller] = {}
        names: set[str] = set()
        for number, text in _lines(path, setting):
            parts = LINE.fullmatch(text)
            if parts is None or parts["name"] in names:
                raise SettingsError(
                    f"{setting}: line {number} must be 'name:SHA-256 of the key in hex', "
                    "with a name that no other line has"
                )
            names.add(parts["name"])
            quota = _quota((parts["quota"] or "").split(), default, f"{setting}: line {number}")
            digest = bytes.fromhex(parts["digest"])
            if digest in found:
                raise SettingsError(
                    f"{setting}: line {number}: {parts['name']} has the key of "
                    f"{found[digest].name}; every name needs a key of its own"
                )
            found[digest] = Caller(parts["name"], quota)
        if not found:
            raise SettingsError(f"{setting}: there is no key in the file")
        return cls(found)

    @property
    def known(self) -> dict[str, tuple[Quota | None, bytes]]:
        """Name -> its quota and its key, to compare before and after a reload."""
        return {caller.name: (caller.quota, digest) for digest, caller in self._callers.items()}

    def caller(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """The caller with the key in ``authorization: Bearer …`` or ``x-api-key``.

        Raises ``Unauthenticated`` for a missing or unknown key.
        """
        key = _key(metadata)
        if not key:
            raise Unauthenticated(
                "This server asks for an API key: send 'authorization: Bearer KEY' or "
                "'x-api-key: KEY' in the metadata of the call, over HTTP in its headers.",
                reason="API_KEY_MISSING",
            )
        digest = hashlib.sha256(key.encode()).digest()
        # Compare every digest, so that the time reveals nothing about the keys.
        matches = [caller for known, caller in self._callers.items() if _same(known, digest)]
        if not matches:
            raise Unauthenticated("The API key is not known to this server.")
        return matches[0]


class CertificateNames:
    """The names of client certificates that may call: common names or subject alternative names.

    callers: name in the certificate -> the caller.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = dict(callers)

    @classmethod
    def read(cls, path: Path, default: Quota = UNBOUNDED) -> CertificateNames:
        """Read a file of names. default: quotas of lines that set none.

        Raises ``SettingsError`` that names the line which is wrong.
        """
        setting = "tls_client_names_file"
        found: dict[str, Caller] = {}
        shown: set[str] = set()
        for number, text in _lines(path, setting):
            try:
                name, *words = shlex.split(text)
            except ValueError:
                raise SettingsError(f"{setting}: line {number}: a quote is not closed") from None
            short = loggable(name)
            if not name or short in shown:
                raise SettingsError(
                    f"{setting}: line {number} must be a name of a certificate that no other line "
                    "has, not even with other blanks"
                )
            shown.add(short)
            found[name] = Caller(short, _quota(words, default, f"{setting}: line {number}"))
        if not found:
            raise SettingsError(f"{setting}: there is no name in the file")
        return cls(found)

    @property
    def known(self) -> dict[str, tuple[Quota | None, bytes]]:
        """Name -> its quota."""
        return {caller.name: (caller.quota, b"") for caller in self._callers.values()}

    def caller(self, names: Sequence[str]) -> Caller:
        """The caller with a certificate that has one of these names. Raises ``Unauthenticated``."""
        for name in names:
            if name in self._callers:
                return self._callers[name]
        raise Unauthenticated(
            "The name in your client certificate is not on the list of this server.",
            reason="CERTIFICATE_NOT_ALLOWED",
        )


def _difference(
    old: ApiKeys | CertificateNames | None, new: ApiKeys | CertificateNames
) -> tuple[set[str], set[str]]:
    """Names that were added and that were removed."""
    before = set() if old is None else set(old.known)
    after = set(new.known)
    return after - before, before - after


def _nobody_listens(added: set[str], removed: set[str]) -> None:
    """What an ``Access`` calls until somebody listens."""


def _tell(
    what: str, old: ApiKeys | CertificateNames | None, new: ApiKeys | CertificateNames
) -> None:
    """Log the changes of a reload. Logs only names, because digests are secret, too."""
    if old is None:
        return
    before, after = old.known, new.known
    added, removed = _difference(old, new)
    both = before.keys() & after.keys()
    log.info(
        "%s reloaded %s",
        what,
        pairs(
            added=_listed(added),
            removed=_listed(removed),
            key_changed=_listed(name for name in both if before[name][1] != after[name][1]),
            quota_changed=_listed(name for name in both if before[name][0] != after[name][0]),
        ),
    )


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f",+{len(found) - SHOWN_NAMES}" if len(found) > SHOWN_NAMES else ""
    return ",".join(found[:SHOWN_NAMES]) + more or "-"


def loggable(name: str) -> str:
    """A name of a certificate as one word of printable ASCII."""
    return ODD.sub("_", name[:NAME_LIMIT]) or ANONYMOUS.name


def _lines(path: Path, setting: str) -> Iterator[tuple[int, str]]:
    """The lines that are neither empty nor comments, with their numbers. Raises
    ``SettingsError``."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise SettingsError(
            f"{setting}: {path} cannot be read as UTF-8 text by this user"
        ) from None
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield number, text


def _quota(words: Sequence[str], default: Quota, place: str) -> Quota | None:
    try:
        return read_quota(words, default)
    except ValueError as error:
        raise SettingsError(f"{place}: {error}") from None


def _same(known: bytes, given: bytes) -> bool:
    return hmac.compare_digest(known, given)


def _key(metadata: Mapping[str, str | bytes]) -> str:
    bearer = str(metadata.get("authorization", ""))
    scheme, _, token = bearer.partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return str(metadata.get("x-api-key", ""))
