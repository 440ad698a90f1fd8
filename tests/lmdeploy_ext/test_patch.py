"""The mechanism of records, on a made-up host."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lmdeploy_ext import patch
from lmdeploy_ext.patch import Entry, HostDrift, Patch, applied, apply_all, revert_all


class Base:
    flag = False

    def inherited(self) -> str:
        return "base"


class Engine(Base):
    def __init__(self) -> None:
        self.size = 3

    def plain(self, x: int, *, y: int = 1) -> int:
        return x + y

    @staticmethod
    def static(x: int) -> int:
        return x

    @classmethod
    def of_class(cls, x: int) -> tuple[str, int]:
        return cls.__name__, x

    @property
    def length(self) -> int:
        return self.size

    @length.setter
    def length(self, value: int) -> None:
        self.size = value


class Other(Engine):
    pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module: Any = ModuleType("made_up_host")
    module.Engine, module.ARCHS, module.limit = Engine, {"a": 1, "b": 2}, 7
    module.MODELS = SimpleNamespace(module_dict={"a": Base})  # as mmengine's Registry
    monkeypatch.setitem(sys.modules, "made_up_host", module)
    monkeypatch.setattr(patch, "_applied", {})
    yield module
    revert_all()


def record(target: str, replace: Any, signature: str | None = None, name: str = "") -> Patch:
    return Patch(name or target, f"made_up_host:{target}", "why", "when", replace, signature)


def entry(target: str, key: str, value: Any = 9) -> Entry:
    return Entry(f"{target} {key}", f"made_up_host:{target}", key, lambda: value, "why", "when")


def test_a_method_is_replaced_and_restored(host: Any) -> None:
    def replace(original: Any) -> Any:
        return lambda self, x, *, y=1: 10 * original(self, x, y=y)

    before = dict(vars(Engine))
    apply_all([record("Engine.plain", replace, "(self, x, *, y=1)")])
    assert Engine().plain(1, y=2) == 30
    revert_all()
    assert dict(vars(Engine)) == before


def test_static_and_class_methods_stay_what_they_are(host: Any) -> None:
    before = dict(vars(Engine))
    apply_all(
        [
            record("Engine.static", lambda original: lambda x: -original(x), "(x)"),
            record(
                "Engine.of_class", lambda original: lambda cls, x: original(cls, -x), "(cls, x)"
            ),
        ]
    )
    assert (Engine.static(2), Engine().static(3)) == (-2, -3)
    assert (Engine.of_class(2), Other.of_class(3)) == (("Engine", -2), ("Other", -3))
    revert_all()
    assert dict(vars(Engine)) == before


def test_property_keeps_its_setter(host: Any) -> None:
    apply_all([record("Engine.length", lambda get: lambda self: get(self) + 100, "(self)")])
    engine = Engine()
    engine.length = 5
    assert engine.length == 105
    revert_all()
    assert engine.length == 5


def test_inherited_attribute_is_inherited_again(host: Any) -> None:
    apply_all(
        [
            record("Engine.inherited", lambda original: lambda self: "patched", "(self)"),
            record("Engine.flag", lambda original: not original),
        ]
    )
    assert (Engine().inherited(), Engine.flag) == ("patched", True)
    assert (Base().inherited(), Base.flag) == ("base", False)
    revert_all()
    assert "inherited" not in vars(Engine)
    assert "flag" not in vars(Engine)


def test_module_attribute(host: Any) -> None:
    apply_all([record("limit", lambda original: original + 1)])
    assert host.limit == 8
    revert_all()
    assert host.limit == 7


def test_entries_in_a_dict_and_in_a_registry(host: Any) -> None:
    archs, models = list(host.ARCHS.items()), list(host.MODELS.module_dict.items())
    apply_all([entry("ARCHS", "c"), entry("MODELS", "b", Engine)])
    assert host.ARCHS["c"] == 9
    assert host.MODELS.module_dict["b"] is Engine
    revert_all()
    assert list(host.ARCHS.items()) == archs
    assert list(host.MODELS.module_dict.items()) == models


def test_applying_twice_changes_nothing(host: Any, caplog: pytest.LogCaptureFixture) -> None:
    records = [record("limit", lambda original: original + 1), entry("ARCHS", "c")]
    with caplog.at_level(logging.INFO, "lmdeploy_ext"):
        apply_all(records)
        apply_all(records)
    assert host.limit == 8
    assert applied() == ("limit", "ARCHS c")
    assert [line.message for line in caplog.records] == [
        "LMDeploy: limit (made_up_host:limit)",
        "LMDeploy: ARCHS c (made_up_host:ARCHS)",
    ]


def test_two_records_on_one_target_stack_and_come_off_in_turn(host: Any) -> None:
    apply_all(
        [
            record("limit", lambda original: original + 1, name="plus"),
            record("limit", lambda original: original * 10, name="times"),
        ]
    )
    assert host.limit == 80
    revert_all()
    assert host.limit == 7


@pytest.mark.parametrize(
    ("target", "signature", "message"),
    [
        ("Engine.gone", None, "made_up_host:Engine.gone does not exist"),
        ("Gone.plain", None, "made_up_host:Gone.plain does not exist"),
        ("Engine.plain", "(self, x)", r"takes \(self, x, \*, y=1\), not \(self, x\)"),
        ("limit", "(x)", "no longer a function"),
    ],
)
def test_a_changed_target_is_drift(
    host: Any, target: str, signature: str | None, message: str
) -> None:
    good = record("limit", lambda original: 0, name="good")
    with pytest.raises(HostDrift, match=message) as caught:
        apply_all([good, record(target, lambda original: original, signature)], "Do this.")
    assert len(caught.value.problems) == 1
    assert str(caught.value).endswith("Do this.")
    assert host.limit == 7, "nothing may be changed"
    assert applied() == ()


def test_missing_module(host: Any) -> None:
    broken = Patch("x", "made_up_host.gone:f", "why", "when", lambda original: original)
    with pytest.raises(HostDrift, match=r"made_up_host\.gone:f does not exist"):
        apply_all([broken])


def test_an_entry_never_replaces_an_existing_key(host: Any) -> None:
    with pytest.raises(HostDrift, match="already has 'a'"):
        apply_all([entry("ARCHS", "a")])
    assert host.ARCHS == {"a": 1, "b": 2}
    with pytest.raises(HostDrift, match="neither a dict nor a registry"):
        apply_all([entry("limit", "a")])


def test_one_error_names_every_problem_once(host: Any) -> None:
    records = [entry("GONE", "a"), entry("GONE", "b"), record("Engine.gone", lambda original: 0)]
    with pytest.raises(HostDrift) as caught:
        apply_all(records, found=["known before"])
    first, second, third = caught.value.problems
    assert first == "known before"
    assert second.endswith("needed by: GONE a, GONE b")
    assert third.endswith("needed by: Engine.gone")


def test_a_replacement_that_fails_leaves_nothing_behind(host: Any) -> None:
    def fail(original: Any) -> Any:
        raise ImportError("no such module")

    with pytest.raises(ImportError):
        apply_all([entry("ARCHS", "c"), record("Engine.plain", fail), entry("ARCHS", "d")])
    assert host.ARCHS == {"a": 1, "b": 2}
    assert applied() == ()


def test_names_are_unique(host: Any) -> None:
    with pytest.raises(ValueError, match="one name"):
        apply_all([entry("ARCHS", "c"), entry("ARCHS", "c")])
