"""Patterns of formats against the checks of formats."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.schema_compiler.budget import Budget
from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.lower.format_patterns import FORMAT_PATTERNS
from service.schema_compiler.regex.matching import compile_pattern

pytestmark = pytest.mark.slow

_NAMES = sorted(FORMAT_PATTERNS)
_GOOD = {
    "date": ["2024-02-29", "2000-02-29", "0004-02-29", "0001-01-01", "9999-12-31", "2023-11-30"],
    "time": ["00:00:00Z", "23:59:59.123z", "12:30:00+05:30", "23:59:60Z", "08:00:00-23:59"],
    "date-time": ["2024-02-29T23:59:59Z", "1999-12-31t00:00:00.5+01:00", "2016-12-31T23:59:60Z"],
    "duration": ["P3W", "P1Y", "P1Y2M3D", "PT5M", "P1DT12H", "PT36H", "P2MT1S", "PT1H2M3S"],
    "email": [
        "joe.bloggs@example.com",
        "te~st@example.co.uk",
        '"joe bloggs"@example.com',
        "a+b@x",
        "info@the-foundation-of-friends-of-california-state-parks.example.org",
        "a@b.c.d.e.f.g.h.i",
        '"a\\"b"@xn.bcher--kva.example',
    ],
    "hostname": [
        "a" * 63,
        "a.b.c.d.e.f.g.h.i",
        "example.com",
        "xn-a.xnx--a",
        "a",
        "1host",
        "a-b.c--d.example.co.uk",
    ],
    "idn-email": [
        "joe@example.com",
        "jürgen.müller@bücher.example",
        '"ü b"@例え.テスト',
        "ü@דוגמה.example",
    ],
    "idn-hostname": [
        "Example.com",
        "www.müller-lüdens.example.com",
        "例え.テスト",
        "실례.테스트",
        "пример.испытание",
        "παράδειγμα.δοκιμή",
        "zażółć.example",
        "דוגמה.טעסט",
        "مثال.example",
    ],
    "ipv4": ["0.0.0.0", "192.168.0.1", "255.255.255.255", "1.20.103.249"],
    "ipv6": [
        "::",
        "::1",
        "1::",
        "2001:db8::ff00:42:8329",
        "1:2:3:4:5:6:7:8",
        "1:2:3:4:5:6:7::",
        "::2:3:4:5:6:7:8",
        "::ffff:192.0.2.128",
        "1:2:3:4:5:6:1.2.3.4",
        "1::1.2.3.4",
        "::1:2:3:4:5:1.2.3.4",
        "FE80::0202:B3FF:FE1E:8329",
    ],
    "uuid": ["2eb8aa08-aa98-11ea-b4aa-73b441d16380", "2EB8AA08-AA98-11EA-B4AA-73B441D16380"],
    "uri": [
        "http://foo.bar/?baz=qux#quux",
        "https://user:pw@example.com:8080/a%20b//c?x=/y?#z/?",
        "mailto:John.Doe@example.com",
        "urn:oasis:names:specification:docbook:dtd:xml:4.1.2",
        "file:///etc/hosts",
        "tel:+1-816-555-1212",
        "x:",
        "a:/b",
        "http://",
    ],
    "uri-reference": [
        "",
        "/abc",
        "//example.com/x",
        "abc/d:e",
        "#frag",
        "?q",
        "./a:b",
        "http://a",
        "a",
    ],
    "iri": ["http://ƒøø.ßår/?∂éœ=πîx#πîüx", "http://例え.jp/パス", "urn:ü"],
    "iri-reference": ["/pfad/ü", "#ƒrägmênt", "ü/a:b", "https://a.b/ö"],
    "uri-template": [
        "http://example.com/{term:1}/{term}",
        "",
        "{+x,y.z*,%41:10}",
        "/ü",
        "'%20",
        "{=x}",
    ],
    "json-pointer": ["", "/", "/foo/bar~0/baz~1/%a", "//a b/\n"],
    "relative-json-pointer": ["0", "1/a~1b", "12#", "0/"],
    "regex": [
        "",
        "^a+$",
        "a|",
        "[a-z0-9_.-]{2,30}",
        "^(?:A|[a-z])(x)?\\w+",
        "(?:a|b*?)+\\/",
        '[^"\\\\]',
        "a{3}",
        "é+",
        "[-]",
    ],
}
_BAD = {
    "date": ["2023-02-29", "1900-02-29", "0000-01-01", "2024-13-01", "2024-04-31", "2024-1-1", "x"],
    "time": ["24:00:00Z", "12:60:00Z", "12:00:00", "12:00:61Z", "22:59:60Z", "12:00:00+24:00"],
    "date-time": [
        "2024-02-30T00:00:00Z",
        "2024-02-28 00:00:00Z",
        "2024-02-28T00:00:00",
        "2024-02-28",
    ],
    "duration": ["P", "PT", "P1S", "P1Y2D", "P1W2D", "PT1D", "P1YT", "1Y", "PT1H1S"],
    "email": ["joe", "@x", "a@", ".a@x.com", "a..b@x.com", "a b@x.com", "a@b_c", "a@-b.com"],
    "hostname": [
        "",
        "-a",
        "a-",
        "a..b",
        ".a",
        "a.",
        "a_b",
        "ü.de",
        "a" * 64,
        "a" * 64 + ".b",
        "xn--X",
        "a.XN--hello-txk",
    ],
    "idn-email": ["joe", "@x", "ü@", ".ü@x", "ü b@x", "ü@Ü.de", "ü@-a"],
    "idn-hostname": [
        "",
        "-ü",
        "ü-",
        "ü..b",
        ".ü",
        "Ü.de",
        "üB",
        "xn--ü",
        "xn--a",
        "דוגמה.1a",
        "aד",
        "ü_",
        "a" * 64,
    ],
    "ipv4": ["1.2.3", "256.1.1.1", "01.2.3.4", "1.2.3.4.5", "1.2.3.4 ", "1.2.3.-4"],
    "ipv6": [
        ":",
        "1",
        "1:2:3:4:5:6:7",
        "1:2:3:4:5:6:7:8:9",
        "1::2::3",
        "12345::",
        "1:2:3:4:5:6:7:1.2.3.4",
        "::1.2.3",
        "fe80::1%eth0",
        ":::",
        "1:2:3:4:5:6:7:8::",
        "::1:2:3:4:5:6:7:8",
        "::1:2:3:4:5:6:1.2.3.4",
    ],
    "uuid": ["2eb8aa08aa9811eab4aa73b441d16380", "2eb8aa08-aa98-11ea-b4aa-73b441d1638", "x"],
    "uri": [
        "",
        "//a/b",
        "abc",
        "http://a b",
        "http://a#b#c",
        "1a:b",
        "http://a/%zz",
        "a:ü",
        "a:\\b",
    ],
    "uri-reference": ["\\a", "a b", "1a:b", ":a", "#a#b", "%z", "[a]"],
    "iri": ["/a", "http://a b", "a:{}", ""],
    "iri-reference": ["\\a", "ü:a", "a#b#c"],
    "uri-template": [
        "{",
        "a}",
        "{}",
        "a b",
        "<",
        "{a,}",
        "{a:0}",
        "{a..b}",
        "{ü}",
        "%",
        "\ufdd0",
        "\U000e0001",
    ],
    "json-pointer": ["a", "/~2", "/~", "#"],
    "relative-json-pointer": ["", "01", "/a", "-1", "1##", "1a"],
    "regex": ["(", ")", "[a", "*", "a**", "^*", "a{2,1}", "[z-a]", "\\", "a{1}{2}", "(?:"],
}


def _found(name: str, text: str) -> bool:
    pattern = compile_pattern(FORMAT_PATTERNS[name].pattern, max_length=1_500)
    return pattern.search(text, Budget())


def _texts(name: str) -> st.SearchStrategy[str]:
    """Texts that match, by way of Python's spelling of the pattern; a few stand for the characters
    beyond ASCII."""
    spelled = FORMAT_PATTERNS[name].pattern.removeprefix("^").removesuffix("$")
    beyond = r"\\u00A0-[^\]]*\\u\{10FFF[DF]\}"
    spelled = re.sub(beyond, "\u00a0ü例\ue000\U0001fffd\U0010fffd", spelled)
    ahead = re.match(r"(\(\?=.*?\$\))?", spelled)
    assert ahead is not None
    texts = st.from_regex(re.compile(spelled[ahead.end() :]), fullmatch=True)
    texts = texts.filter(lambda text: re.match(ahead[0], text) is not None)
    return texts.filter(lambda text: not re.search("[\ud800-\udfff]", text))


def test_every_format_has_a_pattern() -> None:
    assert set(FORMATS) == set(FORMAT_PATTERNS)
    assert set(FORMAT_PATTERNS) == set(_GOOD) == set(_BAD)


@pytest.mark.parametrize("name", _NAMES)
def test_known_examples(name: str) -> None:
    assert [text for text in _GOOD[name] if not FORMATS[name](text)] == []
    assert [text for text in _GOOD[name] if not _found(name, text)] == []
    assert [text for text in _BAD[name] if _found(name, text)] == []


@pytest.mark.parametrize("name", _NAMES)
def test_every_match_has_the_format(name: str) -> None:
    @settings(max_examples=15, deadline=None)
    @given(_texts(name))
    def check(text: str) -> None:
        assert FORMATS[name](text), text
        assert _found(name, text), text
        excluded = FORMAT_PATTERNS[name].excluded
        assert excluded is None or compile_pattern(excluded, max_length=10_000).found(text), text

    check()


@pytest.mark.parametrize("name", [n for n in _NAMES if FORMAT_PATTERNS[n].wide])
def test_each_text_of_a_format_is_excluded_with_it(name: str) -> None:
    """Also what the pattern leaves out: whatever has the format after a change in some characters."""
    excluded = compile_pattern(str(FORMAT_PATTERNS[name].excluded), max_length=10_000)

    @settings(max_examples=60, deadline=None)
    @given(_texts(name) | st.sampled_from(_GOOD[name]), st.data())
    def check(text: str, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(text)))
            other = data.draw(
                st.text(max_size=2) | st.sampled_from(["[::1]", "xn--", '"', "。", "%20"])
            )
            text = text[:at] + other + text[at + data.draw(st.integers(0, 1)) :]
        if FORMATS[name](text):
            assert excluded.found(text), text

    check()


@pytest.mark.parametrize("name", [n for n in _NAMES if FORMAT_PATTERNS[n].wide == ""])
def test_exact_patterns_leave_nothing_out(name: str) -> None:
    """Also of texts that differ from a match in a character."""

    @settings(max_examples=30, deadline=None)
    @given(_texts(name) | st.sampled_from(_GOOD[name]), st.data())
    def check(text: str, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(text)))
        other = data.draw(
            st.sampled_from(
                [
                    *"0129aFgz:./~#{}-TWYMD%,*+'",
                    "",
                    "::",
                    "%4a",
                    "ü",
                    "\n",
                    "\x80",
                    "\ufdd0",
                    "\U000e0000",
                ]
            )
        )
        changed = text[:at] + other + text[at + data.draw(st.integers(0, 1)) :]
        assert _found(name, changed) == FORMATS[name](changed), changed

    check()


@pytest.mark.parametrize("name", [n for n in _NAMES if FORMAT_PATTERNS[n].uncounted])
def test_texts_that_the_decoder_counts_have_the_format(name: str) -> None:
    """They are those of the whole pattern that are not longer."""
    known = FORMAT_PATTERNS[name]
    whole, uncounted = (
        compile_pattern(p, max_length=1_500) for p in (known.pattern, known.uncounted)
    )
    longest = ("a@" if name == "email" else "") + "b" * 63
    assert len(longest) == known.longest
    assert whole.found(longest)
    assert uncounted.found(longest + "b")
    assert not whole.found(longest + "b")

    @settings(max_examples=60, deadline=None)
    @given(_texts(name) | st.sampled_from(_GOOD[name] + _BAD[name]), st.data())
    def check(text: str, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text("ax-.@1n", max_size=40)) + text[at:]
        text = text[: data.draw(st.integers(0, known.longest))]
        assert uncounted.found(text) == whole.found(text), text
        if uncounted.found(text):
            assert FORMATS[name](text), text

    check()


def test_dates_are_exact() -> None:
    for year in (1, 4, 99, 100, 400, 1900, 1999, 2000, 2023, 2024, 9996, 9999):
        for month in range(14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                text = f"{year:04}-{month:02}-{day:02}"
                assert _found("date", text) == FORMATS["date"](text), text


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from("ßàÿāžίώаџ"), min_size=15, max_size=15).map("-".join)
    | st.text(st.sampled_from("ぁゖァヺー一鿯가힣") | st.characters(
        min_codepoint=0x4E00, max_codepoint=0x9FEF), min_size=14, max_size=14)
)  # fmt: skip
@example("ά-ο-ž-ÿ-ě-ώ-ğ-ύ-ý-ŗ-х-π-ń-џ-è")  # of those that were searched for, the longest ones
@example("퓌趱歫一綡a먰가不첸んカ鿯ァ")
def test_the_longest_labels_fit_into_punycode(label: str) -> None:
    name = f"{label}.{label}.{label}." + "a" * 21
    assert _found("idn-hostname", name)
    assert FORMATS["idn-hostname"](name), name
    assert not _found("idn-hostname", label + label[-2:])


def test_patterns_are_small() -> None:
    """Beyond some 1,500 characters nobody could review them."""
    assert max(len(found.pattern) for found in FORMAT_PATTERNS.values()) < 1_500


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hostname", "xn--4gbwdl.xn--wgbh1c"),
        ("hostname", "a.Xn--bcher-kva"),
        ("email", "a@xn--bcher-kva.de"),
    ],
)
def test_punycode_is_left_to_the_validation(name: str, text: str) -> None:
    """What is valid Punycode is no regular language: a grammar that took it would take wrong names."""
    assert FORMATS[name](text)
    assert not _found(name, text)
