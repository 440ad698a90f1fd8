"""From a request to its packed prompt: turns, pictures, and whether there is room for the answer."""

from __future__ import annotations

from lmdeploy_ext.packing import PackedRequest
from service.engines.shared.chat import Chat
from service.engines.shared.pictures import ImagePreprocessor
from service.errors import ContextTooLong
from service.types import GenerateRequest


class Prompts:
    """Packs requests for one checkpoint. Thread-safe.

    preprocess: None where the engine runs without vision. context_length: tokens of prompt and answer.
    """

    def __init__(
        self, chat: Chat, preprocess: ImagePreprocessor | None, context_length: int
    ) -> None:
        self._chat = chat
        self._preprocess = preprocess
        self._context_length = context_length

    def pack(self, request: GenerateRequest) -> PackedRequest:
        """Tokenise, pre-process and count.

        Raises:
            ImageError: a picture cannot be used.
            ContextTooLong: prompt and answer do not fit into the context.
        """
        images = []
        if self._preprocess is not None:
            # Counted first: a bound of the request may enlarge a picture beyond any memory.
            counts = [self._preprocess.num_tokens(*one) for one in enumerate(request.all_images)]
            self._check_room(sum(counts), request.sampling.max_tokens)
            images = [
                self._preprocess(index, image) for index, image in enumerate(request.all_images)
            ]
        packed = self._chat.pack(
            request.conversation, images, request.tools, constrained=request.grammar is not None
        )
        self._check_room(len(packed.token_ids), request.sampling.max_tokens)
        return packed

    def _check_room(self, prompt: int, answer: int) -> None:
        """Raise ContextTooLong when so many tokens do not fit."""
        if prompt >= self._context_length:
            raise ContextTooLong(
                "task",
                f"{prompt} tokens leave no room for an answer in a context of "
                f"{self._context_length}; shorten the text or send fewer or smaller pictures",
            )
        if prompt + answer > self._context_length:
            raise ContextTooLong(
                "sampling.max_tokens",
                f"{answer} tokens behind a prompt of {prompt} exceed the context of "
                f"{self._context_length}; at most {self._context_length - prompt} fit",
            )
