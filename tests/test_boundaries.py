"""Who may import whom: read from the source, and checked in a fresh interpreter for what must stay light.

``ARCHITECTURE.md`` shows the same directions. Every rule is a function of the sources, which says what
breaks it. It is tried on the sources as they are, and on sources with an import that it forbids.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from docs.generate import ARCHITECTURE, architecture_page
from tests.imports import (
    Sources,
    below,
    cycle,
    deferring,
    directions,
    importers,
    imports,
    sources_of,
    unit_of,
)

ROOT = Path(__file__).parents[1]

VALUES = {"types", "errors"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "error_table": {"errors"},
    "observation": {*VALUES, "error_table"},
    "deadlines": set(),
    "logs": set(),
    "heap": set(),
    "access_log": {"logs", "observation"},
    "traces": {"observation"},
    "web": {"reload"},
    "request_ids": set(),
    "compile_errors": VALUES,
    "engine": {"types"},
    "metrics": {"types", "error_table", "observation", "lifecycle"},
    "admin": {"metrics", "web", "lifecycle", "settings"},
    "lifecycle": {"errors"},
    "refusals": {"errors", "lifecycle", "logs"},
    "unread": {"lifecycle"},
    "heartbeat": {*VALUES, "engine", "lifecycle", "logs", "settings"},
    "schema_compiler": VALUES,
    "structured_output": {
        *VALUES, "schema_compiler", "engine", "deadlines", "logs", "metrics", "compile_errors", "observation",
        "fairness",
    },
    "tasks": {*VALUES, "schema_compiler", "structured_output"},
    "engines": {*VALUES, "engine", "metrics", "compile_errors", "client", "deadlines"},
    "image_hosts": set(),
    "settings": {"engines", "image_hosts", "quotas"},
    "fairness": set(),
    "quotas": {"errors"},
    "reload": {"settings"},
    "auth": {"errors", "logs", "quotas", "settings"},
    "inference": {
        *VALUES, "tasks", "structured_output", "schema_compiler", "engine", "deadlines", "logs", "settings",
        "quotas", "observation", "fairness",
    },
    "runtime": {
        "errors", "auth", "inference", "tasks", "structured_output", "engine", "settings", "lifecycle", "heartbeat",
        "logs", "metrics", "admin", "observation", "reload", "access_log", "traces", "quotas", "heap",
    },
    "grpc_api": {
        *VALUES, "error_table", "reload", "runtime", "inference", "tasks", "structured_output", "schema_compiler",
        "refusals", "unread", "engine", "settings", "lifecycle", "logs", "auth", "quotas", "deadlines", "observation",
        "metrics", "request_ids", "heap",
    },
    "http_api": {
        *VALUES, "error_table", "runtime", "inference", "schema_compiler", "settings", "lifecycle", "refusals",
        "unread", "image_hosts", "logs", "auth", "quotas", "deadlines", "request_ids", "web", "observation",
    },
}  # fmt: skip
"""Module or package below ``service/`` -> what it may import of the service. The command line, the
wiring, batches and the client are the outer layer and may import everything."""

OUTER = {"__main__", "batch", "cli", "client", "wiring", "pb"}
REGISTRY = {"service.engines.kind", "service.engines.registry"}

DEFERRED = {
    "service/batch": "Ray reads its environment at its import, and users of Ray import it first",
    "service/cli": "the command line answers --help without loading what a command needs",
    "service/engines": "torch, LMDeploy and the hub are imported when an engine starts",
    "service/http_api/server.py": "the client for HTTP is imported where images are fetched by URL",
    "service/schema_compiler/regex/matching.py": "look-aheads need automata, which ask the matcher for sets",
    "service/traces.py": "OpenTelemetry is an extra, and imported where traces are on",
    "service/structured_output/trial.py": "xgrammar is imported by the process that may crash",
    "service/structured_output/worker.py": "the process tells that it is there before it imports",
    "lmdeploy_ext": "LMDeploy and torch are imported when the extension is installed or used",
}
"""Where imports stand inside functions, and why."""


STAGES: dict[str, set[str]] = {
    "regex": set(),
    "frontend": {"regex"},
    "normalize": {"frontend", "regex"},
    "ir": {"regex"},
    "lower": {"frontend", "normalize", "ir", "regex"},
    "emit": {"ir", "regex"},
}
"""Stage of the schema compiler -> the other stages that it may import. ``emit`` knows no keyword of JSON
Schema, and no stage before it knows the syntax of grammars."""


SOURCES = sources_of(ROOT, "service", "lmdeploy_ext")


# The directions of ALLOWED


def wrong_directions(
    sources: Sources, unit: str, allowed: Mapping[str, set[str]] = ALLOWED
) -> set[str]:
    """Arrows that are not allowed, and allowed ones that nothing uses."""
    found = directions(sources, unit)
    found.pop("pb", None)  # has a rule of its own
    forbidden = {
        f"{file} imports {other}"
        for other, files in found.items()
        for file in files
        if other not in allowed[unit]
    }
    return forbidden | {f"{unit} never imports {other}" for other in allowed[unit] - found.keys()}


def unlisted_units(sources: Sources, allowed: Mapping[str, set[str]] = ALLOWED) -> set[str]:
    """Units without a row, and rows without a unit."""
    units = {unit_of(file) for file in sources if below(file, "service")} - {"__init__"}
    return units ^ (allowed.keys() | (OUTER - {"pb"}))


def outdated(page: str, allowed: Mapping[str, set[str]] = ALLOWED) -> bool:
    """Whether the table of ARCHITECTURE.md is not that of ``allowed``."""
    return page != architecture_page(allowed)


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports_follow_the_allowed_directions(unit: str) -> None:
    assert wrong_directions(SOURCES, unit) == set()


def test_every_unit_has_its_directions() -> None:
    assert unlisted_units(SOURCES) == set()


def test_the_architecture_page_shows_the_directions() -> None:
    assert not outdated(ARCHITECTURE.read_text(encoding="utf-8")), (
        "the table in ARCHITECTURE.md is out of date: run `make docs` (python -m docs.generate)"
    )


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "docs/extending.md"])
def test_the_pages_name_files_that_exist(page: str) -> None:
    """So whoever moves a module corrects the page that sends a newcomer to it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(\.?\w[\w.-]*/[\w./-]*)`", text))
    assert len(named) > 5
    assert {name for name in named if not (ROOT / name).exists()} == set()


# Rules on single packages: each gives the modules that break it


def cyclic(sources: Sources) -> set[str]:
    """A circle of imports at module level."""
    return {" -> ".join(cycle(sources))} - {""}


def deferred_without_reason(sources: Sources) -> set[str]:
    return {file for file in deferring(sources) if not below(file, *DEFERRED)}


def front_ends_beyond_their_place(sources: Sources) -> set[str]:
    """Front ends know no engine and not each other."""
    fronts = {file.split("/")[1] for file in sources if re.match(r"service/\w+_api/", file)}
    return {
        file
        for front in fronts
        for file in importers(
            sources,
            f"service/{front}",
            "service.engines",
            *(f"service.{other}" for other in fronts - {front}),
        )
    }


def extension_on_the_service(sources: Sources) -> set[str]:
    return importers(sources, "lmdeploy_ext", "service")


def compiler_stages_out_of_order(sources: Sources) -> set[str]:
    compiler = "service/schema_compiler"
    return {
        file
        for stage, allowed in STAGES.items()
        for other in (STAGES.keys() | {"api", "stages"}) - allowed - {stage}
        for file in importers(sources, f"{compiler}/{stage}", f"service.schema_compiler.{other}")
    }


def only_in(*places: str, of: tuple[str, ...]) -> Callable[[Sources], set[str]]:
    """The rule that only some places of the service import some modules."""

    def broken(sources: Sources) -> set[str]:
        return {file for file in importers(sources, "service", *of) if not below(file, *places)}

    return broken


def extension_beyond_its_place(sources: Sources) -> set[str]:
    """Engines use the extension; others only what is independent of LMDeploy: inference and the
    wiring the images, the trial of grammars the import of xgrammar without torch."""

    def allowed(file: str, name: str) -> bool:
        return (
            name.partition(".")[0] != "lmdeploy_ext"
            or below(file, "service/engines")
            or (
                name.startswith("lmdeploy_ext.images")
                and below(file, "service/inference", "service/wiring.py")
            )
            or (name.startswith("lmdeploy_ext.grammars.light") and file == TRIAL)
        )

    return {
        file
        for file in importers(sources, "service", "lmdeploy_ext")
        if not all(allowed(file, name) for name in imports(sources[file]))
    }


TRIAL = "service/structured_output/trial.py"
RULES: dict[str, Callable[[Sources], set[str]]] = {
    "no cycles at module level": cyclic,
    "imports inside functions have a reason": deferred_without_reason,
    "front ends know no engine and not each other": front_ends_beyond_their_place,
    "the extension never imports the service": extension_on_the_service,
    "stages of the schema compiler import only the stages before them": compiler_stages_out_of_order,
    "only the LMDeploy engine imports LMDeploy": only_in(
        "service/engines/lmdeploy", of=("lmdeploy",)
    ),
    "only engines import the extension, and others what knows no LMDeploy": extension_beyond_its_place,
    "only engines import torch and transformers": only_in(
        "service/engines", of=("torch", "transformers", "tokenizers")
    ),
    "xgrammar runs in engines and in processes that can be killed": only_in(
        "service/engines", TRIAL, of=("xgrammar",)
    ),
    "only workers try out grammars": only_in(
        "service/structured_output/worker.py", of=("service.structured_output.trial",)
    ),
    "only the wiring picks an engine": only_in(
        "service/engines",
        "service/wiring.py",
        "service/settings.py",
        "service/cli/discover.py",
        "service/batch/job.py",  # the connection to Ray alone
        of=("service.engines",),
    ),
    "generated code stays at the edge": only_in(
        "service/grpc_api",
        "service/client.py",
        "service/cli",
        "service/batch",
        "service/engines/remote",
        of=("service.pb",),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_no_module_breaks_an_import_rule(rule: str) -> None:
    assert RULES[rule](SOURCES) == set()


def test_the_scan_sees_imports() -> None:
    assert "service/engine.py" in importers(SOURCES, "service", "service.types")
    assert "service/grpc_api/codec.py" in importers(SOURCES, "service", "service.pb")
    assert TRIAL in importers(SOURCES, "service", "xgrammar")


def test_no_reason_for_imports_inside_functions_is_out_of_date() -> None:
    found = deferring(SOURCES)
    assert {place for place in DEFERRED if not any(below(one, place) for one in found)} == set()


def test_the_settings_know_the_registry_of_engines_alone() -> None:
    known = {one for one in imports(SOURCES["service/settings.py"]) if "service.engines" in one}
    assert {one.rpartition(".")[0] for one in known if one.count(".") == 3} == REGISTRY


def test_the_images_stand_alone() -> None:
    for file, text in SOURCES.items():
        if below(file, "lmdeploy_ext/images"):
            foreign = {
                name for name in imports(text) if not name.startswith("lmdeploy_ext.images.")
            }
            packages = {name.partition(".")[0] for name in foreign} - sys.stdlib_module_names
            assert packages <= {"PIL", "numpy", "_pi_heif"}, f"{file}: {packages}"


def test_encoder_and_packing_stand_alone() -> None:
    allowed = {"torch", "timm", "numpy", "safetensors", "lmdeploy_ext"}
    for file, text in SOURCES.items():
        if below(file, "lmdeploy_ext/encoder", "lmdeploy_ext/mrope.py"):
            foreign = {name.partition(".")[0] for name in imports(text)} - sys.stdlib_module_names
            assert foreign <= allowed, f"{file}: {foreign - allowed}"


# Each broken on purpose


SPELLINGS = [
    "import service.{0}\n",
    "from service import {0}\n",
    "from service.{0} import anything\n",
    "def later():\n    from service.{0}.deep import anything\n",
    "if TYPE_CHECKING:\n    import service.{0}.deep\n",
]


def with_module(folder: str, text: str) -> tuple[str, Sources]:
    """The path of a made-up module, and the sources with it."""
    file = f"{folder}/made_up.py"
    return file, {**SOURCES, file: text}


@pytest.mark.parametrize("unit", ALLOWED)
@pytest.mark.slow
def test_every_forbidden_direction_is_noticed(unit: str) -> None:
    forbidden = {*ALLOWED, *OUTER} - ALLOWED[unit] - {unit, "pb"}
    assert {"cli", "wiring", "__main__"} <= forbidden
    for other in forbidden:
        for spelling in SPELLINGS:
            file, sources = with_module(f"service/{unit}", spelling.format(other))
            assert wrong_directions(sources, unit) == {f"{file} imports {other}"}, spelling


@pytest.mark.parametrize("unit", ALLOWED)
def test_a_direction_that_nothing_uses_is_noticed(unit: str) -> None:
    other = next(iter(ALLOWED.keys() - ALLOWED[unit] - {unit}))
    loose = {**ALLOWED, unit: {*ALLOWED[unit], other}}
    assert wrong_directions(SOURCES, unit, loose) == {f"{unit} never imports {other}"}
    assert outdated(ARCHITECTURE.read_text(encoding="utf-8"), loose)


def test_a_unit_without_directions_is_noticed() -> None:
    assert unlisted_units({**SOURCES, "service/new.py": ""}) == {"new"}
    assert unlisted_units({**SOURCES, "service/new_api/server.py": ""}) == {"new_api"}
    assert unlisted_units(SOURCES, {**ALLOWED, "gone": set()}) == {"gone"}


FORBIDDEN = [
    ("only the LMDeploy engine imports LMDeploy", "lmdeploy", {"engines"}),
    (
        "only engines import the extension, and others what knows no LMDeploy",
        "lmdeploy_ext.images.files",
        {"engines", "inference"},
    ),
    (
        "only engines import the extension, and others what knows no LMDeploy",
        "lmdeploy_ext.patch",
        {"engines"},
    ),
    ("only engines import torch and transformers", "torch", {"engines"}),
    ("only engines import torch and transformers", "transformers", {"engines"}),
    ("only engines import torch and transformers", "tokenizers", {"engines"}),
    ("xgrammar runs in engines and in processes that can be killed", "xgrammar", {"engines"}),
    ("only workers try out grammars", "service.structured_output.trial", set[str]()),
    ("only the wiring picks an engine", "service.engines.fake", {"engines"}),
    ("generated code stays at the edge", "service.pb.qwen3vl.v1", {"grpc_api"}),
]
"""Rule, a module that it keeps from most units, and the units that may import it."""


@pytest.mark.parametrize(("rule", "module", "may"), FORBIDDEN)
@pytest.mark.slow
def test_every_unit_that_imports_what_others_may_is_noticed(
    rule: str, module: str, may: set[str]
) -> None:
    for unit in ALLOWED.keys() - may:
        for line in (f"import {module}", f"def later():\n    from {module} import anything"):
            file, sources = with_module(f"service/{unit}", line)
            assert RULES[rule](sources) == {file}
    for unit in may:
        folder = f"service/{unit}/lmdeploy" if unit == "engines" else f"service/{unit}"
        assert RULES[rule](with_module(folder, f"import {module}")[1]) == set()


COMPILER_STAGES = "stages of the schema compiler import only the stages before them"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_that_imports_a_later_one_is_noticed(stage: str) -> None:
    for other in {*STAGES, "api"} - STAGES[stage] - {stage}:
        line = f"from service.schema_compiler.{other} import anything"
        file, sources = with_module(f"service/schema_compiler/{stage}", line)
        assert RULES[COMPILER_STAGES](sources) == {file}


FRONT_ENDS = "front ends know no engine and not each other"
EXTENSION = "the extension never imports the service"


@pytest.mark.parametrize(
    ("rule", "folder", "text"),
    [
        (FRONT_ENDS, "service/grpc_api", "import service.engines.kind"),
        (FRONT_ENDS, "service/grpc_api", "from service import new_api"),
        (FRONT_ENDS, "service/new_api", "import service.grpc_api.codec"),
        (FRONT_ENDS, "service/new_api/deep", "from service.engines import registry"),
        (EXTENSION, "lmdeploy_ext", "from service import types"),
        (EXTENSION, "lmdeploy_ext/encoder", "import service"),
        (EXTENSION, "lmdeploy_ext/deepstack", "def later():\n    import service.engine"),
        (
            "only the LMDeploy engine imports LMDeploy",
            "service/engines/reference",
            "import lmdeploy",
        ),
        ("generated code stays at the edge", "service/engines/reference", "import service.pb"),
        (
            "imports inside functions have a reason",
            "service/tasks",
            "async def f():\n    import json",
        ),
    ],
)
def test_a_broken_import_rule_is_noticed(rule: str, folder: str, text: str) -> None:
    file, sources = with_module(folder, text)
    assert RULES[rule]({**sources, "service/new_api/server.py": ""}) == {file}


def test_a_cycle_is_noticed() -> None:
    contract = "service/tasks/contract.py"
    assert "service.tasks.contract" in imports(SOURCES["service/tasks/registry.py"])
    later = "def later():\n    {0}\nif TYPE_CHECKING:\n    {0}\n"
    line = "from service.tasks.registry import Registry"
    assert cyclic({**SOURCES, contract: later.format(line)}) == set()
    (found,) = cyclic({**SOURCES, contract: line})
    assert {"service.tasks.contract", "service.tasks.registry"} <= set(found.split(" -> "))
    a, b = "lmdeploy_ext/a.py", "lmdeploy_ext/b.py"
    assert cyclic({**SOURCES, a: "import lmdeploy_ext.b", b: "from lmdeploy_ext import a"})


# What a fresh interpreter loads


def loaded(root: Path, module: str, heavy: tuple[str, ...]) -> str:
    """Those of the heavy packages that are loaded when a module is imported."""
    code = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lmdeploy_ext", ("torch", "timm", "transformers", "lmdeploy", "numpy")),
        ("lmdeploy_ext.families", ("torch", "timm", "transformers", "lmdeploy", "numpy")),
        ("lmdeploy_ext.images.files", ("torch", "timm", "transformers", "lmdeploy")),
        ("lmdeploy_ext.mrope", ("torch", "timm", "transformers", "lmdeploy")),
        ("lmdeploy_ext.packing", ("torch", "timm", "transformers", "lmdeploy")),
        ("service", ("torch", "grpc", "transformers", "lmdeploy", "numpy")),
        ("service.errors", ("torch", "grpc", "transformers", "lmdeploy", "numpy")),
        ("service.grpc_api.server", ("torch", "transformers", "lmdeploy")),
        ("service.runtime", ("torch", "transformers", "lmdeploy", "grpc")),
        ("service.wiring", ("torch", "transformers", "lmdeploy", "grpc")),
        ("service.engines.registry", ("torch", "transformers", "lmdeploy", "grpc")),
        (
            "service.schema_compiler.api",
            ("torch", "grpc", "transformers", "lmdeploy", "xgrammar"),
        ),
        ("service.__main__", ("torch", "transformers", "lmdeploy")),
    ],
)
@pytest.mark.slow
def test_imports_stay_light(module: str, heavy: tuple[str, ...]) -> None:
    assert loaded(ROOT, module, heavy) == "[]"


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("service/errors.py", "service.error_table"),
        ("lmdeploy_ext/families.py", "lmdeploy_ext.families"),
    ],
)
def test_a_heavy_import_is_noticed(file: str, module: str, tmp_path: Path) -> None:
    for package in ("service", "lmdeploy_ext"):
        ignored = shutil.ignore_patterns("__pycache__", "bundled")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    assert loaded(tmp_path, module, ("ftplib",)) == "[]"
    with (tmp_path / file).open("a") as code:  # stands for a package that takes seconds
        code.write("\nimport ftplib\n")
    assert loaded(tmp_path, module, ("ftplib",)) == "['ftplib']"
