"""Replacements for functions of LMDeploy that compile grammars.

Each function returns the replacement for one record in `lmdeploy_ext.grammars.records`.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from lmdeploy._guided_decoding import _grammar_source, compile_response_format
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError
from lmdeploy.serve.managers import Session

from lmdeploy_ext.grammars.trials import Trials, TrialsUnavailable
from lmdeploy_ext.grammars.worker import INVALID, UNSUPPORTED

logger = logging.getLogger("lmdeploy_ext")

KEPT = 64
"""Number of compiled grammars that are kept for later requests."""
_SHOWN = 300


class GrammarRefused(RequestError, ValueError):  # type: ignore[misc]  # LMDeploy has no types
    """The grammar of a request cannot be enforced.

    A subclass of ``RequestError``, which every API of `lmdeploy serve` returns as HTTP 400 in its
    own format, and of ``ValueError`` for callers of `pipeline`.
    """

    def __init__(self, reason: str, description: str) -> None:
        super().__init__(ErrorCode.INVALID_REQUEST, f"{reason}: response_format {description}")


class Kept:
    """The latest results for a pair of an object and a ``response_format``. Thread-safe. Keeps no
    object alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, str], tuple[Any, Any]] = OrderedDict()

    def find(self, owner: Any, response_format: Any) -> Any:
        """The result, or None."""
        key = _key(owner, response_format)
        with self._lock:
            known = self._known.get(key) if key else None
            if key is None or known is None or known[0]() is not owner:  # the id of a dead object
                return None
            self._known.move_to_end(key)
            return known[1]

    def put(self, owner: Any, response_format: Any, result: Any) -> None:
        """Keep a result, and forget the oldest of too many."""
        key = _key(owner, response_format)
        if key is None:
            return
        with self._lock:
            self._known[key] = (weakref.ref(owner), result)
            if len(self._known) > KEPT:
                self._known.popitem(last=False)


def _key(owner: Any, response_format: Any) -> tuple[int, str] | None:
    """None for a format that is not JSON."""
    try:
        return id(owner), json.dumps(response_format, ensure_ascii=False)
    except (RecursionError, TypeError, ValueError):
        return None


TRIALS = Trials()
atexit.register(TRIALS.close)
COMPILED = Kept()
"""Compiled grammars by the compiler."""
CHECKED = Kept()
"""Grammars that can be enforced, by the engine."""
# One thread: LMDeploy's compiler is made when it is first used, and must not be made twice.
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="grammar")


def check(engine: Any, response_format: Any) -> None:
    """Try out a grammar, and have the engine compile it. Blocks.

    engine: TurboMind, or LMDeploy's PyTorch engine, whose compiler is that of the trial.

    Raises:
        GrammarRefused: the grammar cannot be enforced.
        RequestError: grammars cannot be tried out now.
    """
    kind, source = _source(response_format)
    if kind == "text":
        return
    field = {"json_schema": "json_schema ", "regex_schema": "regex_schema "}.get(kind, "")
    try:
        problem = TRIALS.problem(kind, source)
    except TrialsUnavailable:
        logger.exception("a grammar cannot be checked")
        raise RequestError(
            ErrorCode.ENGINE_UNAVAILABLE, "Grammars cannot be checked now; try again later."
        ) from None
    if problem is not None:
        reason, description = problem
        raise GrammarRefused(reason, f"{field}{description}")
    compiler = getattr(engine, "grammar_compiler", None)
    try:
        if compiler is not None:
            compiled(compiler, response_format, compile_response_format)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = UNSUPPORTED if kind == "json_schema" else INVALID
        cause = str(error).strip().rpartition(": ")[2].split("\n")[0][:_SHOWN]
        raise GrammarRefused(reason, f"{field}cannot be compiled by TurboMind: {cause}") from error
    CHECKED.put(engine, response_format, True)


def _source(response_format: Any) -> tuple[str, str]:
    """Kind and text of a grammar; the kind is ``text`` for a request without one."""
    if not isinstance(response_format, dict):
        raise GrammarRefused(INVALID, "is not an object")
    if response_format.get("type") == "regex_schema" and not isinstance(
        response_format.get("regex_schema"), str
    ):  # LMDeploy would take the regular expression "None"
        raise GrammarRefused(INVALID, "has no regex_schema, a text")
    try:
        kind, source = _grammar_source(response_format)
    except RecursionError:
        raise GrammarRefused(INVALID, "is nested too deeply") from None
    except (KeyError, ValueError, TypeError) as error:
        raise GrammarRefused(INVALID, f"cannot be read: {str(error)[:_SHOWN]}") from None
    return kind, source


def compiled(compiler: Any, response_format: Any, make: Callable[..., Any]) -> Any:
    """The compiled grammar. Raises what ``make`` raises."""
    found = COMPILED.find(compiler, response_format)
    if found is None:
        found = make(compiler, response_format)
        COMPILED.put(compiler, response_format, found)
    return found


_refusal: ContextVar[RequestError | None] = ContextVar("refusal", default=None)


def preprocess(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Checks the grammar of a request in a thread, before LMDeploy prepares the request."""

    @functools.wraps(original)
    async def replacement(
        self: Any,
        messages: Any,
        session_id: Any,
        gen_config: Any = None,
        *arguments: Any,
        **keywords: Any,
    ) -> Any:
        response_format = getattr(gen_config, "response_format", None)
        if response_format is None or CHECKED.find(self.engine, response_format):
            return await original(self, messages, session_id, gen_config, *arguments, **keywords)
        refusal = None
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(_THREAD, check, self.engine, response_format)
        except RequestError as error:
            refusal = error
        token = _refusal.set(refusal)  # raised where LMDeploy counts failed requests
        try:
            return await original(self, messages, session_id, gen_config, *arguments, **keywords)
        except RequestError as error:
            if error is refusal:
                _forget(self.session_mgr, session_id)
            raise
        finally:
            _refusal.reset(token)

    return replacement


def _forget(manager: Any, session: Any) -> None:
    """Remove the session of a refused request, which stock LMDeploy keeps."""
    if isinstance(session, Session) and session._handle is None:
        manager.remove(session)


def ensure_compilable(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Raises the refusal of `preprocess`, which has checked the grammar."""

    @functools.wraps(original)
    def replacement(response_format: Any) -> None:
        refusal = _refusal.get()
        if refusal is not None:
            raise refusal

    return replacement


def compile_for_turbomind(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled grammar. An error is one that LMDeploy does not take for permission to
    go on without the grammar."""

    @functools.wraps(original)
    def replacement(compiler: Any, response_format: Any) -> Any:
        try:
            return compiled(compiler, response_format, original)
        except (ValueError, KeyError) as error:
            raise RequestError(
                ErrorCode.INVALID_REQUEST, f"{INVALID}: response_format cannot be compiled: {error}"
            ) from error

    return replacement


def pipeline_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patches the function that all forms of a pipeline call use, in the caller's thread."""

    @functools.wraps(original)
    def replacement(
        self: Any, prompts: Any, sessions: Any = None, gen_config: Any = None, **keywords: Any
    ) -> Any:
        for one in gen_config if isinstance(gen_config, list) else [gen_config]:
            response_format = getattr(one, "response_format", None)
            if response_format is None:
                continue
            try:
                _THREAD.submit(check, self.async_engine.engine, response_format).result()
            except RequestError:
                for session in sessions if isinstance(sessions, list) else [sessions]:
                    _forget(self.session_mgr, session)
                raise
        return original(self, prompts, sessions=sessions, gen_config=gen_config, **keywords)

    return replacement
