"""``python -m benchmarks.gpu_kit``: the steps on this machine's GPU.

``pack FOLDER`` collects, on a machine with a network, what an offline one lacks. On the GPU's machine
``--parts FOLDER`` takes what has arrived of it; without, LMDeploy has to be installed. The same
command again goes on where the last one was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.common import RESULTS
from benchmarks.gpu_kit import conduct, layout, parts
from benchmarks.gpu_kit.context import ROOT, Context
from benchmarks.gpu_kit.plan import BUDGET_S, LAYOUT_LIMIT_S, STEPS

ROOM_BYTES = 40 << 30
"""Of checkpoints and packages; memory that is a file system is the fastest place for them."""
FAILED, MISSING, UNFINISHED = 1, 3, 4
NOT_INSTALLED = (
    "LMDeploy is not installed: pip install 'lmdeploy>=0.18,<0.19', or, on a machine without a network, "
    "bring the parts that `python -m benchmarks.gpu_kit pack FOLDER` collects and name their folder with "
    "--parts"
)


def work_folder() -> Path:
    """Where there is room, in memory if possible."""
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if folder.is_dir() and shutil.disk_usage(folder).free > ROOM_BYTES:
            return folder / f"gpu-kit-{os.getuid()}"
    return Path(tempfile.gettempdir()) / f"gpu-kit-{os.getuid()}"


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["--internal"]:
        return _internal(*words[1:])
    if words[:1] == ["pack"]:
        return _pack(words[1:])
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_kit", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--parts", type=Path, help="folder with parts of this transfer")
    parser.add_argument("--work", type=Path, help="for what can be made again; 40 GB")
    parser.add_argument("--results", type=Path, help=f"where runs are kept, {RESULTS / 'gpu'}")
    parser.add_argument(
        "--out", type=Path, help="also gets the summary and the logs after each step"
    )
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_S, help="of this call, %(default)s"
    )
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], metavar="STEP",
                        help=f"only these of: {', '.join(step.name for step in STEPS)}")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="repeat what has a result")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: every step, tiny")
    return _run(parser.parse_args(words))


def _internal(kind: str, name: str, reply: str, context: str) -> int:
    """A process of the kit's own."""
    if kind == "work":
        from benchmarks.gpu_kit.worker import main as work

        work(name, int(reply), Context.from_json(context))
    else:
        from benchmarks.gpu_kit.prepare import main as prepare

        prepare(name, Context.from_json(context))
    return 0


def _pack(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_kit pack")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU, %(default)s")
    parser.add_argument("--part-mib", type=int, default=parts.PART_BYTES >> 20, help="%(default)s")
    options = parser.parse_args(words)
    try:
        parts.pack(options.folder, ROOT, options.python, options.part_mib << 20)
    except parts.PartsError as error:
        print(error, file=sys.stderr)
        return FAILED
    return 0


def _run(options: argparse.Namespace) -> int:
    begun = time.monotonic()
    dry = options.dry_run
    work = (options.work or (ROOT / ".cache" / "gpu_kit" if dry else work_folder())).resolve()
    root = (options.results or (work / "results" if dry else RESULTS / "gpu")).resolve()
    context = Context(work, conduct.results_folder(root, dry), dry)
    steps = [step for step in STEPS if not options.steps or step.name in options.steps]
    if options.again:
        for step in steps:
            context.result(step.name).unlink(missing_ok=True)
    _say(f"results go to {context.results}")
    try:
        arrived = None
        if options.parts is not None:
            arrived = parts.receive(options.parts.resolve(), work / "parts")
        site = work / "site" if arrived and layout.installed() is None else None
        conductor = conduct.Conductor(
            context, lambda engine: _variables(dry, engine, site), steps, options.budget_s,
            _say, options.out.resolve() if options.out else None,
        )  # fmt: skip
        try:
            if site is not None and not _lay_out(arrived, work / "parts", site, conductor):
                return MISSING
            if site is None and layout.installed() is None:
                raise layout.LayoutError(NOT_INSTALLED)
            conductor.prepare()
            # An LMDeploy that was installed by others shows at the first step whether it loads.
            checked = None if site is None else site / ".checked"
            if dry or (checked is not None and not checked.exists()):
                layout.check(_variables(dry, True, site, "driver"))
            if checked is not None:
                checked.touch()
            _say(
                f"LMDeploy is ready after {time.monotonic() - begun:.1f} s (planned: {LAYOUT_LIMIT_S:.0f} s)"
            )
            left = conductor.run()
        finally:
            conductor.stop()
    except (parts.PartsError, layout.LayoutError) as error:
        print(error, file=sys.stderr)
        return FAILED
    summary = conductor.summarise()
    statuses = {name: found["status"] for name, found in summary["steps"].items() if found}
    wrong = [name for name, status in statuses.items() if status not in ("passed", "running")]
    _say(f"{len(statuses)} of {len(steps)} steps have results after {time.monotonic() - begun:.0f} s"
         + (f"; not passed: {', '.join(wrong)}" if wrong else ""))  # fmt: skip
    _say(f"summary: {context.results / 'summary.md'}")
    return FAILED if wrong else UNFINISHED if left else 0


def _lay_out(arrived: parts.Arrived, store: Path, site: Path, conductor: conduct.Conductor) -> bool:
    """Lay out what has arrived; whether that is all. What the processor makes begins meanwhile."""
    groups = {part.group for part in arrived.missing}
    if not groups & {"packages"}:
        layout.install_packages(arrived.parts, store, site)
        sys.path.append(str(site))  # for the versions in the results
        conductor.prepare()
    if not groups - {"project"}:
        layout.install_lmdeploy(arrived.parts, store, site)
        return True
    names = ", ".join(part.name for part in arrived.missing if part.group != "project")
    _say(f"parts are still missing: {names}. Send them and call this again")
    conductor.wait_for_makers()
    return False


def _variables(
    dry: bool, engine: bool, site: Path | None, mode: Literal["driver", "numbers"] = "numbers"
) -> Mapping[str, str]:
    """The environment of a process of the kit; a dry run gives LMDeploy the host runtime."""
    values = dict(layout.environment(site))
    if not dry:
        return values
    values["OMP_NUM_THREADS"] = "1"
    if not engine:
        return values | {"CUDA_VISIBLE_DEVICES": ""}
    from tests.host_runtime.runner import environment

    found = environment(mode)
    path = [found["PYTHONPATH"], values["PYTHONPATH"]]
    return values | found | {"PYTHONPATH": os.pathsep.join(path)}


def _say(text: str) -> None:
    print(f"[gpu kit] {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
