"""From a request to its packed prompt: turns, pictures, and whether there is room for the answer."""

from __future__ import annotations

from lmdeploy_ext.packing import PackedRequest
from service.engines.shared.chat import Chat
from service.engines.shared.context import answer_limit
from service.engines.shared.pictures import ImagePreprocessor
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
            answer_limit(sum(counts), request.sampling, self._context_length)
            images = [
                self._preprocess(index, image) for index, image in enumerate(request.all_images)
            ]
        packed = self._chat.pack(
            request.conversation, images, request.tools, constrained=request.grammar is not None
        )
        answer_limit(len(packed.token_ids), request.sampling, self._context_length)
        return packed
