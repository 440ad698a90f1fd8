"""The state of one request in the worker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.engines.common.detokenizer import Detokenizer
from service.engines.common.loops import LoopGuard
from service.types import Chunk, FinishReason, Timings, Usage

if TYPE_CHECKING:
    from torch import Tensor

    from lmdeploy_ext.packing import PackedRequest
    from service.engines.common.grammar import Matcher
    from service.engines.reference.cache import Run
    from service.engines.reference.sampler import Sampler

Piece = tuple[str, int, int, int]
"""Text of an answer, and the usage with it in the order of `Usage`. The chunk is made where it is
delivered: several pieces may become one."""
Event = Piece | Chunk | Exception | None
"""Text of the answer, its last chunk, the error that ended it, or None when its memory is free again."""


class Sequence:
    """The state of one request. Belongs to the worker; other threads only set ``cancelled``.

    Attributes:
        features: embeddings and DeepStack features of the image tokens, each (M, D); empty for
            text.
        run: the request's rows of the key-value pool, once admitted.
        computed: tokens of prompt and answer whose keys and values are in the pool. answer: the
            tokens chosen so far, without the end token. draft: tokens that the grammar forces next,
            probably split as the model would.
    """

    def __init__(
        self,
        prompt: PackedRequest,
        features: tuple[Tensor, ...],
        max_tokens: int,
        sampler: Callable[[], Sampler],
        matcher: Callable[[], Matcher] | None,
        detokenizer: Detokenizer,
        guard: LoopGuard,
        stop_ids: frozenset[int],
        emit: Callable[[Event], None],
        received: float,
    ) -> None:
        self.prompt = prompt
        self.features = features
        self.prompt_length = len(prompt.token_ids)
        self.image_tokens = sum(end - begin for begin, end in prompt.spans)
        self.reserved = self.prompt_length + max_tokens
        self.max_tokens = max_tokens
        self.run: Run | None = None
        self.computed = 0
        self.answer: list[int] = []
        self.draft: list[int] = []
        self.cancelled = False
        self.finished = False
        self._new_sampler, self._new_matcher = sampler, matcher
        self.sampler: Sampler
        self.matcher: Matcher | None = None
        self._detokenizer = detokenizer
        self._guard = guard
        self._stop_ids = stop_ids
        self._emit = emit
        self._received = received
        self._admitted = self._first = received

    def admit(self, run: Run) -> None:
        """Assign the memory, and create the matcher and sampler in the thread that uses them."""
        self.run = run
        self._admitted = time.monotonic()
        self.sampler = self._new_sampler()
        if self._new_matcher is not None:
            self.matcher = self._new_matcher()

    def extend(self, logits: Tensor) -> None:
        """Choose tokens from logits float32 (R, V); row i belongs to the position after the i-th
        draft token.

        Stops at the first token that differs from the draft, because the rows after it are not
        valid. The tokens are the same as without a draft.
        """
        text = ""
        for row, expected in enumerate((*self.draft, -1)):
            token = self._choose(logits[row : row + 1])
            reason = self._take(token)
            if token not in self._stop_ids:
                text += self._detokenizer.feed(token)
            if reason is not None:
                self._finish(text, reason)
                return
            self.computed += expected == token
            if expected != token:
                break
        if text:
            self._emit((text, *self._usage()))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.finished = True
        self._emit(error)

    def released(self) -> None:
        """Report that the request holds no memory any more."""
        self.run = None
        self._emit(None)

    def _choose(self, logits: Tensor) -> int:
        self.sampler.penalise_inplace(logits[0])
        if self.matcher is not None:
            self.matcher.mask_inplace(logits)
        return self.sampler.choose(logits[0])

    def _take(self, token: int) -> FinishReason | None:
        if not self.answer:
            self._first = time.monotonic()
        if token in self._stop_ids:
            if self.matcher is not None:
                self.matcher.accept(token)
            return FinishReason.STOP
        self.answer.append(token)
        if self.matcher is not None:
            self.matcher.accept(token)
            if self.matcher.must_stop():
                return FinishReason.STOP
        if len(self.answer) >= self.max_tokens:
            return FinishReason.LENGTH
        return FinishReason.LOOP if self._guard.trips(self.answer) else None

    def _usage(self) -> tuple[int, int, int]:
        return self.prompt_length, self.image_tokens, len(self.answer)

    def _finish(self, text: str, reason: FinishReason) -> None:
        self.finished = True
        now = time.monotonic()
        self._emit(
            Chunk(
                text + self._detokenizer.finish(),
                reason,
                Usage(*self._usage()),
                Timings(
                    self._admitted - self._received,
                    self._first - self._received,
                    now - self._received,
                ),
            )
        )
