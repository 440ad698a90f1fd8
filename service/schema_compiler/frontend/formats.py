"""The formats of strings that are asserted on answers.

JSON Schema leaves it to the implementation whether ``format`` asserts anything. Here it does, since
a caller who writes ``format: date`` means it. Formats that are not in ``FORMATS`` say nothing about a
value and stay annotations. Every expression below runs in linear time.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import unicodedata
from collections.abc import Callable

import idna

from service.schema_compiler.regex.matching import (
    MAX_STATES,
    PatternError,
    PatternUnsupported,
    compile_pattern,
)

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_TIME = re.compile(
    r"(\d{2}):(\d{2}):(\d{2})(?:\.\d+)?(?:[Zz]|([+-])(\d{2}):(\d{2}))", re.ASCII
)  # RFC 3339
_DURATION = re.compile(
    r"P(?:\d+W|(?=\d|T)(?:\d+Y(?:\d+M(?:\d+D)?)?|\d+M(?:\d+D)?|\d+D)?"
    r"(?:T(?:\d+H(?:\d+M(?:\d+S)?)?|\d+M(?:\d+S)?|\d+S))?)",
    re.ASCII,
)
_ATOM, _TEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-", r" !#-\[\]-~"
_BEYOND = r"\x80-\ud7ff\ue000-\U0010ffff"
_LOCAL, _IDN_LOCAL = (
    re.compile(rf'[{_ATOM}{more}]+(?:\.[{_ATOM}{more}]+)*|"(?:[{_TEXT}{more}]|\\[ -~])*"')
    for more in ("", _BEYOND)
)  # RFC 5321, and with the characters of RFC 6531
_DOTS = re.compile("[.\u3002\uff0e\uff61]")  # RFC 3490
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
_UUID = re.compile(r"[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")
_URI_CHARACTERS = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?#\[\]-]|%[0-9A-Fa-f]{2})*")
_IRI_CHARACTERS = re.compile(
    r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?#\[\]\u00a0-\U0010ffff-]|%[0-9A-Fa-f]{2})*"
)
_URI_PARTS = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?[^#]*)?(#.*)?", re.DOTALL)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_AUTHORITY = re.compile(r"(?:[^@\[\]]*@)?(\[[0-9A-Za-z:._~!$&'()*+,;=-]+\]|[^\[\]@:]*)(?::\d*)?")
_UCS = r"\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\uffef" + "".join(
    rf"\U{plane << 16:08x}-\U{plane << 16 | 0xFFFD:08x}" for plane in range(1, 17)
).replace(r"\U000e0000", r"\U000e1000")  # ucschar and iprivate of RFC 3987
_NAME = "(?:[A-Za-z0-9_]|%[0-9A-Fa-f]{2})"
_VARIABLE = rf"{_NAME}(?:\.?{_NAME})*(?::[1-9][0-9]{{0,3}}|\*)?"
_TEMPLATE = re.compile(  # RFC 6570, with the apostrophe of its erratum 6937
    rf"(?:[!#$&-;=?-\[\]_a-z~{_UCS}]|%[0-9A-Fa-f]{{2}}"
    rf"|\{{[+#./;?&=,!@|]?{_VARIABLE}(?:,{_VARIABLE})*\}})*"
)
_POINTER = re.compile(r"(?:/(?:[^~/]|~[01])*)*", re.DOTALL)
_RELATIVE_POINTER = re.compile(r"(?:0|[1-9][0-9]*)(?:#|(?:/(?:[^~/]|~[01])*)*)", re.DOTALL)
# All but what only other languages have: \A, \Z and \z, openings of groups such as (?P<n>, (?#, (?>, (?i).
_ECMA = re.compile(
    r"(?:\\[^AZz]|\[(?:\\.|[^\]\\])*\]|[^\\\[(]|\((?!\?)"
    r"|\(\?(?:[:=!]|<[=!]|<(?!\d)[\w$]+>|[ims]+(?:-[ims]*)?:|-[ims]+:))*",
    re.DOTALL,
)


def _date(text: str) -> bool:
    if not _DATE.fullmatch(text):
        return False
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _time(text: str) -> bool:
    match = _TIME.fullmatch(text)
    if match is None:
        return False
    hour, minute, second = int(match[1]), int(match[2]), int(match[3])
    offset_hour, offset_minute = int(match[5] or 0), int(match[6] or 0)
    if hour > 23 or minute > 59 or offset_hour > 23 or offset_minute > 59:
        return False
    if second < 60:
        return True
    # A leap second is the last one of a day in UTC.
    offset = (offset_hour * 60 + offset_minute) * (-1 if match[4] == "-" else 1)
    return second == 60 and (hour * 60 + minute - offset) % 1440 == 1439


def _date_time(text: str) -> bool:
    return text[10:11] in ("T", "t") and _date(text[:10]) and _time(text[11:])


def _hostname(text: str) -> bool:
    return 0 < len(text) <= 253 and all(map(_is_label, text.split(".")))


def _is_label(text: str) -> bool:
    if len(text) > 63 or _LABEL.fullmatch(text) is None:
        return False
    return not text.lower().startswith("xn--") or _is_a_label(text)


def _is_a_label(text: str) -> bool:
    """Whether a label in Punycode stands for one that IDNA 2008 allows."""
    try:
        idna.ulabel(text)
    except UnicodeError:  # what IDNAError is, and errors of Punycode are
        return False
    return True


def _idn_hostname(text: str) -> bool:
    """Labels of ``hostname`` or of IDNA 2008, U-labels and A-labels."""
    if len(text) > 253:  # an A-label is never shorter than its U-label
        return False
    labels = _DOTS.split(text)
    try:
        size = sum(len(_a_label(label)) + 1 for label in labels) - 1
        shown = [_u_label(label) for label in labels]
        # RFC 5893 binds every label as soon as one has a letter that is written from right to left.
        if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for label in shown for c in label):
            for label in shown:
                idna.check_bidi(label, check_ltr=True)
    except UnicodeError:  # what IDNAError is, and errors of Punycode are
        return False
    return size <= 253


def _a_label(text: str) -> bytes:
    return text.encode() if _is_plain(text) else idna.alabel(text)


def _u_label(text: str) -> str:
    return text if _is_plain(text) else idna.ulabel(text)


def _is_plain(text: str) -> bool:
    return _is_label(text) and not text.lower().startswith("xn--")


def _ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _ipv6(text: str) -> bool:
    try:
        return ipaddress.IPv6Address(text).scope_id is None
    except ValueError:
        return False


def _email(text: str) -> bool:
    return _mailbox(text, _LOCAL, _hostname)


def _idn_email(text: str) -> bool:
    return _mailbox(text, _IDN_LOCAL, _idn_hostname)


def _mailbox(text: str, local: re.Pattern[str], is_host: Callable[[str], bool]) -> bool:
    name, at, domain = text.rpartition("@")
    if not at or not local.fullmatch(name):
        return False
    if domain.startswith("[") and domain.endswith("]"):
        literal = domain[1:-1]
        return _ipv6(literal[5:]) if literal.startswith("IPv6:") else _ipv4(literal)
    return is_host(domain)


def _reference(text: str, characters: re.Pattern[str]) -> bool:
    """A URI reference of RFC 3986, or with the characters of RFC 3987 an IRI reference."""
    parts = _URI_PARTS.fullmatch(text)
    if parts is None or not characters.fullmatch(text):
        return False
    scheme, authority, path, fragment = parts.groups()
    if scheme is not None and not _SCHEME.fullmatch(scheme):
        return False
    if authority is not None:
        host = _AUTHORITY.fullmatch(authority)
        if host is None or (host[1].startswith("[") and not _literal(host[1][1:-1])):
            return False
    if "#" in (fragment or "#")[1:] or text.count("[") != (authority or "").count("["):
        return False
    # Without scheme and authority, a colon in the first segment would make it a scheme.
    return scheme is not None or authority is not None or ":" not in path.partition("/")[0]


def _literal(address: str) -> bool:
    return _ipv6(address) or re.fullmatch(r"[vV][0-9A-Fa-f]+\.[^:].*", address) is not None


def _absolute(text: str, characters: re.Pattern[str]) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) is not None and _reference(text, characters)


def _regex(text: str) -> bool:
    """A regular expression of ECMA-262, also one that a schema could not use here."""
    if not _ECMA.fullmatch(text):
        return False
    try:
        compile_pattern(text, max_length=MAX_STATES)
    except PatternUnsupported:
        return True
    except PatternError:
        return False
    return True


FORMATS: dict[str, Callable[[str], bool]] = {
    "date": _date,
    "time": _time,
    "date-time": _date_time,
    "duration": lambda text: _DURATION.fullmatch(text) is not None,
    "email": _email,
    "idn-email": _idn_email,
    "hostname": _hostname,
    "idn-hostname": _idn_hostname,
    "ipv4": _ipv4,
    "ipv6": _ipv6,
    "uuid": lambda text: _UUID.fullmatch(text) is not None,
    "uri": lambda text: _absolute(text, _URI_CHARACTERS),
    "uri-reference": lambda text: _reference(text, _URI_CHARACTERS),
    "iri": lambda text: _absolute(text, _IRI_CHARACTERS),
    "iri-reference": lambda text: _reference(text, _IRI_CHARACTERS),
    "uri-template": lambda text: _TEMPLATE.fullmatch(text) is not None,
    "json-pointer": lambda text: _POINTER.fullmatch(text) is not None,
    "relative-json-pointer": lambda text: _RELATIVE_POINTER.fullmatch(text) is not None,
    "regex": _regex,
}
"""Whether a string has a format, by the format's name."""
