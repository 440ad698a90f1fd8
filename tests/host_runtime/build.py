"""Builds the host runtime: ``python -m tests.host_runtime.build`` prints the folder of the libraries.

The result is kept in ``.cache/host_runtime`` under a hash of everything that shapes it: sources,
compiler, processor, CUDA headers. A second call costs milliseconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
CACHE = HERE.parent.parent / ".cache" / "host_runtime"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra"]
TIMEOUT_S = 300


class NotAvailable(Exception):
    """The host runtime cannot be built here; the text says why."""


def build() -> Path:
    """Build the libraries, or find them built.

    Returns:
        A folder with ``driver/`` (a driver without a device) and ``runtime/`` (driver, runtime
        and cuBLAS on host memory), each for a library path.

    Raises:
        NotAvailable: no C++ compiler, or no CUDA 12 headers (they come with LMDeploy).
    """
    compiler, include = find_compiler(), find_headers()
    processor = _processor_flags(compiler)
    target = CACHE / _digest(compiler, include, processor)
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # tests may run side by side: one of them builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a build that was interrupted
            (partial / "driver").mkdir(parents=True)
            (partial / "runtime").mkdir()
            include_flags = [f"-I{SOURCES}", f"-isystem{include}", f"-isystem{SOURCES}/shim"]
            _build_into(partial, [compiler, *FLAGS, *processor, *include_flags])
            partial.rename(target)
    return target


def find_compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if found is None:
        raise NotAvailable(
            "the host runtime needs a C++ compiler (g++ or clang++), and there is none"
        )
    return found


def find_headers() -> Path:
    """The headers of the CUDA 12 runtime wheel, which the LMDeploy wheel depends on."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        include = Path(root) / "cuda_runtime" / "include"
        if (include / "cuda_runtime_api.h").is_file():
            return include
    raise NotAvailable(
        "the host runtime needs the headers of nvidia-cuda-runtime-cu12, which is not installed"
    )


def _processor_flags(compiler: str) -> list[str]:
    """``-march=native`` where the compiler knows it."""
    command = [compiler, "-march=native", "-x", "c++", "-fsyntax-only", os.devnull]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
    return ["-march=native"] if done.returncode == 0 else []


def _digest(compiler: str, include: Path, processor: list[str]) -> str:
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(SOURCES.rglob("*.*"))]:
        digest.update(str(path.name).encode() + path.read_bytes())
    # What the compiler means by native is part of its list of predefined macros.
    macros = [compiler, *processor, "-dM", "-E", "-x", "c++", os.devnull]
    digest.update(subprocess.run(macros, capture_output=True, check=True, timeout=TIMEOUT_S).stdout)
    digest.update((include / "cuda_runtime_api.h").read_bytes())
    return digest.hexdigest()[:16]


def _build_into(folder: Path, compiler: list[str]) -> None:
    """Compile every source by itself, two at a time, and link the libraries."""
    jobs: list[tuple[Path, list[str], Path]] = []
    for source in [*SOURCES.glob("*.cpp"), *SOURCES.glob("kernels/*.cpp")]:
        jobs.append((source, [], folder / f"{source.stem}.o"))
    jobs.append((SOURCES / "driver.cpp", ["-DNO_DEVICE"], folder / "driver_no_device.o"))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda job: _run([*compiler, *job[1], "-c", str(job[0]), "-o", str(job[2])]), jobs))  # fmt: skip
    apart = {"driver", "driver_no_device", "blas"}
    runtime = sorted(str(path) for path in folder.glob("*.o") if path.stem not in apart)
    link = [compiler[0], "-shared", "-Wl,--no-undefined"]
    _run(
        [
            *link,
            _name("libcuda.so.1"),
            "-o",
            f"{folder}/driver/libcuda.so.1",
            f"{folder}/driver_no_device.o",
        ]
    )
    _run(
        [*link, _name("libcuda.so.1"), "-o", f"{folder}/runtime/libcuda.so.1", f"{folder}/driver.o"]
    )
    _link_versioned(link, folder / "runtime" / "libcudart.so.12", runtime)
    _link_versioned(
        link, folder / "runtime" / "libcublas.so.12", [f"{folder}/blas.o", f"{folder}/settings.o"]
    )
    _link_versioned(link, folder / "runtime" / "libcublasLt.so.12", [])
    for part in folder.glob("*.o"):
        part.unlink()


def _link_versioned(link: list[str], library: Path, objects: list[str]) -> None:
    """Link with symbol versions named as the library, which is what the module asks for."""
    script = library.with_suffix(".map")
    script.write_text(
        f"{library.name} {{ global: cuda*; __cuda*; cublas*; host_runtime_*; local: *; }};\n"
    )
    _run(
        [*link, _name(library.name), f"-Wl,--version-script={script}", "-o", str(library), *objects]
    )
    script.unlink()


def _name(soname: str) -> str:
    return f"-Wl,-soname,{soname}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"the host runtime does not build: {' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build())
