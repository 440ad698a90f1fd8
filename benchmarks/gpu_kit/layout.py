"""Finds LMDeploy installed, or lays it out from the parts, and makes the environment of its processes.

cuBLAS 12 takes 600 MB and is not carried: `cublas12.c` forwards the six functions that TurboMind calls
to the cuBLAS 13 of the machine's PyTorch. Everything lies where the module's own search path looks, so
that no variable has to say so.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu_kit import parts as kit
from benchmarks.gpu_kit.context import ROOT

HERE = Path(__file__).resolve().parent
FORWARDER, LT = "libcublas.so.12", "libcublasLt.so.12"
OF_THE_MACHINE = {
    "libcublas.so.13": "nvidia/cublas/lib",
    "libcublasLt.so.13": "nvidia/cublas/lib",
    "libnccl.so.2": "nvidia/nccl/lib",
}
"""Libraries of the machine's PyTorch, and where TurboMind's module and the forwarder look for them."""
CHECK = "from lmdeploy import turbomind as t; import sys; sys.exit(str(t._import_error) if not t.is_available() else 0)"


class LayoutError(Exception):
    """LMDeploy is not there and cannot be laid out; the text names what is missing."""


def installed() -> str | None:
    """The version of an LMDeploy that is installed already."""
    try:
        return version("lmdeploy")
    except PackageNotFoundError:
        return None


def install_packages(parts: Sequence[kit.Part], store: Path, target: Path) -> None:
    """Install the small packages that the machine lacks into a folder for `PYTHONPATH`, once.

    Raises:
        LayoutError: what is missing on the machine.
    """
    if (target / ".packages").exists():
        return
    absent = missing(kit.MACHINE)
    if absent:
        raise LayoutError(
            f"this machine lacks {', '.join(absent)}; the kit brings what PyTorch for CUDA 13 and its "
            "usual surroundings do not have, and takes these for granted"
        )
    shutil.rmtree(target, ignore_errors=True)
    _install("packages", parts, store, target, kit.PACKAGES)
    (target / ".packages").touch()


def install_lmdeploy(parts: Sequence[kit.Part], store: Path, target: Path) -> None:
    """Install LMDeploy beside the packages, with cuBLAS 12 forwarded, once.

    Raises:
        LayoutError: what is missing on the machine.
    """
    if (target / ".lmdeploy").exists():
        return
    _forward_cublas(target)
    _install("lmdeploy", parts, store, target, [kit.LMDEPLOY])
    (target / ".lmdeploy").touch()


def check(variables: Mapping[str, str]) -> None:
    """Load TurboMind's module in a process of its own. Raises LayoutError with the loader's words."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=dict(variables), capture_output=True, text=True,
        timeout=120, cwd=ROOT,
    )  # fmt: skip
    if done.returncode != 0:
        raise LayoutError(f"TurboMind's module does not load: {done.stderr.strip()[-1500:]}")


def missing(requirements: Sequence[str]) -> list[str]:
    """Those that the machine does not satisfy."""
    from packaging.requirements import Requirement

    absent = []
    for text in requirements:
        wanted = Requirement(text)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            absent.append(text)
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            absent.append(text)
    return absent


def environment(target: Path | None) -> Mapping[str, str]:
    """Variables of a process with the project and, where it was laid out, LMDeploy."""
    values = dict(os.environ)
    paths = [str(ROOT), *([str(target)] if target else []), values.get("PYTHONPATH", "")]
    values["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    values |= {
        # Of the first start with DeepStack; the kit has a step for it.
        "LMDEPLOY_QWEN3VL_SELFTEST": "off",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1", "TM_LOG_LEVEL": "WARNING",
    }  # fmt: skip
    return values


def _install(
    group: str, parts: Sequence[kit.Part], store: Path, target: Path, requirements: Sequence[str]
) -> None:
    from packaging.utils import canonicalize_name, parse_wheel_filename

    wheels = target / f"wheels-{group}"
    kit.unpack(group, parts, store, wheels)
    needed = {canonicalize_name(_name(one)) for one in missing(requirements)}
    names = {path: parse_wheel_filename(path.name)[0] for path in sorted(wheels.glob("*.whl"))}
    chosen = [str(path) for path, name in names.items() if name in needed]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade",
               "--target", str(target), *chosen]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True) if chosen else None
    if done is not None and done.returncode != 0:
        raise LayoutError(
            f"pip cannot install the wheels of the kit: {done.stderr.strip()[-1500:]}"
        )
    shutil.rmtree(wheels)


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def _forward_cublas(target: Path) -> None:
    """Put the forwarder, and links to the machine's libraries, where TurboMind's module looks."""
    for name, place in OF_THE_MACHINE.items():
        found = find_library(name)
        if found is None:
            raise LayoutError(
                f"there is no {name}: PyTorch for CUDA 13 (pip's torch, cu130) brings it under nvidia/, and "
                "the kit uses that one"
            )
        link = target / place / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(found)
    place = target / "nvidia" / "cublas" / "lib"
    if all((HERE / name).is_file() for name in (FORWARDER, LT)):
        for name in (FORWARDER, LT):
            shutil.copy(HERE / name, place / name)
        return
    compiler = find_compiler()
    if compiler is None:
        raise LayoutError(
            "cuBLAS 12 has to be forwarded to cuBLAS 13: the kit was packed without its compiled "
            "library, and this machine has no cc, gcc or clang. Pack it on x86-64 Linux with a compiler"
        )
    build_forwarder(compiler, place)


def find_library(name: str) -> Path | None:
    """A library of the machine's packages."""
    folders = [*site.getsitepackages(), sysconfig.get_paths()["purelib"], *sys.path]
    for folder in dict.fromkeys(folders):
        found = sorted(glob.glob(f"{folder}/nvidia/**/{name}", recursive=True))
        if found:
            return Path(found[0]).resolve()
    return None


def find_compiler() -> str | None:
    """A C compiler."""
    return next((found for one in ("cc", "gcc", "clang") if (found := shutil.which(one))), None)


def build_forwarder(compiler: str, folder: Path) -> None:
    """Compile the forwarder and the empty library beside it, which the module asks for as well.

    Raises:
        LayoutError: the compiler's words.
    """
    script, nothing = folder / "cublas12.map", folder / "nothing.c"
    script.write_text(f"{FORWARDER} {{ global: cublas*; local: *; }};\n")
    nothing.write_text("int cublaslt12_is_not_called;\n")
    flags = [compiler, "-shared", "-fPIC", "-O2", "-Wall"]
    try:
        for command in (
            [*flags, f"-Wl,-soname,{FORWARDER},--version-script,{script},-rpath,$ORIGIN",
             str(HERE / "cublas12.c"), "-o", str(folder / FORWARDER), "-ldl"],
            [*flags, f"-Wl,-soname,{LT}", str(nothing), "-o", str(folder / LT)],
        ):  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode != 0:
                raise LayoutError(
                    f"{compiler} cannot build the forwarder: {done.stderr.strip()[-800:]}"
                )
    finally:
        script.unlink()
        nothing.unlink()


def build_libraries(folder: Path, say: Callable[[str], None]) -> None:
    """Compile for the parts what can be compiled here: the forwarder and the hook of DeepStack."""
    from lmdeploy_ext.deepstack import library

    compiler = find_compiler()
    if compiler is None or platform.machine() != "x86_64":
        say("no C compiler for x86-64 here: the machine has to have one")
        return
    build_forwarder(compiler, folder)
    library.build(folder / library.file_name())
