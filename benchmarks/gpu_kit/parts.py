"""What an offline machine lacks, collected in parts; received, checked and unpacked there.

The parts come in the order of need: first the project with its compiled libraries, then the small
packages, then LMDeploy's wheel in pieces. `parts.json` names them all, with their checksums, and goes
with every transfer. Parts may come in any order and in as many transfers as it takes: `receive` keeps
those that are whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PART_BYTES = 32 << 20
MANIFEST = "parts.json"
START = "start.py"
LMDEPLOY = "lmdeploy==0.18.0"
PACKAGES = (
    # LMDeploy's TurboMind
    "nvidia-cuda-runtime-cu12", "xgrammar>=0.2.8,<0.3", "apache-tvm-ffi==0.1.11",
    # what `import lmdeploy` imports
    "pydantic>=2.11,<3", "pydantic-core", "annotated-types", "typing-inspection", "fastapi", "starlette",
    "uvicorn", "openai>=2.45", "openai-harmony", "jiter", "distro", "sniffio", "shortuuid", "pybase64",
    "partial-json-parser", "fire", "termcolor", "mmengine-lite", "addict", "yapf", "platformdirs", "pyzmq",
    "opentelemetry-api", "httpx2", "httpcore2", "truststore",
    # the service
    "pydantic-settings>=2.10,<3", "python-dotenv", "jsonschema>=4.25,<5",
    "jsonschema-specifications>=2025.4.1", "referencing>=0.36,<1", "rpds-py", "idna>=3.19,<4",
    "googleapis-common-protos>=1.70,<2", "grpcio-health-checking>=1.80,<2", "grpcio-reflection>=1.80,<2",
    "protobuf>=6.33,<8", "grpcio>=1.80,<2", "prometheus-client>=0.21,<1", "typer>=0.16",
    "shellingham", "annotated-doc", "pillow>=11.3", "timm>=1.0.24,<2",
    # helpers of the tests, which the kit shares
    "pytest>=9,<10", "pluggy", "iniconfig", "psutil>=7",
)  # fmt: skip
"""Requirements, each without its own. On the machine only those are installed that it does not satisfy."""
MACHINE = (
    "torch", "torchvision", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "triton",
    "opencv-python-headless", "einops", "aiohttp", "tiktoken", "sentencepiece", "huggingface-hub",
    "pyyaml", "packaging",
)  # fmt: skip
"""What the machine must have already, with what these bring: PyTorch for CUDA 13 and its surroundings."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014",
             "manylinux_2_12", "manylinux_2_5", "manylinux1")  # fmt: skip


class PartsError(Exception):
    """Parts cannot be made or used; the text says which and what to do."""


@dataclass(frozen=True)
class Part:
    """One file of the kit. group: files of one group, joined in order, are one archive."""

    name: str
    group: str
    bytes: int
    sha256: str


# ---- packing -------------------------------------------------------------------------------------


def pack(
    folder: Path, root: Path, python: str, part_bytes: int = PART_BYTES,
    download: Callable[[Sequence[str], str, Path], None] | None = None,
    say: Callable[[str], None] = print,
) -> list[Part]:  # fmt: skip
    """Collect everything for a machine with this Python, x86-64 Linux, and write the parts.

    root: the project's repository. download: fetches wheels of requirements, for tests.

    Raises:
        PartsError: a wheel cannot be had.
    """
    from benchmarks.gpu_kit import layout

    fetch = download or pip_download
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("part-*"), folder / MANIFEST]:
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for group in ("packages", "lmdeploy", "libraries"):
            (scratch / group).mkdir()
        layout.build_libraries(scratch / "libraries", say)
        say(f"fetching {len(PACKAGES)} packages and {LMDEPLOY} for Python {python}")
        fetch(PACKAGES, python, scratch / "packages")
        fetch([LMDEPLOY], python, scratch / "lmdeploy")
        archives = [
            ("project", _project(root, scratch / "libraries")),
            ("packages", _archive({path.name: path for path in sorted((scratch / "packages").iterdir())})),
            ("lmdeploy", _archive({path.name: path for path in sorted((scratch / "lmdeploy").iterdir())})),
        ]  # fmt: skip
        parts = [
            part for group, content in archives for part in _cut(folder, group, content, part_bytes)
        ]
    parts = _numbered(folder, parts)
    manifest = {"python": python, "parts": [vars(part) for part in parts]}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.copy(Path(__file__).with_name(START), folder / START)
    for part in parts:
        say(f"{part.name}  {part.bytes / 2**20:6.1f} MiB  {part.group}")
    say(f"{sum(part.bytes for part in parts) / 2**20:.1f} MiB in {len(parts)} parts in {folder}")
    return parts


def pip_download(requirements: Sequence[str], python: str, target: Path) -> None:
    """Wheels of requirements, without what they require themselves, for x86-64 Linux."""
    platforms = [word for one in PLATFORMS for word in ("--platform", f"{one}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python,
               *platforms, "--dest", str(target), *requirements]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise PartsError(f"pip cannot fetch the wheels: {done.stderr.strip()[-1500:]}")


def _project(root: Path, libraries: Path) -> bytes:
    """The project's files, with what was compiled for it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, check=True,
    )  # fmt: skip
    names = [name for name in listed.stdout.decode().split("\0") if name]
    files = {name: root / name for name in sorted(names) if (root / name).is_file()}
    for path in sorted(libraries.iterdir()):
        place = "lmdeploy_ext/deepstack" if path.name.startswith("hook-") else "benchmarks/gpu_kit"
        files[f"{place}/{path.name}"] = path
    return _archive(files)


def _archive(files: dict[str, Path]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, path in files.items():
            archive.add(path, name)
    return buffer.getvalue()


def _cut(folder: Path, group: str, content: bytes, most: int) -> list[Part]:
    parts = []
    for number, begin in enumerate(range(0, len(content), most)):
        piece = content[begin : begin + most]
        name = f"part-{group}-{number}"
        (folder / name).write_bytes(piece)
        parts.append(Part(name, group, len(piece), hashlib.sha256(piece).hexdigest()))
    return parts


def _numbered(folder: Path, parts: Sequence[Part]) -> list[Part]:
    """With names that sort in the order of need."""
    found = []
    for number, part in enumerate(parts):
        name = f"part-{number:02}-{part.group}"
        (folder / part.name).rename(folder / name)
        found.append(Part(name, part.group, part.bytes, part.sha256))
    return found


# ---- receiving -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrived:
    """All parts of the kit, and those that are still missing."""

    parts: list[Part]
    missing: list[Part]


def receive(source: Path, store: Path) -> Arrived:
    """Keep the whole parts of a transfer.

    Raises:
        PartsError: there is no manifest, a part is damaged, or it belongs to another packing.
    """
    path = source / MANIFEST if (source / MANIFEST).is_file() else store / MANIFEST
    if not path.is_file():
        raise PartsError(
            f"there is no {MANIFEST} in {source}: it goes with every transfer of parts"
        )
    text = path.read_text()
    manifest: dict[str, Any] = json.loads(text)
    if manifest["python"] != f"{sys.version_info.major}.{sys.version_info.minor}":
        raise PartsError(
            f"the parts are for Python {manifest['python']}, this is {platform.python_version()}: "
            "pack them again with --python"
        )
    if platform.machine() != "x86_64":
        raise PartsError(f"the parts are for x86-64, this is {platform.machine()}")
    if (store / MANIFEST).is_file() and (store / MANIFEST).read_text() != text:
        shutil.rmtree(store)  # of another packing
    store.mkdir(parents=True, exist_ok=True)
    (store / MANIFEST).write_text(text)
    parts = [Part(**one) for one in manifest["parts"]]
    missing = []
    for part in parts:
        kept, sent = store / part.name, source / part.name
        if not kept.is_file():
            if not sent.is_file():
                missing.append(part)
                continue
            content = sent.read_bytes()
            if hashlib.sha256(content).hexdigest() != part.sha256:
                raise PartsError(
                    f"{part.name} is damaged: {len(content)} bytes of {part.bytes}, and another checksum; "
                    "send it again"
                )
            partial = kept.with_suffix(".partial")
            partial.write_bytes(content)
            partial.rename(kept)
    return Arrived(parts, missing)


def unpack(group: str, parts: Sequence[Part], store: Path, target: Path) -> None:
    """Unpack the archive of a group."""
    content = b"".join((store / part.name).read_bytes() for part in parts if part.group == group)
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        archive.extractall(target, filter="data")
