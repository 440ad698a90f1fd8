"""A worker process that does what a parser with a defect does, for sources that ask for it.

The rest of it is the worker of the service: frames, limits, alarm, trial compilation. The analysis
is a short one: of what is allowed, its grammar knows an empty object.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from service.schema_compiler.emit.rules import literal
from service.schema_compiler.grammar_checks import check_grammar
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import Analysed, Enforcement, GrammarReport
from service.structured_output import worker
from service.types import Grammar, GrammarKind

HANG = '{"title": "hang"}'
HANG_DEEP = '{"title": "hang and hear nothing"}'
SEGFAULT = '{"title": "segfault"}'
KILLED = '{"title": "killed"}'
"""As by an operator, or by a system that is short of memory."""
EAT = '{"title": "eat"}'
NONSENSE = '{"title": "nonsense"}'
GROW = '{"title": "grow"}'
LITTER = '"litter'
"""How sources begin that leave garbage of the kind that only a collection finds. The process ends when
it sees that of the one before, or while collections may interrupt it."""
STRUCK = '"struck"'
"""Sources of ``struck``: a signal of somebody else hits the first processes that get one."""
SLOW = '"slow'
"""How sources begin whose analysis takes a while."""


def struck(file: Path, processes: int, number: int) -> str:
    """A source under which a signal hits so many processes; the next one answers. file: counts them."""
    return json.dumps({"title": "struck", "$comment": f"{processes} {int(number)} {file}"})


def _strike(source: str) -> None:
    processes, number, path = json.loads(source)["$comment"].split(" ", 2)
    with open(path, "ab") as file:
        file.write(b".")
        file.flush()
        if file.tell() <= int(processes):
            os.kill(os.getpid(), int(number))


def analyse(grammar: Grammar, limits: SchemaLimits) -> Analysed:
    """Checks as in the service, and a grammar of one text."""
    check_grammar(grammar, limits)
    if grammar.source == EAT:
        bytearray(worker.MEMORY_BYTES)
    is_ebnf = grammar.kind is GrammarKind.EBNF
    ebnf = grammar.source if is_ebnf else "root ::= " + literal("{}")
    ready = Grammar(grammar.kind, grammar.source, ebnf, not is_ebnf)
    return Analysed(ready, GrammarReport(Enforcement.ENFORCED, ebnf_bytes=len(ebnf)))


def misbehave(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of the real worker, where there is one."""
    source = request["source"]
    if source == HANG:
        time.sleep(600)
    elif source == HANG_DEEP:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:  # as native code: the processor is busy and no signal is looked at
            pass
    elif source in (SEGFAULT, KILLED):
        os.kill(os.getpid(), signal.SIGSEGV if source == SEGFAULT else signal.SIGKILL)
    elif source == NONSENSE:
        return {"ebnf": 7}
    elif source == GROW:
        worker.WEIGHT_BYTES = 0
    elif STRUCK in source:
        _strike(source)
    elif LITTER in source:
        if gc.isenabled() or any(one() is not None for one in _litter):
            os.kill(os.getpid(), signal.SIGKILL)
        _leave_litter()
    elif SLOW in source:
        time.sleep(0.05)
    return _answer(request)


_litter: list[weakref.ref[Any]] = []


def _leave_litter() -> None:
    one = type("Litter", (), {})()
    one.itself = one
    _litter.append(weakref.ref(one))


if __name__ == "__main__":
    if sys.argv[1:] == ["--dead"]:
        sys.exit(3)
    _answer = worker.answers(analyse)
    worker.main(misbehave)
