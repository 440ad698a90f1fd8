"""Makes Python on Linux look like a system without LMDeploy and without Linux's own interfaces.

On PYTHONPATH, Python imports this at every start, in grammar workers too. What it takes away is what
macOS does not have: LMDeploy and its packages, /proc, a limit of the address space, CPU affinity.
"""

import builtins
import os
import resource
from importlib.machinery import PathFinder

ABSENT = {"lmdeploy", "triton", "ray", "cuda", "nvidia", "tilelang", "fla", "mmengine", "openai"}

find, limit, opened = PathFinder.find_spec, resource.setrlimit, builtins.open


def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
    return None if name.partition(".")[0] in ABSENT else find(name, path, target)


def setrlimit(number, limits):  # type: ignore[no-untyped-def]
    if number == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")  # as macOS says
    limit(number, limits)


def open_(file, *arguments, **options):  # type: ignore[no-untyped-def]
    if str(file).startswith("/proc/"):
        raise FileNotFoundError(file)
    return opened(file, *arguments, **options)


PathFinder.find_spec = find_spec  # type: ignore[method-assign,assignment]
resource.setrlimit = setrlimit
builtins.open = open_
del os.sched_getaffinity
