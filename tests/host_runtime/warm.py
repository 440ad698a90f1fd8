"""A process on the host runtime that has imported LMDeploy, and forks for each call: an import takes
seconds, a fork none. It has no engine, no thread and no device memory, and the extension is not installed.

It listens on a socket. A caller sends a call as a line of JSON, gets the id of the process that makes
it, and, when that has ended, its exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.host_runtime.child import end_with_parent, make


def main() -> None:
    _import_all()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:  # the tests have ended
                return
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    listener.close()
                    _watch(connection)


def _import_all() -> None:
    """Import what an engine and the extension import when they are first used."""
    from lmdeploy_ext.patches import PATCHES

    for record in PATCHES:
        record.problem()  # imports what it is about, and changes nothing
    for name in (
        "lmdeploy_ext.turbomind.model",
        "lmdeploy.turbomind.model_loader",
        "transformers.models.qwen3_vl",
        "transformers.models.qwen3_vl_moe",
        "transformers.models.qwen3_5",
        "transformers.models.qwen3_5_moe",
    ):
        importlib.import_module(name)


def _watch(connection: socket.socket) -> None:
    """In a process of its own: start the one that makes the call, and report its end."""
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection.makefile("rw") as stream:
        request = json.loads(stream.readline())
        worker = os.fork()
        if worker == 0:
            os.close(connection.fileno())
            _work(request)
        print(worker, file=stream, flush=True)
        _, status = os.waitpid(worker, 0)
        print(os.waitstatus_to_exitcode(status), file=stream, flush=True)
    os._exit(0)


def _work(request: dict[str, Any]) -> None:
    """In the process that makes the call: as if it had been started just so."""
    os.setsid()
    end_with_parent()
    nothing, log = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(request["log"], os.O_WRONLY | os.O_APPEND),
    )
    for number, target in enumerate((nothing, log, log)):
        os.dup2(target, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    try:
        make(request["call"], Path(request["result"]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
