"""The GPU kit without a GPU: a dry run of every step on the host runtime, what happens when it is
killed or a step hangs, the parts for an offline machine, cuBLAS 12 forwarded."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_kit import conduct, layout, parts, start
from benchmarks.gpu_kit.context import Context, code_version, read, write
from benchmarks.gpu_kit.plan import BUDGET_S, FULL, SESSIONS, STEPS, planned_s

ROOT = Path(__file__).parents[2]
LIMIT_S = 280
"""Of a dry run, which takes 75 s on two quiet cores and up to two minutes on busy ones."""


def kit(work: Path, *options: str) -> subprocess.Popen[str]:
    """A dry run."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_kit",
        "--dry-run",
        "--work",
        str(work),
        *options,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def results(work: Path) -> Path:
    (folder,) = (work / "results").iterdir()
    return folder


def of_a_run(work: Path) -> list[str]:
    """Command lines of processes that belong to a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(work) in text:
            found.append(text)
    return found


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.timeout(2 * LIMIT_S)
def test_a_dry_run_passes_every_step(tmp_path: Path) -> None:
    if layout.find_compiler() is None:
        pytest.skip("the host runtime needs a compiler")
    out = tmp_path / "out"
    run = kit(tmp_path / "work", "--out", str(out))
    said = run.communicate(timeout=LIMIT_S)[0]
    assert run.returncode == 0, said[-6000:]
    summary = read(results(tmp_path / "work") / "summary.json")
    assert summary is not None
    assert {name: one["status"] for name, one in summary["steps"].items()} == {
        step.name: "passed" for step in STEPS
    }
    for name, one in summary["steps"].items():
        assert one["checks"], name
        figures = one["figures"]
        if name.startswith("speed"):
            assert figures["at once"]["complete"]
            assert figures["at once"]["answers of another length"] == 0
            assert ("dry run" in figures) == name.endswith("pytorch"), (
                "said where another engine ran"
            )
    assert (out / "summary.json").read_text() == (
        results(tmp_path / "work") / "summary.json"
    ).read_text()
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert "logs/work-bundled.log" in logs.getnames()
    check_packages({name for one in summary["steps"].values() for name in one["imported"]})


def check_packages(imported: set[str]) -> None:
    """Everything that was imported is on the machine or in the parts."""
    installed = packages_distributions()
    carried = {
        canonicalize_name(Requirement(one).name) for one in [*parts.PACKAGES, parts.LMDEPLOY]
    }
    # grpcio, tvm-ffi and uvicorn go on without
    optional = {"grpcio-tools", "ml-dtypes", "watchfiles"}
    known = carried | required(parts.MACHINE) | optional
    # Several distributions can share a name, as those of OpenTelemetry do: one that is there is enough.
    found = {name: {canonicalize_name(one) for one in installed.get(name, [])} for name in imported}
    assert {name: given for name, given in found.items() if given and not given & known} == {}


def required(names: Sequence[str]) -> set[str]:
    """Distributions with all that they require."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            wanted = [Requirement(one) for one in requires(name) or []]
        except PackageNotFoundError:
            continue
        todo += [
            one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    return seen


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.timeout(2 * LIMIT_S)
def test_a_killed_run_resumes_after_its_last_finished_step(tmp_path: Path) -> None:
    if layout.find_compiler() is None:
        pytest.skip("the host runtime needs a compiler")
    work, steps = tmp_path / "work", ["load", "cancel", "mixed", "off"]
    run = kit(work, "--steps", *steps)
    status = lambda name: (read(results(work) / f"{name}.json") or {}).get("status")  # noqa: E731
    wait_until(lambda: (work / "results").is_dir() and status("mixed") == "running", run)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    wait_until(lambda: not of_a_run(work))
    folder = results(work)
    assert (status("load"), status("mixed")) == ("passed", "running")
    kept = (folder / "load.json").read_text()
    made = (next(work.glob("made-*")) / "truth.done").stat().st_mtime_ns
    again = kit(work, "--steps", *steps)
    said = again.communicate(timeout=LIMIT_S)[0]
    assert again.returncode == 0, said[-6000:]
    assert [status(name) for name in steps] == ["passed"] * 4
    assert (folder / "load.json").read_text() == kept, "it was complete"
    assert "load: " not in said
    assert "mixed: passed" in said
    assert (next(work.glob("made-*")) / "truth.done").stat().st_mtime_ns == made
    assert not of_a_run(work)


def wait_until(condition: Callable[[], bool], run: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        assert run is None or run.poll() is None, run.communicate()[0][-4000:]
        time.sleep(0.02)


# ---- the conductor -------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
reply, results = int(sys.argv[1]), sys.argv[2]
for line in sys.stdin:
    step = json.loads(line)["step"]
    if step == "text":
        print("a last word", flush=True)
        os._exit(7)
    if step == "images":
        time.sleep(60)
    status = "failed" if step == "guided" else "passed"
    found = {"step": step, "status": status, "code": CODE}
    if status == "failed":
        found |= {"failure": {"message": "wrong"}, "first_difference": {"request": 3}}
    open(f"{results}/{step}.json", "w").write(json.dumps(found))
    os.write(reply, b".")
"""


class Scripted(conduct.Conductor):
    """Runs a script in place of a worker, and no preparation."""

    def _process(self, kind: str, name: str, limit_s: float | None) -> conduct.Process:
        script = WORKER.replace("CODE", repr(code_version()))
        command = ["-c", script, conduct.REPLY, str(self._context.results)]
        log = self._context.results / "logs" / f"{kind}-{name}.log"
        return conduct.Process(command, os.environ, log, limit_s)


def context_of(folder: Path) -> Context:
    context = Context(folder / "work", folder / "results", dry=False)
    for step in STEPS:
        for name in step.needs:
            write(context.done(name), {})
    return context


def some_steps(*names: str, limit_s: float = 5.0) -> list[Any]:
    from dataclasses import replace

    return [replace(step, limit_s=limit_s) for step in STEPS if step.name in names]


def conductor(context: Context, steps: Sequence[Any], **options: Any) -> conduct.Conductor:
    return Scripted(context, lambda engine: {}, steps, say=lambda text: None, **options)


@pytest.mark.slow
def test_a_step_that_crashes_hangs_or_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conduct, "GRACE_S", 0.2)
    context = context_of(tmp_path)
    steps = some_steps("load", "text", "images", "guided", "cancel", limit_s=6.0)
    left = conductor(context, steps, budget_s=120.0).run()
    assert left == []
    found = {step.name: read(context.result(step.name)) or {} for step in steps}
    assert {name: one["status"] for name, one in found.items()} == {
        "load": "passed", "text": "crashed", "images": "timeout", "guided": "failed", "cancel": "passed",
    }  # fmt: skip
    assert found["text"]["failure"]["message"] == "its process ended with 7"
    assert "a last word" in found["text"]["log"]
    assert (
        "time.sleep" in found["images"]["log"] or "most recent call first" in found["images"]["log"]
    )
    assert found["guided"]["first_difference"] == {"request": 3}
    for name in ("text", "images", "guided"):
        assert {"versions", "gpu", "processor", "variables"} <= found[name]["machine"].keys()
    page = (context.results / "summary.md").read_text()
    assert "**crashed**: its process ended with 7" in page


def test_results_of_another_code_version_are_ignored(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    steps = some_steps("load", "cancel", "mixed")
    for step, code, status in zip(steps, (code_version(), "other", code_version()),
                                  ("failed", "passed", "running"), strict=True):  # fmt: skip
        write(context.result(step.name), {"status": status, "code": code})
    assert [step.name for step in conductor(context, steps).left()] == ["mixed", "cancel"]


def test_unused_time_is_given_to_later_steps_and_no_step_starts_too_late(
    tmp_path: Path,
) -> None:
    context = context_of(tmp_path)
    steps = some_steps("load", "cancel")
    # All that is left but what the next one has planned; at least its own, at most twice that.
    for budget_s, limit_s in ((9.0, 5.0), (13.0, 8.0), (60.0, 10.0)):
        one = conductor(context, steps, budget_s=budget_s)
        assert one._limit(steps[0], steps[1:]) == pytest.approx(limit_s, abs=1)
    late = conductor(context, steps, budget_s=4.0)
    assert [step.name for step in late.run()] == ["load", "cancel"]
    assert not context.result("load").exists()


def test_a_step_whose_inputs_are_not_ready_runs_after_others(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    steps = some_steps("text", "cancel", "off")
    context.done("truth").unlink()
    assert conductor(context, steps)._next(steps).name == "cancel"
    write(context.done("truth"), {})
    assert conductor(context, steps)._next(steps).name == "text"


def test_the_plan_fits_its_budget() -> None:
    assert planned_s() <= BUDGET_S == 600
    assert {step.session for step in STEPS} == SESSIONS.keys()
    assert {step.part for step in STEPS} == set("abcdefg")
    assert (FULL.single, FULL.many, FULL.at_once, FULL.tokens) == (32, 1200, 64, 107)
    assert (FULL.guided, FULL.cancels, FULL.mixed, FULL.sides) == (200, 200, 64, (512, 1024))
    changes = sum(one.session != other.session for one, other in pairwise(STEPS))
    assert changes + 1 == len(SESSIONS), "no engine is started twice"


# ---- parts ---------------------------------------------------------------------------------------

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def fake_download(requirements: Sequence[str], python: str, target: Path) -> None:
    """A wheel for each requirement; LMDeploy's is large."""
    for text in requirements:
        name = Requirement(text).name.replace("-", "_")
        release = "0.18.0" if name == "lmdeploy" else "9.9"
        with zipfile.ZipFile(target / f"{name}-{release}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data", os.urandom(300_000) if name == "lmdeploy" else b"x")
            info = f"{name}-{release}.dist-info"
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a small repository."""
    repository, folder = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("parts")
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    (repository / "hello.py").write_text("print('hello')\n")
    found = parts.pack(folder, repository, PYTHON, 100_000, fake_download, lambda text: None)
    assert [part.group for part in found] == sorted(
        (part.group for part in found), key=("project", "packages", "lmdeploy").index
    )
    assert all(part.bytes <= 100_000 for part in found)
    assert len([part for part in found if part.group == "lmdeploy"]) >= 3
    return folder


def send(source: Path, target: Path, *names: str) -> Path:
    """A transfer of some parts."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name in [parts.MANIFEST, parts.START, *names]:
        shutil.copy(source / name, target / name)
    return target


@pytest.mark.slow
def test_parts_may_come_in_any_order_and_are_kept(packed: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in packed.glob("part-*"))
    store = tmp_path / "store"
    first = parts.receive(send(packed, tmp_path / "t", *names[-2:]), store)
    assert [part.name for part in first.missing] == names[:-2]
    last = parts.receive(send(packed, tmp_path / "t", *names[:-2]), store)
    assert last.missing == []
    parts.unpack("project", last.parts, store, tmp_path / "project")
    assert (tmp_path / "project" / "hello.py").is_file()
    parts.unpack("lmdeploy", last.parts, store, tmp_path / "wheels")
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [
        "lmdeploy-0.18.0-py3-none-any.whl"
    ]


def test_a_damaged_part_is_named(packed: Path, tmp_path: Path) -> None:
    name = sorted(path.name for path in packed.glob("part-*"))[1]
    sent = send(packed, tmp_path / "t", name)
    content = (sent / name).read_bytes()
    (sent / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(parts.PartsError, match=f"{name} is damaged.*send it again"):
        parts.receive(sent, tmp_path / "store")


def test_parts_for_another_python_are_refused(packed: Path, tmp_path: Path) -> None:
    sent = send(packed, tmp_path / "t")
    manifest = json.loads((sent / parts.MANIFEST).read_text())
    (sent / parts.MANIFEST).write_text(json.dumps(manifest | {"python": "3.9"}))
    with pytest.raises(parts.PartsError, match=r"are for Python 3\.9, this is"):
        parts.receive(sent, tmp_path / "store")


def test_parts_without_a_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(parts.PartsError, match=r"there is no parts\.json in"):
        parts.receive(tmp_path, tmp_path / "store")


def test_parts_of_another_packing_are_dropped(packed: Path, tmp_path: Path) -> None:
    names, store = sorted(path.name for path in packed.glob("part-*")), tmp_path / "store"
    parts.receive(send(packed, tmp_path / "t", *names), store)
    sent = send(packed, tmp_path / "t")
    (sent / parts.MANIFEST).write_text((sent / parts.MANIFEST).read_text() + "\n")
    assert len(parts.receive(sent, store).missing) == len(names)


def test_start_py_unpacks_the_project_and_runs_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [path.name for path in packed.glob("part-*-project")]
    sent = send(packed, tmp_path / "t", *names)
    script = (sent / parts.START).read_text()
    assert script == Path(start.__file__).read_text()
    handed: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: handed.append(command))
    monkeypatch.setattr(start, "__file__", str(sent / parts.START))
    monkeypatch.setenv("GPU_KIT_WORK", str(tmp_path / "work"))
    monkeypatch.setattr(sys, "argv", ["start.py", "--dry-run"])
    monkeypatch.chdir(tmp_path)
    start.main()
    assert (Path.cwd() / "hello.py").is_file()
    assert handed[0][1:3] == ["-m", "benchmarks.gpu_kit"]
    assert handed[0][-1] == "--dry-run"


@pytest.mark.slow
def test_only_what_the_machine_lacks_is_installed(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, site = tmp_path / "store", tmp_path / "site"
    arrived = parts.receive(packed, store)
    monkeypatch.setattr(parts, "PACKAGES", ("nothing-like-it>=1", "numpy", "xgrammar>=9"))

    def unpack(group: str, all_parts: Any, from_where: Path, target: Path) -> None:
        target.mkdir(parents=True)
        fake_download(("nothing-like-it", "numpy", "xgrammar"), PYTHON, target)

    monkeypatch.setattr(parts, "unpack", unpack)
    layout.install_packages(arrived.parts, store, site)
    assert sorted(path.name for path in site.glob("*.dist-info")) == [
        "nothing_like_it-9.9.dist-info", "xgrammar-9.9.dist-info",
    ]  # fmt: skip


def test_missing_packages_of_the_machine_are_named(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MACHINE", ("torch", "no-such-thing"))
    with pytest.raises(layout.LayoutError, match="this machine lacks no-such-thing"):
        layout.install_packages([], tmp_path, tmp_path / "site")


def test_without_lmdeploy_and_parts_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu_kit import __main__ as command

    monkeypatch.setattr(layout, "installed", lambda: None)
    assert command.main(["--dry-run", "--work", str(tmp_path)]) == 1
    assert "pip install 'lmdeploy>=0.18,<0.19'" in capfd.readouterr().err


# ---- cuBLAS --------------------------------------------------------------------------------------

FAKE_CUBLAS = """
static double seen[32]; static int count;
#define SEE(x) seen[count++] = (double)(long)(x)
double fake_seen(int i) { return seen[i]; }
void fake_reset(void) { count = 0; }
int cublasCreate_v2(void *h) { SEE(h); return 11; }
int cublasDestroy_v2(void *h) { SEE(h); return 12; }
int cublasGetMathMode(void *h, int *m) { SEE(h); *m = 5; return 13; }
int cublasSetStream_v2(void *h, void *s) { SEE(h); SEE(s); return 14; }
int cublasSetWorkspace_v2(void *h, void *w, unsigned long n) { SEE(h); SEE(w); SEE(n); return 15; }
int cublasGemmEx(void *h, int a, int b, int m, int n, int k, const void *al, const void *A, int at, int lda,
                 const void *B, int bt, int ldb, const void *be, void *C, int ct, int ldc, int c, int algo) {
    SEE(h); SEE(a); SEE(b); SEE(m); SEE(n); SEE(k); SEE(al); SEE(A); SEE(at); SEE(lda); SEE(B); SEE(bt);
    SEE(ldb); SEE(be); SEE(C); SEE(ct); SEE(ldc); SEE(c); SEE(algo); return 16;
}
"""


@pytest.fixture(scope="module")
def forwarder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the forwarder, and beside it a library that stands for cuBLAS 13."""
    compiler = layout.find_compiler()
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("cublas")
    layout.build_forwarder(compiler, folder)
    (folder / "fake.c").write_text(FAKE_CUBLAS)
    name = "libcublas.so.13"
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", str(folder / "fake.c")]
    subprocess.run([*command, "-o", str(folder / name)], check=True)
    return folder


CALLS = """
import ctypes, json, sys
folder = sys.argv[1]
library = ctypes.CDLL(f"{folder}/libcublas.so.12")
fake = ctypes.CDLL(f"{folder}/libcublas.so.13")
fake.fake_seen.restype = ctypes.c_double
P, I, N = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
kinds = {"cublasCreate_v2": [P], "cublasDestroy_v2": [P], "cublasSetStream_v2": [P, P],
         "cublasSetWorkspace_v2": [P, P, N],
         "cublasGemmEx": [P, I, I, I, I, I, P, P, I, I, P, I, I, P, P, I, I, I, I]}
found = {}
for name, types in kinds.items():
    fake.fake_reset()
    function = getattr(library, name)
    function.argtypes = types
    given = [(1 << 40) + n if kind is not I else 100 + n for n, kind in enumerate(types)]
    status = function(*given)
    found[name] = [status, [fake.fake_seen(n) for n in range(len(types))] == given]
mode = ctypes.c_int()
found["cublasGetMathMode"] = [library.cublasGetMathMode(P(3), ctypes.byref(mode)), mode.value == 5]
print(json.dumps(found))
"""


def test_calls_of_cublas_12_reach_cublas_13_with_their_arguments(forwarder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(forwarder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "cublasCreate_v2": [11, True], "cublasDestroy_v2": [12, True], "cublasGetMathMode": [13, True],
        "cublasSetStream_v2": [14, True], "cublasSetWorkspace_v2": [15, True], "cublasGemmEx": [16, True],
    }  # fmt: skip


def test_without_cublas_13_the_forwarder_fails_with_a_message(
    forwarder: Path, tmp_path: Path
) -> None:
    shutil.copy(forwarder / "libcublas.so.12", tmp_path)
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).cublasCreate_v2(None)"
    command = [sys.executable, "-c", code, str(tmp_path / "libcublas.so.12")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "cuBLAS 12 is forwarded to cuBLAS 13, and there is no cublasCreate_v2" in done.stderr


@pytest.mark.slow
@pytest.mark.host
def test_the_forwarder_has_what_the_module_calls() -> None:
    """Read from the module's file; nothing is loaded."""
    from importlib.util import find_spec

    from lmdeploy_ext.verify import Symbols

    spec = find_spec("lmdeploy")
    assert spec is not None
    assert spec.origin is not None
    (module,) = (Path(spec.origin).parent / "turbomind").glob("_turbomind*.so")
    symbols = Symbols(module)
    called = {name for name in symbols.names if name.startswith("cublas")}
    source = Path(layout.__file__).with_name("cublas12.c").read_text()
    assert called == set(re.findall(r"^FORWARD\((\w+)", source, re.MULTILINE))
