"""Formats: values that are right, and values that are nearly right."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import time
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import OutputInvalid
from service.schema_compiler.frontend.formats import FORMATS
from service.structured_output.answers import AnswerValidator

RIGHT = {
    "date": ["1963-06-19", "2020-02-29"],
    "time": ["08:30:06Z", "23:59:60Z", "01:29:60+01:30", "15:59:60-08:00", "08:30:06.283185z"],
    "date-time": ["1963-06-19T08:30:06.283185Z", "1998-12-31T23:59:60Z", "1963-06-19t08:30:06z"],
    "duration": ["P4DT12H30M5S", "P4Y", "PT0S", "P1M", "PT36H", "P2W", "P1Y2M3DT4H5M6S"],
    "email": [
        "joe.bloggs@example.com",
        "te~st@example.com",
        '"joe@bloggs"@example.com',
        "joe@[127.0.0.1]",
        "joe@[IPv6:::1]",
    ],
    "hostname": ["www.example.com", "xn--4gbwdl.xn--wgbh1c", "a", "1host", "a" * 63],
    "idn-email": [
        "joe@example.com",
        "grüße@bücher.example",
        '"ü b"@例え.テスト',
        "ü@[127.0.0.1]",
        "a\u0308@b",
    ],
    "idn-hostname": [
        "bücher.example",
        "www.straße.example",
        "例え。テスト",
        "xn--bcher-kva.example",
        "XN--BCHER-KVA.Example",
        "r1---a.example",
        "דוגמה.example",
        "col·lecció",
        "a" * 63,
    ],
    "ipv4": ["192.168.0.1", "0.0.0.0"],
    "ipv6": ["::", "::1", "::ffff:192.168.0.1", "d6::", "1:2:3:4:5:6:7:8"],
    "uuid": ["2EB8AA08-AA98-11EA-B4AA-73B441D16380", "00000000-0000-0000-0000-000000000000"],
    "uri": [
        "http://foo.bar/?baz=qux#quux",
        "http://foo.com/blah_(wikipedia)_blah#cite-1",
        "http://-.~_!$&'()*+,;=:%40:80%2f::::::@example.com",
        "ldap://[2001:db8::7]/c=GB?objectClass?one",
        "http://[v1.a]/",
        "http://[V1.a]/",
        "mailto:J@example.com",
        "urn:a:b",
        "file:///a/b",
        "http://h:80",
    ],
    "uri-reference": ["/abc", "abc", "#fragment", "?x", "", "a/b:c", "//host", "http://h/"],
    "iri": ["http://ƒøø.ßår/?∂éœ=πîx#πîüx"],
    "iri-reference": ["âππ", "#ƒrägmênt"],
    "uri-template": [
        "http://example.com/{term:1}/{term}",
        "dictionary/{+term}",
        "",
        "{?a*,b.c_1:9999,%C3%BC}{&d}{#e}{.f}{/g,h}{;i}",
        "{=reserved}{|for}{,later}",
        "it's/%20/[ü\U0001f600]",
    ],
    "json-pointer": ["/foo/bar~0/baz~1/%a", "", "/"],
    "relative-json-pointer": ["1", "0/foo/bar", "120/foo", "0#"],
    "regex": [
        r"([abc])+\s+$",
        "a(?=b)",
        r"(a)\1",
        "^a{2}$",
        r"(?<name>x)\k<name>",
        "(?<=a+)b(?<!c)(?!d)",
        "(?i:a)(?s-i:b)(?:c)",
        r"[(?P<n>]\(?P<\[(a)",
        "[]|[^]",
    ],
}
WRONG = {
    "date": ["1963-6-19", "2021-02-29", "1963-06-19T", "06/19/1963", "1963-06-1৪", "19630619"],
    "time": ["8:3:6Z", "22:59:60Z", "23:59:60+01:00", "24:00:00Z", "12:00:00", "01:02:03+24:00"],
    "date-time": ["1998-12-31T23:59:61Z", "1990-02-31T15:59:59Z", "1963-06-19 08:30:06Z", "2013"],
    "duration": ["PT1D", "4DT12H", "P", "P1YT", "PT", "P2D1Y", "P1Y2W", "P1Y2D", "PT1H2S", "P২Y"],
    "email": ["2962", ".test@example.com", "te..st@example.com", "a@b=c.com", "a@[1.2.3.300]", "@"],
    "hostname": [
        "xn--X",
        "xn--hello-txk",
        "a.xn--",
        "XN--a",
        "-a.b",
        "a-",
        "a_b",
        "a" * 64,
        ".".join(["a" * 50] * 6),
        "",
        ".",
        "a..b",
        "ä",
    ],
    "idn-email": [
        "2962",
        ".ü@example.com",
        "ü@",
        "ü b@example.com",
        "ü@-.com",
        "ü\uff20b.example",
        "\ud800@b",
    ],
    "idn-hostname": [
        "Bücher.example",  # no U-label has capitals
        "bu\u0308cher.example",  # nor is one decomposed
        "xn--bcher-kvb.example",
        "xn---tda",  # another spelling of ü than its one A-label
        "xn--",
        "xn--a.example",
        "ü" * 58,  # 64 letters in Punycode
        ".".join(["ü" * 20] * 10),
        ".".join(["a" * 50] * 6),
        "דוגמה.1example",  # a digit first beside a label from right to left
        "aב",
        "-ü",
        "ü_b",
        "a\u200db",
        "·l",
        "ü.",
        "",
        "。",
        "\ud800",
    ],
    "ipv4": ["127.0.0.0.1", "256.1.1.1", "127.0", "0x7f000001", "087.10.0.1", "1২7.0.0.1"],
    "ipv6": ["12345::", "1:1:1:1:1:1:1:1:1", "::laptop", "fe80::a%eth1", "::1/64", ""],
    "uuid": ["2eb8aa08-aa98-11ea-b4aa-73b441d1638", "2eb8aa08aa9811eab4aa73b441d16380"],
    "uri": [
        "//foo.bar/",
        "/abc",
        "\\\\WINDOWS\\share",
        "http:// x.com",
        ":// x",
        "bar,baz:foo",
        "https://[@example.org/",
        'https://h/"',
        "https://h/<>",
        "https://h/{}",
        "http://[::1",
        "http://h/[a]",
        "http://[1]/",
        "a:b#c#d",
        "http://h/%4",
        "http://h/\n",
    ],
    "uri-reference": ["\\\\WINDOWS", "#frag\\ment", "1:b", "a[", "a b"],
    "iri": ["http://2001:0db8:85a3:0000:0000:8a2e:0370:7334", "/abc", "âππ"],
    "iri-reference": ["\\\\WINDOWS\\filëßåré"],
    "uri-template": [
        "http://example.com/{term:1}/{term",
        "a b",
        "{}",
        "a}",
        "{+}",
        "{a,}",
        "{,,a}",
        "{++a}",
        "{a..b}",
        "{.a.}",
        "{a:0}",
        "{a:10000}",
        "{a:}",
        "{a:1*}",
        "{a**}",
        "{a-b}",
        "{ü}",
        "{%4}",
        "{{a}}",
        "50%",
        "a|b",
        "a\x80",
        "\ufdd0",
        "\U000e0001",
        "\ud800",
    ],
    "json-pointer": ["/foo/bar~", "~", "a", "#", "/~2"],
    "relative-json-pointer": ["/foo/bar", "-1/foo", "01/a", "0##", ""],
    "regex": [
        "^(abc]",
        r"^\S(|(.|\n)*\S)\Z",
        "a**",
        r"\a",
        "(?P<n>a)",
        "(?<n>a)(?P=n)",
        "(?#of others)a",
        "(?i)a",
        "(?ims)a",
        "(?<=a)(?i)b",
        "(?>a)",
        "(?(1)a|b)",
        "(?<1>a)",
        "(?",
        "\\",
    ],
}


def test_every_format_is_in_the_tables() -> None:
    assert FORMATS.keys() == RIGHT.keys() == WRONG.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_right_and_wrong(name: str) -> None:
    assert [text for text in RIGHT[name] if not FORMATS[name](text)] == []
    assert [text for text in WRONG[name] if FORMATS[name](text)] == []


def test_an_answer_of_the_wrong_format_is_not_given_out() -> None:
    check = AnswerValidator(json.dumps({"properties": {"day": {"format": "date"}}}))
    check.parse('{"day": "2026-02-28"}')
    check.parse('{"day": 7}')
    with pytest.raises(OutputInvalid) as caught:
        check.parse('{"day": "2026-02-30"}')
    assert caught.value.metadata == {"pointer": "/day", "keyword": "format"}


@pytest.mark.parametrize("name", ["int32", "path", "ISO 8601", "/^[0-9]{4}/", ""])
def test_what_no_draft_defines_says_nothing(name: str) -> None:
    AnswerValidator(json.dumps({"format": name})).parse('"any text"')


@given(st.datetimes(timezones=st.just(datetime.timezone.utc)))
def test_moments(moment: datetime.datetime) -> None:
    assert FORMATS["date-time"](moment.isoformat())
    assert FORMATS["date"](moment.date().isoformat())
    assert FORMATS["time"](moment.timetz().isoformat())


@given(st.uuids(), st.ip_addresses())
def test_identifiers(identifier: uuid.UUID, address: ipaddress.IPv4Address) -> None:
    assert FORMATS["uuid"](str(identifier))
    assert FORMATS[f"ipv{address.version}"](str(address))


@settings(max_examples=30)  # making addresses takes longer than checking them
@given(st.emails())
def test_emails(address: str) -> None:
    assert FORMATS["email"](address)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=3))
def test_names_in_any_script_are_judged_as_their_punycode(labels: list[str]) -> None:
    name = ".".join(labels)
    if FORMATS["idn-hostname"](name):
        plain = ".".join(
            label if label.isascii() else "xn--" + label.encode("punycode").decode()
            for label in re.split("[.\u3002\uff0e\uff61]", name)
        )
        assert FORMATS["hostname"](plain)
        assert FORMATS["idn-hostname"](plain)


@given(st.text("abxyz0189-", max_size=12))
def test_any_punycode_is_judged(text: str) -> None:
    assert FORMATS["idn-hostname"]("xn--" + text) in (True, False)


@given(st.text(max_size=30) | st.text("0123456789-:.TZPYMDHS/[]@%{}~#+ ", max_size=30))
def test_any_text_is_judged(text: str) -> None:
    for check in FORMATS.values():
        assert check(text) in (True, False)


@pytest.mark.parametrize(
    "unit", ["a", "ü", "xn--", "1", "a.", "a,", "a@", ":", "/", "%41", "[", "{a", "~0/", "P1", "("]
)
@pytest.mark.slow
def test_long_texts_take_linear_time(unit: str) -> None:
    """A backtracking expression would take hours for one of these; the bound is far off."""
    began = time.process_time()
    for check in FORMATS.values():
        check(unit * 20_000)
        check("a@" + unit * 20_000 + "!")
        check("http://" + unit * 20_000 + " ")
        check("{" + unit * 20_000 + "!")
    assert time.process_time() - began < 30


@pytest.mark.parametrize("name", ["xn--X", "xn--hello-txk", "a.xn--", "XN--a"])
def test_punycode_that_stands_for_no_name(name: str) -> None:
    assert not FORMATS["hostname"](name)
    assert not FORMATS["email"](f"a@{name}")
