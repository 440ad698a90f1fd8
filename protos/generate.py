"""Generate service/pb from protos/: ``python -m protos.generate``; ``--check`` only reports drift.

Messages, typed stubs and gRPC code come from grpc_tools and mypy-protobuf. Their imports follow the
proto package (``from qwen3vl.v1 import …``); they are rewritten to live below ``service.pb``, so
that the installed package owns no top-level name but its own.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"
OUT = ROOT / "service" / "pb"
PACKAGE = "service.pb"
PROTO_IMPORT = re.compile(r"^(from|import) qwen3vl\b", re.MULTILINE)
INIT = '"""Generated from protos/ by ``python -m protos.generate``. Not edited by hand."""\n'


def generate() -> dict[Path, str]:
    """The generated files: path below service/pb -> text."""
    from grpc_tools import _proto, protoc

    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        # The plug-ins stand beside the running interpreter, which need not be on PATH.
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
    """Read what protoc wrote; imports go below ``service.pb``, every folder is a package."""
    files: dict[Path, str] = {Path("__init__.py"): INIT}
    for path in sorted(folder.rglob("*.py*")):
        relative = path.relative_to(folder)
        text = PROTO_IMPORT.sub(rf"\1 {PACKAGE}.qwen3vl", path.read_text())
        files[relative] = text
        for parent in relative.parents:
            files.setdefault(parent / "__init__.py", INIT)
    return files


def committed() -> dict[Path, str]:
    """The files below service/pb as they are."""
    if not OUT.is_dir():
        return {}
    return {
        path.relative_to(OUT): path.read_text()
        for path in sorted(OUT.rglob("*.py*"))
        if path.is_file() and path.suffix in (".py", ".pyi")
    }


def write(files: dict[Path, str]) -> None:
    for stale in committed().keys() - files.keys():
        (OUT / stale).unlink()
    for relative, text in files.items():
        path = OUT / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def drift(files: dict[Path, str]) -> list[str]:
    """Names of files that differ from what the protos give, or that only one side has."""
    present = committed()
    return sorted(
        str(name) for name in files.keys() | present.keys() if files.get(name) != present.get(name)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate service/pb from protos/.")
    parser.add_argument("--check", action="store_true", help="report drift, write nothing")
    check = parser.parse_args().check
    files = generate()
    if not check:
        write(files)
        return 0
    changed = drift(files)
    for name in changed:
        print(f"service/pb/{name} differs from protos/: run `make proto`")
    return 1 if changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
