"""Generate code from protos/: ``python -m protos.generate``; ``--check`` only reports drift.

grpc_tools and mypy-protobuf generate messages, typed stubs and gRPC code. The files are written
twice: as ``qwen3vl.v1`` into the light client, and into ``service.pb`` with changed imports, so
that the installed service has only one top-level package and needs no other distribution. For the
same reason ``service/client.py`` is a copy of the light client's module
(docs/decisions/0004-light-client.md).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"
SERVICE = Path("service/pb")
CLIENT = Path("clients/python")
MODULE, COPY = CLIENT / "qwen3vl/client.py", Path("service/client.py")
PACKAGE = "service.pb"
PROTO_IMPORT = re.compile(r"^(from|import) qwen3vl\b", re.MULTILINE)
INIT = '"""Generated from protos/ by ``python -m protos.generate``. Not edited by hand."""\n'
HEADER = f"# A copy of {MODULE}, made by `python -m protos.generate`. Not edited by hand.\n"


def generate() -> dict[Path, str]:
    """The generated files: path below the repository -> text."""
    from grpc_tools import _proto, protoc

    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        # The plug-ins are in the interpreter's folder, which may not be on PATH.
        plugins = Path(sys.executable).parent
        arguments = [
            "protoc",
            f"--proto_path={PROTOS}",
            f"--proto_path={Path(next(iter(_proto.__path__)))}",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            f"--mypy_out=quiet:{folder}",
            f"--mypy_grpc_out=quiet:{folder}",
            *sources,
        ]
        code = protoc.main(arguments)
        if code:
            raise SystemExit(f"protoc failed with exit code {code}")
        return collect(Path(folder))


def collect(folder: Path) -> dict[Path, str]:
    """Read the output of protoc and assign target paths; every folder is a package."""
    files: dict[Path, str] = {SERVICE / "__init__.py": INIT}
    for path in sorted(folder.rglob("*.py*")):
        relative = path.relative_to(folder)
        text = path.read_text()
        files[CLIENT / relative] = text
        files[CLIENT / relative.parent / "__init__.py"] = INIT
        files[SERVICE / relative] = within_service(text)
        for parent in relative.parents:
            files.setdefault(SERVICE / parent / "__init__.py", INIT)
    files[COPY] = HEADER + within_service((ROOT / MODULE).read_text())
    return files


def within_service(text: str) -> str:
    """The text with imports of ``qwen3vl`` replaced by those of the service."""
    return PROTO_IMPORT.sub(rf"\1 {PACKAGE}.qwen3vl", text)


def committed() -> dict[Path, str]:
    """The generated files in the repository."""
    found = {
        path
        for folder in (SERVICE, CLIENT / "qwen3vl/v1")
        for path in (ROOT / folder).rglob("*.py*")
        if path.is_file() and path.suffix in (".py", ".pyi")
    } | {ROOT / COPY}
    return {path.relative_to(ROOT): path.read_text() for path in sorted(found) if path.is_file()}


def write(files: dict[Path, str]) -> None:
    for stale in committed().keys() - files.keys():
        (ROOT / stale).unlink()
    for relative, text in files.items():
        path = ROOT / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def drift(files: dict[Path, str]) -> list[str]:
    """Names of files that differ from the generated ones, are missing or are left over."""
    present = committed()
    return sorted(
        str(name) for name in files.keys() | present.keys() if files.get(name) != present.get(name)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate code from protos/.")
    parser.add_argument("--check", action="store_true", help="report drift, write nothing")
    check = parser.parse_args().check
    files = generate()
    if not check:
        write(files)
        return 0
    changed = drift(files)
    for name in changed:
        print(f"{name} differs from its source, protos/ or {MODULE}: run `make proto`")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
