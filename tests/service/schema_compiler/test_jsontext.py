"""How many values a JSON text may have."""

from __future__ import annotations

import pytest

from service.schema_compiler import jsontext


@pytest.mark.parametrize(
    ("most", "text"),
    [
        (4, "[1, 2, 3]"),
        (4, "[[], {}, [ ]]"),
        (3, '{"a": {"b": 1}}'),
        (2, '["a,[{,,,"]'),
        (3, r'["a\",,,", 1]'),
    ],
)
def test_a_text_may_have_a_limited_number_of_values(
    monkeypatch: pytest.MonkeyPatch, most: int, text: str
) -> None:
    monkeypatch.setattr(jsontext, "MAX_VALUES", most)
    jsontext.decode(text)
    monkeypatch.setattr(jsontext, "MAX_VALUES", most - 1)
    with pytest.raises(jsontext.JsonTextError, match=f"more than {most - 1} values"):
        jsontext.decode(text)
