"""The formats of strings as regular expressions, for grammars.

Each matches a part of what ``service.schema_compiler.frontend.formats`` takes, and nothing else. What is left out is
rare, and would make an automaton large: long host names, addresses in brackets, leap seconds away from
UTC, host names in scripts that need combining marks, host names in Punycode.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FormatPattern:
    """pattern: anchored, of the dialect of ``service.schema_compiler.regex.matching``. wide: a pattern that is found
    in each text of the format, and in others; empty where ``pattern`` leaves nothing out; None: there is none.
    uncounted: a pattern whose texts of at most ``longest`` characters have the format, for a decoder that counts
    them: it compiles in a tenth of the time. Empty where ``pattern`` counts little."""

    pattern: str
    wide: str | None = ""
    uncounted: str = ""
    longest: int = 0

    @property
    def excluded(self) -> str | None:
        """The pattern of which a text without the format has to be free; None: no grammar knows one."""
        return self.pattern if self.wide == "" else self.wide


_HEX = "[0-9A-Fa-f]"
_YEAR = "(?:[1-9][0-9]{3}|0(?:[1-9][0-9]{2}|0(?:[1-9][0-9]|0[1-9])))"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)-02-29)"
)
_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"(?:{_MINUTE}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_MINUTE})|23:59:60(?:\.[0-9]+)?[Zz])"

_MONTHS = "[0-9]+M(?:[0-9]+D)?"
_MINUTES = "[0-9]+M(?:[0-9]+S)?"
_DAYS = f"(?:[0-9]+Y(?:{_MONTHS})?|{_MONTHS}|[0-9]+D)"
_HOURS = f"T(?:[0-9]+H(?:{_MINUTES})?|{_MINUTES}|[0-9]+S)"

# As long as a label may be, all labels together.
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}\.)*{_LABEL}"
_LONGEST_HOST = 63
_HOST_LENGTH = f"{{1,{_LONGEST_HOST}}}"
_PUNYCODE = "[Xx][Nn]--"

# Labels of host names in any order of their letters: none of these composes with another, and so many
# of them take at most 57 letters in Punycode. Latin, Greek and Cyrillic; kana, Han and Hangul.
_EXTENDED = "āăąćĉċčďđēĕėęěĝğġģĥħĩīĭįıĵķĸĺļľłńņňŋōŏőœŕŗřśŝşšţťŧũūŭůűųŵŷźżž"
_LETTER = f"[a-z0-9ß-öø-ÿ{_EXTENDED}ά-ώа-џ]"
_ASCII_LABEL = "[A-Za-z0-9](?:-?[A-Za-z0-9]){0,20}"
_IDN_LABEL = (
    f"(?:{_ASCII_LABEL}|{_LETTER}(?:-?{_LETTER}){{0,14}}|[a-z0-9ぁ-ゖァ-ヺー一-鿯가-힣]{{1,14}})"
)
# Hebrew and Arabic: there, a label with a digit at its start would be wrong.
_LEFTWARD = "[א-תء-غف-ي]{1,13}"
_IDN_HOST = (
    rf"(?:(?:{_IDN_LABEL}\.){{0,2}}{_IDN_LABEL}(?:\.{_ASCII_LABEL})?"
    rf"|(?:{_LEFTWARD}\.){{1,2}}(?:{_LEFTWARD}|[a-z]{{2,13}}))"
)

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_GROUP = f"{_HEX}{{1,4}}"


def _groups(most: int) -> str:
    """Groups of an IPv6 address after its gap, at most so many; an IPv4 address counts for two."""
    if most < 2:
        return f"(?:{_GROUP})?" if most else ""
    return f"(?:(?:{_GROUP}:){{0,{most - 1}}}{_GROUP}|(?:{_GROUP}:){{0,{most - 2}}}{_IPV4})?"


def _ipv6() -> str:
    whole = f"(?:{_GROUP}:){{6}}(?:{_GROUP}:{_GROUP}|{_IPV4})"
    gaps = [f"::{_groups(7)}"]
    gaps += [f"(?:{_GROUP}:){{{before}}}:{_groups(7 - before)}" for before in range(1, 8)]
    return "|".join([whole, *gaps])


def _reference(more: str, *, absolute: bool) -> str:
    """A reference by RFC 3986. more: further characters, as members of a class."""
    escape = f"%{_HEX}{{2}}"
    segment = f"(?:[A-Za-z0-9._~!$&'()*+,;=@{more}-]|{escape})"  # without a colon
    character = f"(?:[A-Za-z0-9._~!$&'()*+,;=:@{more}-]|{escape})"
    slashes = f"(?:[A-Za-z0-9._~!$&'()*+,;=:@/{more}-]|{escape})*"
    query = f"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?{more}-]|{escape})*"
    user = f"(?:[A-Za-z0-9._~!$&'()*+,;=:{more}-]|{escape})*@"
    host = f"(?:[A-Za-z0-9._~!$&'()*+,;={more}-]|{escape})*"
    scheme = "[A-Za-z][A-Za-z0-9+.-]*:"
    rooted = f"//(?:{user})?{host}(?::[0-9]*)?(?:/{slashes})?|/(?:{character}{slashes})?"
    if absolute:
        path = f"{scheme}(?:{rooted}|{character}{slashes})?"
    else:
        path = (
            f"(?:(?:{scheme})?(?:{rooted})|{scheme}(?:{character}{slashes})?"
            f"|{segment}+(?:/{slashes})?)?"
        )
    return rf"^{path}(?:\?{query})?(?:#{query})?$"


def _wide_reference(more: str) -> str:
    return rf"^[A-Za-z0-9._~!$&'()*+,;=:@/?#\[\]%{more}-]*$"


_SCHEME = "^[A-Za-z][A-Za-z0-9+.-]*:"
_BEYOND = r"\u00A0-\u{10FFFF}"


def _email(host: str, more: str) -> str:
    """An address of mail, with one ``@``. more: further characters before it, as members of a class."""
    atom = f"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~{more}-]+"
    quoted = rf'"(?:[ !#-?A-\[\]-~{more}]|\\[ -?A-~])*"'
    return rf"(?:{atom}(?:\.{atom})*|{quoted})@{host}$"


_EMAIL = f"(?!.*[@.]{_PUNYCODE}){_email(_HOST, '')}"
_HOSTNAME = rf"(?!(?:.*\.)?{_PUNYCODE}){_HOST}$"

# RFC 6570: what stands for itself, and expressions of variables.
_PLANES = "".join(
    rf"\u{{{plane:X}{'1000' if plane == 14 else '0000'}}}-\u{{{plane:X}FFFD}}"
    for plane in range(1, 17)
)
_PLAIN = rf"[!#$&-;=?-\[\]_a-z~\u00A0-\uD7FF\uE000-\uFDCF\uFDF0-\uFFEF{_PLANES}]|%{_HEX}{{2}}"
_NAME = f"(?:[A-Za-z0-9_]|%{_HEX}{{2}})"
_VARIABLE = rf"{_NAME}(?:\.?{_NAME})*(?::[1-9][0-9]{{0,3}}|\*)?"
_EXPRESSION = rf"\{{[+#./;?&=,!@|]?{_VARIABLE}(?:,{_VARIABLE})*\}}"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

# Regular expressions beside other constraints: groups in no other group, and short lists of repeats and ranges.
_ANY = r"\u00A0-\u2027\u202A-\u{10FFFF}"
_ESCAPED = r"\\[dDwWsStnrfv!-/:-@\[-`{-~]"
_MEMBER = rf"(?:[ !\"#$%&'()*+,./0-9:;<=>?@A-Z_`a-z{{|}}~{_ANY}]|[01]-9|a-[fz]|A-[FZ]|{_ESCAPED})"
_ATOM = rf"(?:[ !\"#%&',/0-9:;<=>@A-Z\]_`a-z}}~{_ANY}-]|\.|\[\^?(?:-?{_MEMBER}+-?|-)\]|{_ESCAPED})"
_TIMES = (
    r"(?:(?:[*+?]|\{(?:[0-9]{1,2},?|0,[0-9]|1,[1-9]|2,[2-9]|3,[3-9]|[0-9],[1-9][0-9]{1,2})\})\??)?"
)
_PART = rf"{_ATOM}{_TIMES}|[$^|]|\\[bB]"
_REGEX = rf"(?:{_PART}|\((?:\?:)?(?:{_PART})*\){_TIMES})*"

FORMAT_PATTERNS: dict[str, FormatPattern] = {
    "date": FormatPattern(f"^{_DATE}$"),
    "time": FormatPattern(f"^{_TIME}$", "^[0-9]{2}:[0-9]{2}:[0-9]{2}"),
    "date-time": FormatPattern(f"^{_DATE}[Tt]{_TIME}$", "^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt]"),
    "duration": FormatPattern(f"^P(?:[0-9]+W|{_DAYS}(?:{_HOURS})?|{_HOURS})$"),
    "email": FormatPattern(
        f"^(?=[^@]*@[^@]{_HOST_LENGTH}$){_EMAIL}", "@", f"^{_EMAIL}", len("a@") + _LONGEST_HOST
    ),
    "idn-email": FormatPattern(f"^{_email(_IDN_HOST, _BEYOND)}", "@"),
    "hostname": FormatPattern(
        f"^(?=.{_HOST_LENGTH}$){_HOSTNAME}", "^[A-Za-z0-9.-]+$", f"^{_HOSTNAME}", _LONGEST_HOST
    ),
    "idn-hostname": FormatPattern(f"^{_IDN_HOST}$", r"^[A-Za-z0-9.\u0080-\u{10FFFF}-]+$"),
    "ipv4": FormatPattern(f"^{_IPV4}$"),
    "ipv6": FormatPattern(f"^(?:{_ipv6()})$"),
    "uuid": FormatPattern(f"^{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}$"),
    "uri": FormatPattern(_reference("", absolute=True), _SCHEME),
    "uri-reference": FormatPattern(_reference("", absolute=False), _wide_reference("")),
    "iri": FormatPattern(_reference(_BEYOND, absolute=True), _SCHEME),
    "iri-reference": FormatPattern(_reference(_BEYOND, absolute=False), _wide_reference(_BEYOND)),
    "uri-template": FormatPattern(f"^(?:{_PLAIN}|{_EXPRESSION})*$"),
    "json-pointer": FormatPattern(f"^{_POINTER}$"),
    "relative-json-pointer": FormatPattern(f"^(?:0|[1-9][0-9]*)(?:#|{_POINTER})$"),
    "regex": FormatPattern(f"^{_REGEX}$", None),
}
"""By name. Alone, ``regex`` is an ``ExpressionText``, which has more of them."""
