"""What is kept stays within its bounds."""

from __future__ import annotations

from service.schema_compiler.cache import Kept


def test_what_is_kept_is_not_made_again() -> None:
    made: list[str] = []
    kept: Kept[str] = Kept(max_entries=2, max_characters=100)

    def get(key: str, characters: int = 1) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return kept.get(key, characters, make)

    assert [get("a"), get("b"), get("a")] == ["A", "B", "A"]
    assert made == ["a", "b"]
    get("c")  # the one used last but one has to go
    get("a")
    get("b")
    assert made == ["a", "b", "c", "b"]


def test_long_texts_leave_room_for_few() -> None:
    made: list[int] = []
    kept: Kept[None] = Kept(max_entries=100, max_characters=100)
    for key in (1, 2, 3, 1, 3):
        kept.get(key, 40, lambda key=key: made.append(key))  # type: ignore[misc]
    assert made == [1, 2, 3, 1]
    kept.get(4, 1000, lambda: made.append(4))
    kept.get(4, 1000, lambda: made.append(4))  # the last one, whatever its length
    kept.get(3, 40, lambda: made.append(3))
    assert made == [1, 2, 3, 1, 4, 3]
