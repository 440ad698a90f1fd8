"""Changes the code on purpose, one place at a time, and looks whether a test fails: `make mutants`.

A sample of the mutants of Cosmic Ray, drawn with a seed: first a place in the code, each as likely as
the others, then one of its mutants. Every mutant runs in a copy of the working tree, against the tests
that run its lines (``tests/mutants/notice.py``): the fast ring runs once before, under coverage.
Survivors are printed with their diff; those that ``equivalent.yaml`` lists change nothing that a user
could see.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult
from coverage import CoverageData

from tests.mutants.judging import Entry, changed_lines, entries, reason
from tests.mutants.lines import Position, not_run, statement
from tests.mutants.notice import FAST
from tests.mutants.watching import STARTS

ROOT = Path(__file__).parents[2]

EXCLUDED = {
    "service/pb": "generated",
    "service/client.py": "a generated copy; the client has tests of its own",
    "lmdeploy_ext/turbomind": "runs inside TurboMind: its tests need the host runtime, minutes each",
    "lmdeploy_ext/deepstack/binding.py": "as above",
    "lmdeploy_ext/deepstack/engine.py": "as above",
    "lmdeploy_ext/deepstack/memory.py": "as above",
    "lmdeploy_ext/deepstack/records.py": "as above",
    "lmdeploy_ext/deepstack/trial.py": "as above",
    "lmdeploy_ext/grammars/guard.py": "as above",
    "lmdeploy_ext/grammars/records.py": "as above",
    "lmdeploy_ext/media/guard.py": "as above",
    "lmdeploy_ext/media/records.py": "as above",
    "lmdeploy_ext/vision_off/guard.py": "as above",
    "lmdeploy_ext/vision_off/http.py": "as above",
    "lmdeploy_ext/vision_off/records.py": "as above",
    "lmdeploy_ext/__main__.py": "as above",
    "service/engines/lmdeploy/hosts.py": "as above",
}
"""What is not mutated, and why."""

TIMEOUT_S = 1800
"""All tests of one mutant; pytest ends a single test that hangs much earlier."""


@dataclass(frozen=True)
class Tried:
    mutation: MutationSpec
    result: WorkResult

    @property
    def where(self) -> str:
        return f"{self.mutation.module_path}:{self.mutation.start_pos[0]}"

    @property
    def operator(self) -> str:
        return self.mutation.operator_name.removeprefix("core/")

    @property
    def noticed_by(self) -> str:
        """The test that failed, without its parameters; or what else ended the tests."""
        found = re.search(r"^FAILED ([^\s\[]+)", self.result.output or "", re.MULTILINE)
        if found is not None:
            return found[1]
        return (
            "a timeout" if self.result.output == "timeout" else "an error on import or in a fixture"
        )

    def equivalent(self, entries: list[Entry]) -> str | None:
        path = self.mutation.module_path.as_posix()
        was, becomes = changed_lines(self.result.diff or "")
        return reason(entries, path, self.operator, was, becomes)


# Sampling, in the working folder


def modules(only: Iterable[str]) -> list[Path]:
    """The modules to mutate; ``only``: paths of folders or files."""
    found = (
        path for package in ("service", "lmdeploy_ext") for path in Path(package).rglob("*.py")
    )
    wanted = [Path(one) for one in only]
    return sorted(
        path
        for path in found
        if not any(path.is_relative_to(out) for out in EXCLUDED)
        and (not wanted or any(path.is_relative_to(one) for one in wanted))
    )


def places(paths: list[Path]) -> list[list[MutationSpec]]:
    """Every place that can be changed, with its mutants."""
    found: dict[tuple[Path, Position, Position], list[MutationSpec]] = {}
    dead = {path: list(not_run(path.read_text(encoding="utf-8"))) for path in paths}
    with use_db(":memory:") as db:
        init(paths, db, {})
        for item in db.work_items:
            (one,) = item.mutations
            path, begin, end = one.module_path, one.start_pos, one.end_pos
            if not any(first <= begin and end <= last for first, last in dead[path]):
                found.setdefault((path, begin, end), []).append(one)
    order = {place: sorted(every, key=spelled) for place, every in found.items()}
    return [order[place] for place in sorted(order)]


def spelled(mutation: MutationSpec) -> tuple[str, int]:
    return mutation.operator_name, mutation.occurrence


def sample(seed: int, size: int, only: Iterable[str]) -> list[MutationSpec]:
    dice = random.Random(seed)
    paths = modules(only)
    every = places(paths)
    drawn = [dice.choice(one) for one in dice.sample(every, min(size, len(every)))]
    print(f"{len(drawn)} of {len(every)} places in {len(paths)} modules, seed {seed}", flush=True)
    return drawn


# Which tests could notice


@dataclass(frozen=True)
class Ring:
    """The fast ring: which tests ran which lines.

    starting: the tests that start processes, whose lines are not seen. unreliable: those that failed
    without a mutant; they are left out.
    """

    root: Path
    data: CoverageData
    starting: frozenset[str]
    unreliable: frozenset[str]

    def noticing(self, mutation: MutationSpec) -> set[str]:
        """The tests, test files and folders that could notice a mutant; ``tests`` is every test."""
        path = self.root / mutation.module_path
        contexts = self.data.contexts_by_lineno(str(path))
        lines = statement(path.read_text(encoding="utf-8"), mutation.start_pos[0])
        found = {context for line in lines for context in contexts.get(line, ())}
        if "" in found:  # runs at import, so that every test sees what came of it
            return {"tests"}
        return (found | self.starting) - self.unreliable


def watched(tree: Path, python: str, folder: Path) -> Ring:
    """Run the fast ring once, without a mutant."""
    data, starts = folder / "coverage", folder / "starting.json"
    command = [
        python,
        "-m",
        "coverage",
        "run",
        "--source=service,lmdeploy_ext",
        f"--data-file={data}",
    ]
    watching = ["-p", "no:cacheprovider", "-p", "tests.mutants.watching", "--timeout", "60"]
    pytest = ["-m", "pytest", "-q", *watching, "-m", FAST]
    env = {**environment(tree), STARTS: str(starts)}
    done = subprocess.run(
        [*command, *pytest], cwd=tree, env=env, check=False, capture_output=True, text=True
    )
    if not starts.exists():
        raise SystemExit(done.stdout + done.stderr)
    failed = frozenset(
        re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+::[^\s\[]+)", done.stdout, re.MULTILINE)
    )
    print(done.stdout.splitlines()[-1], *sorted(failed), sep="\n", flush=True)
    measured = CoverageData(str(data))
    measured.read()
    return Ring(tree, measured, frozenset(json.loads(starts.read_text())) - {""}, failed)


# Running


def snapshot(folder: Path) -> Path:
    """A copy of the working tree, tracked and new files, with links to what lies outside of it."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tree, check=True)
    for outside, link in (
        (ROOT / ".venv", tree / ".venv"),
        (ROOT.parent / "shared", folder / "shared"),
    ):
        if outside.exists() and not link.exists():
            link.symlink_to(outside.resolve())
    return tree


def environment(tree: Path) -> dict[str, str]:
    """The code of a tree comes first, before what is installed."""
    paths = [str(tree), str(tree / "clients" / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def enter(unchanged: Path) -> None:
    """In a process of its own: work in a copy of the tree from now on."""
    folder = Path(tempfile.mkdtemp(dir=unchanged.parents[1]))
    for path in unchanged.parent.iterdir():
        if path.is_symlink():
            (folder / path.name).symlink_to(path.readlink())
    tree = shutil.copytree(unchanged, folder / "tree", symlinks=True)
    os.environ.update(environment(tree))
    os.chdir(tree)


def try_one(
    mutation: MutationSpec, tests: set[str], left_out: frozenset[str], python: str
) -> WorkResult:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join([*tests, *(f"!{test}" for test in left_out)]))
        listed.flush()
        notice = [python, "-m", "tests.mutants.notice", str(mutation.module_path), listed.name]
        return mutate_and_test([mutation], shlex.join(notice), TIMEOUT_S)


def try_all(mutations: list[MutationSpec], ring: Ring, python: str, jobs: int) -> Iterator[Tried]:
    with ProcessPoolExecutor(jobs, initializer=enter, initargs=(ring.root,)) as pool:
        waiting = {
            pool.submit(try_one, one, ring.noticing(one), ring.unreliable, python): one
            for one in mutations
        }
        for done in as_completed(waiting):
            yield Tried(waiting[done], done.result())


def fail_anyway(tests: Iterable[str], tree: Path, python: str) -> str:
    """What pytest says of the tests in the unchanged code; empty where they pass."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(tests)]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree), check=False, capture_output=True, text=True
    )
    return done.stdout if done.returncode else ""


# Judging


def report(every: list[Tried], entries: list[Entry]) -> None:
    survivors = [one for one in every if one.result.test_outcome is TestOutcome.SURVIVED]
    judged = [
        (one, one.equivalent(entries)) for one in sorted(survivors, key=lambda one: one.where)
    ]
    for one, why in judged:
        print(f"\n{one.where} {one.operator}: " + (f"equivalent: {why}" if why else "SURVIVED"))
        print(one.result.diff)
    equivalent = sum(why is not None for _, why in judged)
    killed, rest = len(every) - len(survivors), len(every) - equivalent
    rate = 100 * killed / rest if rest else 100.0
    print(
        f"\n{len(every)} mutants: {killed} killed, {len(survivors)} survived, {equivalent} of them "
        f"equivalent. Kill rate of the others: {killed} of {rest}, {rate:.1f} %"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="default: a random one"
    )
    parser.add_argument("--sample", type=int, default=100, help="number of mutants (100)")
    parser.add_argument(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="mutants at a time"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the tests")
    parser.add_argument(
        "only", nargs="*", help="folders or files to change, of service/ and lmdeploy_ext/"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        tree = snapshot(folder / "unchanged")
        os.chdir(tree)
        mutations = sample(asked.seed, asked.sample, asked.only)
        ring = watched(tree, asked.python, folder)
        every: list[Tried] = []
        for tried in try_all(mutations, ring, asked.python, asked.jobs):
            if tried.result.worker_outcome is not WorkerOutcome.NORMAL:
                print(tried.result.output)
                return 2
            every.append(tried)
            survived = tried.result.test_outcome is TestOutcome.SURVIVED
            how = "SURVIVED" if survived else f"killed by {tried.noticed_by}"
            print(
                f"{len(every)}/{len(mutations)} {tried.where} {tried.operator}: {how}", flush=True
            )
            if survived:
                print(tried.result.diff, flush=True)
        tests = {one.noticed_by for one in every if "::" in one.noticed_by}
        wrong = fail_anyway(tests, tree, asked.python) if tests else ""
    report(every, entries())
    if wrong:
        print(
            f"{wrong}\nSome of the tests that killed mutants fail without them: the rate means nothing."
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
