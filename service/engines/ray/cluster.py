"""The connection of this process to Ray: to a running cluster, or to its own on this machine.

Ray is imported here, and has one connection for each process, which several engines share.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from service.errors import EngineUnavailable

QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
"""Environment of every process of Ray that this one starts: no reports to Ray's authors."""
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_gcs_server_port_wait_time_s": "120",
}
"""Environment of a Ray of our own. The first makes it listen on loopback, as it does by default on these
systems, on every system. The second gives replicas the priority of other processes: Ray's default is low.
The third starts no idle process for each core, for which a connection would wait without a limit. The fourth
lets a busy machine take longer than Ray's 30 seconds to start its first process."""
TOKEN = "RAY_AUTH_TOKEN"
LONGEST_FOLDER = 40
"""Maximum length of the folder of Ray: the paths of its sockets are longer, and the system takes 107
bytes."""
REACH_S = 10.0
"""Maximum time to reach a cluster, in seconds."""
MISSING = "engine=ray needs Ray Serve, which is not installed: pip install 'qwen3vl-grpc[ray]'. Missing: {}"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClusterOptions:
    """The Ray to use.

    address: of a running cluster; None starts one on this machine, with ``store_bytes`` of shared
    memory and room for replicas of ``cpus`` CPUs together.
    """

    address: str | None = None
    store_bytes: int = 256 * 1024 * 1024
    cpus: float = 1.0


class Connection:
    """What this process is connected to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._options: ClusterOptions | None = None
        self._folder: str | None = None

    def open(self, options: ClusterOptions) -> None:
        """Connect, or use the connection that there is. Blocks for seconds.

        Raises ``EngineUnavailable``: the message says what is wrong and how to fix it.
        """
        with self._lock:
            ray = _import_ray(local=options.address is None)
            if self._users == 0 and not ray.is_initialized():
                self._connect(options)
                self._options = options
            elif self._options is not None and self._options.address != options.address:
                raise EngineUnavailable(
                    "ray_address: this process is connected to another Ray, and can have one"
                )
            self._users += 1

    def close(self) -> None:
        """Disconnect after the last user; ends Ray where this process started it. A connection that
        somebody else opened stays. Blocks for seconds."""
        with self._lock:
            self._users -= 1
            if self._users or self._options is None:
                return
            import ray

            self._options = None
            ray.shutdown()
            self._remove_folder()

    def _connect(self, options: ClusterOptions) -> None:
        import ray

        try:
            if options.address is None:
                self._folder = _private_folder()
                arguments = _local(options, os.path.join(self._folder, "ray"))
            else:
                _reach(options.address)
                arguments = {"address": options.address}
            with _silent():
                ray.init(logging_level=logging.WARNING, log_to_driver=False,
                         configure_logging=False, **arguments)  # fmt: skip
        except (
            Exception,
            SystemExit,
        ) as error:  # of many types, and Ray ends processes of its users
            self._remove_folder()
            log.warning("Ray could not be used", exc_info=True)
            where = "on this machine" if options.address is None else f"at {options.address}"
            text = str(error).strip().splitlines()
            raise EngineUnavailable(
                f"Ray {where} cannot be used: {text[0] if text else type(error).__name__}"
            ) from error
        except BaseException:  # Ctrl-C
            self._remove_folder()
            raise

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


CONNECTION = Connection()


def _reach(address: str) -> None:
    """Raises ``OSError`` where nothing listens at HOST:PORT. Ray would try for minutes without a word."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()


def _local(options: ClusterOptions, folder: str) -> dict[str, Any]:
    """Arguments of ``ray.init`` for a Ray of this process's own."""
    return {
        "address": "local",
        "num_cpus": max(os.cpu_count() or 1, math.ceil(options.cpus)),
        "object_store_memory": options.store_bytes,
        "include_dashboard": False,
        "_temp_dir": folder,
    }


def _private_folder() -> str:
    """A folder for sockets, logs and images that do not fit into memory; only for this user.

    Ray lets every user of the machine read and write its own folder, which is below this one.
    """
    folder = tempfile.mkdtemp(prefix="qwen3vl-ray-")
    if len(folder) > LONGEST_FOLDER:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="qwen3vl-ray-", dir="/tmp")
    return folder


def _import_ray(*, local: bool) -> Any:
    """Import Ray and Ray Serve, which read variables of the environment at their import."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    if local and "ray" not in sys.modules:
        os.environ.update(LOCAL)
        # Without it Ray writes a token into the home folder, which may be read-only.
        if TOKEN not in os.environ:
            os.environ.update({"RAY_AUTH_MODE": "token", TOKEN: secrets.token_hex(32)})
    _quiet_loggers()
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise EngineUnavailable(MISSING.format(error.name or error)) from error
    _quiet_loggers()
    return ray


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings of Ray at its start: they are about this thread, and about tokens."""
    logger = logging.getLogger("ray")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.WARNING)


def keep_signals() -> None:
    """Give the signals back to the handlers of this process; for its main thread, after Ray has
    started.

    Ray's library replaces their handlers in the system, where Python does not notice: SIGTERM would
    end the process without a drain.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
            signal.siginterrupt(number, False)


def _quiet_loggers() -> None:
    """Warnings of Ray go to the log of the server, in its form; the rest nowhere."""
    for name in ("ray", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
