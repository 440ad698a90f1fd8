"""The API as files: lint, breaking changes, generated code, and words for everything that it has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from protos.generate import drift, generate
from service.engines.registry import ENGINES

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).parent / "buf"
BASELINE = ROOT / "protos" / "baseline.binpb"
NUMBERS = {
    FieldDescriptorProto.TYPE_DOUBLE,
    FieldDescriptorProto.TYPE_UINT32,
    FieldDescriptorProto.TYPE_UINT64,
}
UNITS = ("second", "token", "image", "pixel", "byte", "level", "character", "attempt", "keyword")


def buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BUF), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorProto:
    """The compiled API with the comments of its source."""
    path = tmp_path_factory.mktemp("protos") / "image.binpb"
    built = buf("build", "--output", str(path), "--as-file-descriptor-set")
    assert built.returncode == 0, built.stderr
    files = FileDescriptorSet.FromString(path.read_bytes()).file
    return next(one for one in files if one.package == "qwen3vl.v1")


def test_generated_code_is_that_of_the_protos() -> None:
    assert drift(generate()) == []


def test_drift_is_seen() -> None:
    files = generate()
    name = next(name for name in files if name.name == "vision_pb2.py")
    assert drift({**files, name: files[name] + "# changed\n"}) == [str(name)]


def test_buf_lint_passes() -> None:
    found = buf("lint")
    assert (found.returncode, found.stdout) == (0, "")


def test_nothing_breaks_callers_of_the_last_release() -> None:
    found = buf("breaking", "--against", str(BASELINE))
    assert (found.returncode, found.stdout) == (0, "")


def test_a_breaking_change_is_seen(tmp_path: Path) -> None:
    """Renumbering a field of the baseline has to fail the check that the test above relies on."""
    files = FileDescriptorSet.FromString(BASELINE.read_bytes())
    for one in files.file:
        if one.package == "qwen3vl.v1":
            message = next(m for m in one.message_type if m.name == "Image")
            next(f for f in message.field if f.name == "data").number = 77
    changed = tmp_path / "changed.binpb"
    changed.write_bytes(files.SerializeToString())
    found = buf("breaking", "--against", str(changed))
    assert found.returncode != 0
    assert "77" in found.stdout


# Words

Comments = dict[tuple[int, ...], str]


def comments(file: FileDescriptorProto) -> Comments:
    """Path of a location -> its leading comment."""
    return {
        tuple(location.path): location.leading_comments.strip()
        for location in file.source_code_info.location
        if location.leading_comments.strip()
    }


def named(file: FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Everything with a name, and the path of its location. 4, 5, 6, …: numbers in descriptor.proto."""
    for i, message in enumerate(file.message_type):
        yield message.name, (4, i)
        for j, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", (4, i, 2, j)
        for j, choice in enumerate(message.oneof_decl):
            if not choice.name.startswith("_"):  # the hidden one of an `optional` field
                yield f"{message.name}.{choice.name}", (4, i, 8, j)
        assert not [nested for nested in message.nested_type if not nested.options.map_entry]
    for i, enum in enumerate(file.enum_type):
        yield enum.name, (5, i)
        for j, value in enumerate(enum.value):
            yield f"{enum.name}.{value.name}", (5, i, 2, j)
    for i, service in enumerate(file.service):
        yield service.name, (6, i)
        for j, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (6, i, 2, j)


def test_everything_has_a_comment(file: FileDescriptorProto) -> None:
    found = comments(file)
    names = dict(named(file))
    assert len(names) > 100
    assert [name for name, path in names.items() if path not in found] == []


def fields(file: FileDescriptorProto) -> Iterator[tuple[DescriptorProto, Any, str]]:
    """Message, field and comment."""
    found = comments(file)
    for i, message in enumerate(file.message_type):
        for j, field in enumerate(message.field):
            yield message, field, found[4, i, 2, j]


REQUESTS = {"AnalyzeImageRequest", "RunTaskRequest", "StreamTaskRequest", "GetTaskRequest"}
REQUESTS |= {
    "ValidateSchemaRequest",
    "Image",
    "Task",
    "InlineTask",
    "Grammar",
    "Choice",
    "SamplingOptions",
}


def test_comments_of_request_fields_name_a_default_or_required(
    file: FileDescriptorProto,
) -> None:
    silent = []
    for message, field, text in fields(file):
        in_oneof = field.HasField("oneof_index") and not field.proto3_optional
        if message.name not in REQUESTS or in_oneof:
            continue
        if not any(word in text for word in ("Default:", "Required.", "At least 1")):
            silent.append(f"{message.name}.{field.name}")
    assert silent == []


def test_optional_numbers_say_their_default_and_range(file: FileDescriptorProto) -> None:
    checked, silent = 0, []
    for message, field, text in fields(file):
        if field.proto3_optional and field.type in NUMBERS:
            checked += 1
            if "Default:" not in text or ("Range:" not in text and "At least" not in text):
                silent.append(f"{message.name}.{field.name}")
    assert (checked, silent) == (8, [])


def test_numbers_of_responses_say_their_unit(file: FileDescriptorProto) -> None:
    checked, silent = 0, []
    for message, field, text in fields(file):
        if message.name not in REQUESTS and field.type in NUMBERS:
            checked += 1
            if not any(unit in text.lower() for unit in UNITS):
                silent.append(f"{message.name}.{field.name}")
    assert checked >= 15
    assert silent == []


def test_seconds_are_in_the_name(file: FileDescriptorProto) -> None:
    for message, field, text in fields(file):
        if field.type == FieldDescriptorProto.TYPE_DOUBLE and "seconds" in text:
            assert field.name.endswith("_seconds"), f"{message.name}.{field.name}"


# Names in other languages


def test_generated_code_has_names_that_fit_the_package(file: FileDescriptorProto) -> None:
    options = file.options
    assert options.go_package == "qwen3vl/v1;qwen3vlv1"
    assert (options.java_package, options.java_outer_classname) == ("qwen3vl.v1", "VisionProto")
    assert options.java_multiple_files
    assert options.csharp_namespace == "Qwen3VL.V1"


def test_a_number_that_was_set_aside_stays_free(file: FileDescriptorProto) -> None:
    image = next(one for one in file.message_type if one.name == "Image")
    assert [(one.start, one.end) for one in image.reserved_range] == [(2, 3)]


def test_every_engine_is_named(file: FileDescriptorProto) -> None:
    (text,) = [
        text
        for message, field, text in fields(file)
        if (message.name, field.name) == ("GetModelResponse", "engine")
    ]
    assert [name for name in ENGINES if f'"{name}"' not in text] == []
