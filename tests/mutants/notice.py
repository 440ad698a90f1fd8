"""Runs the tests that could notice a change of a module, the likeliest first.

The exit status is 0 where all of them pass. They are the tests of the fast ring that run the changed
lines, or that start processes, and the slow tests of the module's area; the host tests are not among
them, and their modules are not mutated (`EXCLUDED` in ``tests/mutants/__main__.py``).
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
FAST = "not slow and not gpu and not long"
SLOW = "slow and not host and not gpu and not long"
MEMORY_BYTES = 12 << 30
"""A mutant that allocates without end fails its test instead of taking the machine down."""
NO_TESTS_COLLECTED = 5


def area(module: Path) -> list[str]:
    """Test files that mirror the module, then those that name it, then those of its folder."""
    folder = TESTS / module.parent
    while not any(folder.glob("test_*.py")):
        folder = folder.parent
    stem = module.parent.name if module.stem == "__init__" else module.stem
    package = module.parent.as_posix().replace("/", ".")
    names = (f"{package}.{module.stem}".removesuffix(".__init__"), f"from {package} import {stem}")

    def distance(path: Path) -> int | None:
        if path == folder / f"test_{stem}.py":
            return 0
        text = path.read_text(encoding="utf-8")
        if any(name in text for name in names):
            return 1
        return 2 if path.parent == folder else None

    found = [(distance(path), path) for path in TESTS.rglob("test_*.py")]
    near = sorted((away, path) for away, path in found if away is not None)
    return [path.relative_to(ROOT).as_posix() for _, path in near]


def nearest_first(tests: Iterable[str], near: list[str]) -> list[str]:
    """Tests or test files, those of the area first and by its order."""

    def key(test: str) -> tuple[int, str]:
        file = test.partition("::")[0]
        return (near.index(file) if file in near else len(near), test)

    return sorted(tests, key=key)


def stages(listed: set[str], near: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Markers, and the tests with them, in the order in which they run.

    listed: the tests of the fast ring that could notice; ``tests`` stands for all of them.
    """
    if "tests" in listed:
        everything = {path.relative_to(ROOT).as_posix() for path in TESTS.rglob("test_*.py")}
        yield FAST, near
        yield FAST, sorted(everything - set(near))
    else:
        yield FAST, nearest_first(listed, near)
    yield SLOW, near


def passes(markers: str, tests: list[str], left_out: set[str]) -> bool:
    if not tests:
        return True
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", markers]
    options = ["--timeout", "120", *(f"--deselect={test}" for test in left_out)]
    done = subprocess.run([*command, *options, *tests], cwd=ROOT, check=False)
    return done.returncode in (0, NO_TESTS_COLLECTED)


def main(module: Path, listed: Path) -> int:
    """listed: a file with the tests of the fast ring that could notice, one a line; behind a ``!``
    those that are left out."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    lines = set(listed.read_text(encoding="utf-8").splitlines())
    left_out = {line[1:] for line in lines if line.startswith("!")}
    tests = {line for line in lines if not line.startswith("!")}
    every = stages(tests, area(module))
    return 0 if all(passes(markers, chosen, left_out) for markers, chosen in every) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
