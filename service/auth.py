"""Who calls: API keys, and names of client certificates.

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

current: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)
"""Who makes the call that the current task works for."""


class Access:
    """Who may call a server, by its settings: one for all front ends.

    The files can be read again in a thread while calls are checked.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._keys: ApiKeys | None = None
        self._names: CertificateNames | None = None

    @property
    def mutual_tls(self) -> bool:
        """Whether callers have certificates, whose names ``caller`` then needs."""
        return self._settings.tls_client_ca is not None

    @property
    def files(self) -> list[tuple[Path, Callable[[], None]]]:
        """The files that may change, and what reads each of them again."""
        settings = self._settings
        found = (
            (settings.api_keys_file, self._read_keys),
            (settings.tls_client_names_file, self._read_names),
        )
        return [(path, read) for path, read in found if path is not None]

    def read(self) -> None:
        """Read the files for the first time. Raises ``SettingsError`` for what cannot be used."""
        for _, read in self.files:
            read()

    def caller(
        self, metadata: Mapping[str, str | bytes], certificate: Sequence[str] | None = None
    ) -> Caller:
        """Who sends a call with this metadata, or with these headers; their names are in lower case.

        certificate: names in the certificate of the caller, its common name first; None where the
        transport asks for no certificates. Where keys are needed, too, the key decides who calls.
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
        _tell("api keys", self._keys, found)
        self._keys = found

    def _read_names(self) -> None:
        path = self._settings.tls_client_names_file
        assert path is not None
        found = CertificateNames.read(path, self._settings.quota)
        _tell("certificate names", self._names, found)
        self._names = found


class ApiKeys:
    """The keys that a server knows, and whose they are. Compared in constant time.

    callers: SHA-256 of a key -> the caller who has it.
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
            found.setdefault(bytes.fromhex(parts["digest"]), Caller(parts["name"], quota))
        if not found:
            raise SettingsError(f"{setting}: there is no key in the file")
        return cls(found)

    @property
    def known(self) -> dict[str, tuple[Quota | None, bytes]]:
        """Of each name its quota, and what changes with its key."""
        return {caller.name: (caller.quota, digest) for digest, caller in self._callers.items()}

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


class CertificateNames:
    """The names of client certificates that may call: common names or subject alternative names.

    callers: name as it stands in the certificate -> the caller.
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
        """Of each name its quota."""
        return {caller.name: (caller.quota, b"") for caller in self._callers.values()}

    def caller(self, names: Sequence[str]) -> Caller:
        """Who has a certificate with these names. Raises ``Unauthenticated``."""
        for name in names:
            if name in self._callers:
                return self._callers[name]
        raise Unauthenticated(
            "The name in your client certificate is not on the list of this server.",
            reason="CERTIFICATE_NOT_ALLOWED",
        )


def _tell(
    what: str, old: ApiKeys | CertificateNames | None, new: ApiKeys | CertificateNames
) -> None:
    """Log what a reload changes. Names only: a digest is a secret, too."""
    if old is None:
        return
    before, after = old.known, new.known
    both = before.keys() & after.keys()
    log.info(
        "%s reloaded %s",
        what,
        pairs(
            added=_listed(after.keys() - before.keys()),
            removed=_listed(before.keys() - after.keys()),
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
    """The lines that say something, with their numbers. Raises ``SettingsError``."""
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
