"""Where tasks come from, and what stops the start."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from service.errors import GrammarError, UnknownTask
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.schema_compiler.report import Analysed, Enforcement
from service.settings import Settings
from service.tasks import registry
from service.tasks.contract import Task
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.tasks.registry import TaskSourceError, load_registry, try_grammars
from service.types import Grammar, GrammarKind, PropertyOrder
from service.wiring import build_registry

FROM_PACKAGE = Task("from-package", "Of a package.", user="Go.")
NOT_A_TASK = 7
BADLY_NAMED = Task("Bad Name", "Of a package.", user="Go.")
SILENT = Task("silent", "Of a package.", user=" ")
BAD_GRAMMAR = Task("bad", "Of a package.", user="Go.", grammar=Grammar(GrammarKind.REGEX, "("))

GOOD = """
description: Counts people.
system: Be exact.
user: How many people?
needs_image: true
max_images: 2
json_schema:
  type: object
  properties: {people: {type: integer}}
  required: [people]
"""


def make() -> Task:
    return FROM_PACKAGE


def broken() -> Task:
    raise RuntimeError("no luck")


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def problems(folder: Path | None) -> str:
    with pytest.raises(TaskSourceError) as caught:
        load_registry(folder)
    return str(caught.value)


def test_built_in() -> None:
    tasks = load_registry(None)
    (task,) = tasks.list()
    assert tasks.get("image-analysis") is task
    assert task.grammar is not None
    assert task.report is not None
    assert task.report.enforcement is Enforcement.ENFORCED, "so it is never tried again"
    grammar = replace(
        task.grammar, ebnf="", forces_little=False, lengths_beside=False, prompt_schema=""
    )
    assert replace(task, grammar=grammar, report=None) == IMAGE_ANALYSIS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("image-analisys", "Did you mean: image-analysis?"),
        ("xyz", "Known tasks: image-analysis."),
        ("", "Known tasks: image-analysis."),
        ("x" * 100_000, "Known tasks: image-analysis."),
    ],
)
def test_an_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(UnknownTask) as caught:
        load_registry(None).get(name)
    assert caught.value.message == f"No task of this name. {hint}"


def test_a_folder_of_tasks(tmp_path: Path) -> None:
    plain = json.dumps({"name": "plain", "description": "Any.", "user": "Say."})
    asked = "description: Yes or no.\nuser: Is it?\nchoice: ['yes', 'no']"
    write(
        tmp_path, count__yaml=GOOD, a__json=plain, c__yml=asked, notes__txt="x", __hidden__yaml=""
    )
    tasks = load_registry(tmp_path)
    assert [t.name for t in tasks.list()] == ["c", "count", "image-analysis", "plain"]
    count = tasks.get("count")
    assert (count.system, count.needs_image, count.max_images) == ("Be exact.", True, 2)
    assert count.grammar is not None
    assert json.loads(count.grammar.source)["required"] == ["people"]
    choice = tasks.get("c").grammar
    assert choice is not None
    assert (choice.kind, choice.source) == (GrammarKind.CHOICE, '["yes", "no"]')
    assert tasks.get("plain").grammar is None


def test_property_order(tmp_path: Path) -> None:
    base = "description: d\nuser: u\njson_schema: {properties: {b: {}, a: {}}}\n"
    for order in ("any", "declared"):
        (tmp_path / f"{order}.yaml").write_text(f"{base}property_order: {order}")
    (tmp_path / "unsaid.yaml").write_text(base)
    for default in PropertyOrder:
        tasks = load_registry(tmp_path, property_order=default)
        found = {task.name: task.grammar for task in tasks.list() if task.grammar is not None}
        orders = {name: grammar.property_order for name, grammar in found.items()}
        assert orders["any"] is PropertyOrder.ANY
        assert orders["declared"] is orders["image-analysis"] is PropertyOrder.DECLARED
        assert orders["unsaid"] is default
        assert found["unsaid"].ebnf == found[default.value].ebnf
    assert found["any"].ebnf != found["declared"].ebnf


BASE = "description: d\nuser: u\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user: u", "description: is missing; it must be text of 1 to 1000 characters\n"),
        (
            BASE + "colour: red",
            "colour: is not a key of a task file; the keys are name, description",
        ),
        (BASE + "regexp: a", "regexp: is not a key of a task file; did you mean regex?\n"),
        (
            BASE + "name: Bad Name",
            'name: must be lower-case words joined by hyphens, of at most 64 characters in all, not "Bad Name"\n',
        ),
        (BASE + "name: 7", "in all, not the number 7\n"),
        (BASE + "name: 'ok\n\n  '", "name:"),
        ("description: d\nuser: ' '", 'user: must be text that is not blank, not " "\n'),
        (BASE + "needs_image: 1", "needs_image: must be true or false, not the number 1\n"),
        (
            BASE + "max_images: 0",
            "max_images: must be a whole number of at least 1, not the number 0\n",
        ),
        (BASE + "regex: a\nchoice: [a]", "regex and choice: give only one of them"),
        (BASE + "regex: (", "regex: missing closing parenthesis"),
        (BASE + "choice: []", "choice: is empty"),
        (BASE + "choice: [a, '']", "choice[1]: is blank"),
        (BASE + "json_schema: {type: strin}", 'json_schema: at "/type"'),
        (BASE + "json_schema: {$ref: 'http://x'}", "points outside this schema"),
        (BASE + "user: v", 'file: duplicate key "user" at line 3'),
        (BASE + "json_schema: {a: 1, a: 2}", 'file: duplicate key "a" at line 3'),
        ("a: [", "file: is not YAML"),
        ("- a", "file: must hold keys and values"),
        ("", "file: must hold keys and values"),
        ("a: &x [1]\nb: *x", "file: anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.getcwd []", "file: is not YAML"),
        ("[" * 5000, "file:"),
        (BASE + "needs_image: yes", 'needs_image: must be true or false, not "yes"\n'),
        (
            BASE + "max_images: 1.5",
            "max_images: must be a whole number of at least 1, not the number 1.5",
        ),
        ("description: 7\nuser: u", "characters, not the number 7; put it in quotes\n"),
        (BASE + "system:", "system: must be text, not empty\n"),
        (BASE + "choice: [a, true, 1.10]", "choice[1]: must be text, not true; put it in quotes\n"),
        (
            BASE + "choice: [a, true, 1.10]",
            "choice[2]: must be text, not the number 1.10; put it in quotes\n",
        ),
        (BASE + "choice: a", 'choice: must be a list of texts, not "a"\n'),
        (BASE + "property_order: any", "property_order: is for a json_schema alone"),
        (BASE + "regex: a\nproperty_order: any", "property_order: is for a json_schema alone"),
        (
            BASE + "json_schema: true\nproperty_order: sorted",
            'property_order: must be declared or any, not "sorted"\n',
        ),
        (BASE + "regex: 1", "regex: must be text, not the number 1; put it in quotes\n"),
        (
            BASE + "json_schema: [a]",
            "json_schema: must be a mapping, true, false, or the JSON text of a schema, not a list\n",
        ),
        (BASE + "json_schema: 7", "of a schema, not the number 7; put it in quotes\n"),
        (
            BASE + "json_schema: {const: !!timestamp 2026-01-01}",
            'the tag "tag:yaml.org,2002:timestamp" is not allowed at line 3',
        ),
        (
            BASE + "json_schema: {maximum: 1e999}",
            "file: a number is too large or too small at line 3, column 24\n",
        ),
        (BASE + "json_schema: {? [a] : b}", "file: a key must be text at line 3"),
        (BASE + "json_schema: !!map a", "file: is not a mapping at line 3, column 14\n"),
        (BASE + "choice: !!seq a", "file: is not a list at line 3, column 9\n"),
        (BASE + "max_images: !!int x1", 'file: "x1" is not an integer at line 3, column 13\n'),
        (BASE + "needs_image: !!bool yes", 'file: "yes" is not true or false at line 3'),
        (BASE + "system: !!null none", 'file: "none" is not null at line 3, column 9\n'),
        (BASE + "json_schema: {maximum: !!float a}", 'file: "a" is not a number at line 3'),
        (BASE + f"max_images: {'9' * 5000}", "file: too many digits at line 3, column 13\n"),
        (
            BASE + f"json_schema: {{maximum: 1e{'9' * 20}}}",
            "file: a number is too large or too small at line 3, column 24\n",
        ),
        (BASE + "system: a\x07b", "file: is not YAML: the character U+0007 at line 3 is not"),
    ],
)
def test_a_bad_file_is_named_with_field_and_reason(
    tmp_path: Path, text: str, expected: str
) -> None:
    message = problems(write(tmp_path, mine__yaml=text)) + "\n"
    assert "pydantic" not in message
    assert f"mine.yaml: {expected}" in message or (expected in message and "mine.yaml: " in message)
    assert str(tmp_path) not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "bad.json: file: is not JSON"),
        ('{"user": "a", "user": "b"}', 'bad.json: file: is not JSON: duplicate key "user"'),
        (
            '{"description": "d", "user": 1.10}',
            "user: must be text that is not blank, not the number 1.10; put it in quotes",
        ),
    ],
)
def test_json_is_strict(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problems(write(tmp_path, bad__json=text))


def test_files_that_are_not_text_or_too_large_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.yaml").write_text("#" * 1_100_000)
    message = problems(tmp_path)
    assert "a.yaml: file: cannot be read" in message
    assert "b.yaml: file: has more than" in message


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    """A pipe and a device would be read for ever."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    (tmp_path / "loop.yml").symlink_to(tmp_path / "loop.yml")
    (tmp_path / "nowhere.yml").symlink_to(tmp_path / "absent")
    (tmp_path / "folder.yaml").mkdir()
    lines = problems(tmp_path).splitlines()[1:]
    names = ["device.json", "folder.yaml", "loop.yml", "nowhere.yml", "pipe.yaml"]
    assert lines == [f"  {name}: file: is not a file that can be read" for name in names]


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    """As Kubernetes mounts them: each file a link into a folder that is a link, too."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "count.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "count.yaml").symlink_to("..data/count.yaml")
    assert load_registry(tmp_path).get("count").needs_image


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 200_000, "is nested more than 100 levels deep"),
        ("- " * 120_000, "is nested more than 100 levels deep"),
        ("a: &a [x, x]\n" + "b: *a\n" * 1000, "anchors and aliases are not allowed"),
        pytest.param("a: " + "[1, 2], " * 20_000, "is not YAML", marks=pytest.mark.slow),
        ("? " * 100_000, "is nested more than 100 levels deep"),
    ],
    ids=["flow", "block", "aliases", "long", "keys"],
)
def test_hostile_yaml_is_refused_quickly(tmp_path: Path, text: str, expected: str) -> None:
    began = time.process_time()
    assert expected in problems(write(tmp_path, bad__yaml=text))
    assert time.process_time() - began < 20


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_numbers_that_json_does_not_have(tmp_path: Path, number: str) -> None:
    text = BASE + f"json_schema: {{maximum: {number}}}"
    message = problems(write(tmp_path, bad__yaml=text))
    assert f"bad.yaml: file: JSON has no number {number} at line 3" in message


def test_plain_scalars_are_those_of_json(tmp_path: Path) -> None:
    """YAML 1.1 would read them as booleans, dates, times and octal numbers."""
    words = [
        "yes",
        "no",
        "On",
        "off",
        "y",
        "N",
        "2026-11-29",
        "12:30:45",
        "1_000",
        "=",
        "<<",
        "tRUE",
    ]
    values = "[~, null, true, False, 010, 0o17, 0x1F, 1.10, -0.5, 1e3, 0.10000000000000000000001]"
    choices = "".join(f"- {word}\n" for word in words)
    schema = f"json_schema: {{properties: {{a: {{enum: {values}}}, yes: {{enum: [{', '.join(words)}]}}}}}}"
    write(tmp_path, words__yaml=BASE + "choice:\n" + choices, schema__yaml=BASE + schema)
    tasks = load_registry(tmp_path)
    choice, source = tasks.get("words").grammar, tasks.get("schema").grammar
    assert choice is not None
    assert json.loads(choice.source) == words
    assert source is not None
    properties = json.loads(source.source, parse_float=str)["properties"]
    assert properties == {
        "a": {
            "enum": [
                None,
                None,
                True,
                False,
                10,
                15,
                31,
                "1.10",
                "-0.5",
                "1E+3",
                "0.10000000000000000000001",
            ]
        },
        "yes": {"enum": words},
    }


def test_numbers_of_json_files_keep_their_digits(tmp_path: Path) -> None:
    schema = '{"enum": [0.10000000000000000000001, 1.10, 12, 1e3]}'
    start = '{"description": "d", "user": "u"'
    write(tmp_path, exact__json=f'{start}, "json_schema": {schema}}}')
    grammar = load_registry(tmp_path).get("exact").grammar
    assert grammar is not None
    assert json.loads(grammar.source, parse_float=str) == {
        "enum": ["0.10000000000000000000001", "1.10", 12, "1E+3"]
    }


def test_yaml_keys_are_always_text(tmp_path: Path) -> None:
    schema = "json_schema: {properties: {404: {type: string}, true: {}, null: {}, 1.0: {}}}"
    grammar = load_registry(write(tmp_path, keys__yaml=BASE + schema)).get("keys").grammar
    assert grammar is not None
    assert list(json.loads(grammar.source)["properties"]) == ["404", "true", "null", "1.0"]


def test_a_yaml_date_is_text() -> None:
    folder = Path(__file__).parents[4] / "shared" / "cases" / "tasks"
    if not folder.is_dir():
        pytest.skip("needs ../shared/cases/tasks, task files from practice")
    grammar = load_registry(folder).get("d").grammar
    assert grammar is not None
    assert json.loads(grammar.source)["properties"]["a"]["enum"] == ["2024-01-01"]


def test_the_limits_of_the_settings_hold(tmp_path: Path) -> None:
    write(tmp_path, deep__yaml=BASE + "json_schema: {items: {items: {items: {}}}}")
    with pytest.raises(TaskSourceError, match="nested 4 levels deep, at most 3"):
        build_registry(Settings(tasks_dir=tmp_path, max_schema_depth=3))
    assert build_registry(Settings(tasks_dir=tmp_path)).get("deep")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    message = problems(
        write(tmp_path, a__yaml="x: 1", b__yaml="user: [", c__yaml=BASE + "regex: (")
    )
    assert [f"{name}.yaml" in message for name in "abc"] == [True] * 3
    assert "description: is missing" in message
    assert "user: is missing" in message


def test_duplicate_task_names_are_refused(tmp_path: Path) -> None:
    write(tmp_path, a__yaml=BASE + "name: image-analysis", b__yaml=BASE + "name: x", x__yml=BASE)
    message = problems(tmp_path)
    assert "a.yaml: name: image-analysis is already the name of a task (built in)" in message
    assert "x.yml: name: x is already the name of a task (b.yaml)" in message


async def test_grammars_that_the_workers_refuse_end_the_start(tmp_path: Path) -> None:
    """The syntax of EBNF is only read there. Every task is tried, and all problems are told at once."""
    asked: list[Grammar] = []

    async def workers(grammar: Grammar, limits: SchemaLimits) -> Analysed:
        asked.append(grammar)
        if "(" in grammar.source:
            raise GrammarError("grammar.ebnf", "has a bracket that nothing closes")
        return analyse(grammar, limits)

    texts = {"fine__yaml": "regex: a+", "free__yaml": "", "two__yaml": "ebnf: 'root ::= (\"a\"'"}
    every = {name: BASE + text for name, text in texts.items()}
    loaded = load_registry(write(tmp_path, one__yaml=BASE + "ebnf: 'root ::= ('", **every))
    with pytest.raises(TaskSourceError) as caught:
        await try_grammars(loaded, workers, DEFAULT_LIMITS)
    assert str(caught.value) == (
        "Tasks cannot be used:\n"
        "  one: ebnf: has a bracket that nothing closes\n"
        "  two: ebnf: has a bracket that nothing closes"
    )
    grammars = [task.grammar for task in loaded.list() if task.grammar]
    assert {(one.kind, one.source) for one in asked} == {(g.kind, g.source) for g in grammars}
    assert {grammar.ebnf for grammar in asked} == {""}
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).unlink()
    await try_grammars(load_registry(tmp_path), workers, DEFAULT_LIMITS)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "tasks_dir: is not a folder" in problems(tmp_path / "none")


def entry(name: str) -> EntryPoint:
    return EntryPoint(name=name, value=f"{__name__}:{name}", group=registry.ENTRY_POINTS)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    found: list[EntryPoint] = []
    real: Any = EntryPoint.load
    monkeypatch.setattr(EntryPoint, "load", lambda e: globals().get(e.name) or real(e))
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    return found


@pytest.mark.parametrize("name", ["FROM_PACKAGE", "make"])
def test_entry_points(entries: list[EntryPoint], name: str) -> None:
    entries.append(entry(name))
    assert load_registry(None).get("from-package") is FROM_PACKAGE


ENTRIES = ("broken", "NOT_A_TASK", "BADLY_NAMED", "SILENT", "BAD_GRAMMAR", "absent")


def test_bad_entry_points_are_all_named(entries: list[EntryPoint]) -> None:
    entries += [entry(name) for name in ENTRIES]
    message = problems(None)
    assert "entry point broken: cannot be loaded: RuntimeError: no luck" in message
    assert "entry point NOT_A_TASK: is a int, not a Task" in message
    assert "entry point BADLY_NAMED: name: 'Bad Name' does not match" in message
    assert "entry point SILENT: user: is empty" in message
    assert "entry point BAD_GRAMMAR: regex: missing closing parenthesis" in message
    assert "entry point absent: cannot be loaded" in message
