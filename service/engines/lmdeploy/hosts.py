"""A common interface for LMDeploy's two engines.

It uses LMDeploy's engine objects (``TurboMind`` or the PyTorch ``Engine``) directly, not LMDeploy's
async engine above them. The async engine would tokenise again, compile grammars on the event loop,
turn off the repetition penalty of greedy requests, detokenise, delay each request until one of a
fixed number of handles is free, and report errors with little detail.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from lmdeploy_ext.lengths.binding import Library
from service.engines.lmdeploy.guidance import (
    Compiler,
    Constraint,
    Handover,
    LimitedDecoding,
    PyTorchCompiler,
    TurboMindCompiler,
)
from service.engines.lmdeploy.options import PYTORCH, TURBOMIND
from service.engines.lmdeploy.running import Instance
from service.errors import EngineUnavailable

logger = logging.getLogger(__name__)


class Native(Protocol):
    """The methods of LMDeploy's engine objects that this module uses."""

    engine_config: Any

    def create_instance(self) -> Any: ...

    async def get_health_status(self) -> dict[str, Any]:
        """``alive``, ``message`` and ``schedule_metrics``, which may be None."""
        ...

    def close(self) -> None: ...


class Host(Protocol):
    """A started engine of LMDeploy."""

    backend: str
    spare_tokens: int
    """Number of tokens of a session in addition to the context."""
    native: Native
    compiler: Compiler
    limits_lengths: bool
    """Whether lengths of strings are limited beside the grammar."""

    @property
    def session_len(self) -> int | None:
        """Maximum number of tokens of a request that the engine has memory for; None if it does not
        say."""
        ...

    async def start(self) -> None:
        """Start the parts that need the event loop. Called once."""
        ...

    def open(
        self, session_id: int, constraint: Constraint | None
    ) -> tuple[Instance, dict[str, Any] | None]:
        """A handle for one request under a constraint, and its ``response_format``."""
        ...

    def drop(self, session_id: int) -> None:
        """Free the grammar of a request."""
        ...

    def bad_ids(self, constraint: Constraint | None) -> Sequence[int]:
        """Tokens that a request must not choose, in addition to those that its mask forbids."""
        ...

    async def close(self) -> None:
        """Free the engine. No request may be in flight."""
        ...


class TurboMindHost:
    """TurboMind. The grammar is set on the request object."""

    backend = TURBOMIND
    spare_tokens = 1
    session_len = None

    def __init__(
        self,
        native: Any,
        module: Any,
        table: Sequence[bytes],
        stop_ids: Sequence[int],
        limiter: Library | None = None,
    ) -> None:
        """module: TurboMind's extension module, for its grammar compiler. limiter: intercepts its
        xgrammar; None where lengths of strings cannot be limited beside the grammar."""
        self.native = native
        self.compiler: Compiler = TurboMindCompiler(module, table, stop_ids, limiter)
        self.limits_lengths = limiter is not None
        self._open: dict[int, Constraint] = {}

    async def start(self) -> None:
        """Does nothing: TurboMind runs in its own threads."""

    def open(
        self, session_id: int, constraint: Constraint | None
    ) -> tuple[Instance, dict[str, Any] | None]:
        """See `Host.open`. Each request needs a new request object, because the object has the
        grammar."""
        instance = self.native.create_instance()
        if constraint is not None:
            instance.model_inst.set_grammar(constraint.compiled)
            self._open[session_id] = constraint
        return instance, None

    def drop(self, session_id: int) -> None:
        """See `Host.drop`. The grammar belongs to the request object, the limits do not."""
        self._open.pop(session_id, None)

    def bad_ids(self, constraint: Constraint | None) -> Sequence[int]:
        """No tokens: the mask forbids special tokens."""
        return ()

    async def close(self) -> None:
        """See `Host.close`. The engine's destructor blocks, so it runs in a thread."""
        await asyncio.to_thread(self.native.close)
        health = getattr(self.native, "health_executor", None)
        if health is not None:
            health.shutdown(wait=False)


class PyTorchHost:
    """LMDeploy's PyTorch engine. Its tasks run on the event loop on which ``start`` was called."""

    backend = PYTORCH
    spare_tokens = 0

    def __init__(
        self,
        native: Any,
        table: Sequence[bytes],
        stop_ids: Sequence[int],
        special_ids: Sequence[int],
    ) -> None:
        self.native = native
        stops = set(stop_ids)
        self._special = [index for index in special_ids if index not in stops]
        manager = _guided_decoding(native)
        self._handover = None if manager is None else Handover()
        if manager is not None:
            if manager.vocab_size != len(table):
                raise EngineUnavailable(
                    f"LMDeploy masks {manager.vocab_size} tokens where the model has {len(table)}; "
                    "guided decoding would fail"
                )
            manager.compiler = self._handover
        self.limits_lengths = manager is not None and all(
            hasattr(manager, name) for name in LimitedDecoding.METHODS
        )
        if self.limits_lengths and self._handover is not None:
            LimitedDecoding(manager, self._handover, table)
        self.compiler: Compiler = PyTorchCompiler(table, stop_ids, as_text=manager is None)

    @property
    def session_len(self) -> int | None:
        """See `Host.session_len`."""
        return getattr(self.native, "max_session_len", None)

    async def start(self) -> None:
        """Start the engine's loop; a second call does nothing."""
        self.native.start_loop()

    def open(
        self, session_id: int, constraint: Constraint | None
    ) -> tuple[Instance, dict[str, Any] | None]:
        """See `Host.open`."""
        instance = self.native.create_instance()
        if constraint is None:
            return instance, None
        if self._handover is None:
            return instance, constraint.compiled
        return instance, self._handover.put(session_id, constraint.compiled, constraint.lengths)

    def drop(self, session_id: int) -> None:
        """See `Host.drop`."""
        if self._handover is not None:
            self._handover.drop(session_id)

    def bad_ids(self, constraint: Constraint | None) -> Sequence[int]:
        """Special tokens, if another process makes the masks: that process treats them as text."""
        return () if constraint is None or self._handover is not None else self._special

    async def close(self) -> None:
        """See `Host.close`. Cancels the engine's tasks and waits for them."""
        before = {"EngineMainLoop", "SenderWaitLoop"}  # the names of LMDeploy's tasks
        tasks = [task for task in asyncio.all_tasks() if task.get_name() in before]
        self.native.close()
        stop_loop = getattr(getattr(self.native, "req_manager", None), "stop_loop", None)
        if stop_loop is not None:
            stop_loop()
        if tasks:
            await asyncio.wait(tasks)


def _guided_decoding(native: Any) -> Any:
    """The guided-decoding manager of a model in this process; None if the model runs in others.

    Raises EngineUnavailable if LMDeploy has turned guided decoding off, which it only logs.
    """
    agent = getattr(getattr(native, "executor", None), "model_agent", None)
    if agent is None:
        return None
    manager = agent.guided_decoding_manager
    if manager is None:
        raise EngineUnavailable(
            "LMDeploy cannot guide decoding with this checkpoint's tokenizer; its log says why"
        )
    return manager
