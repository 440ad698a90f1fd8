"""How many tokens an answer may have: what the caller asked for, within the context."""

from __future__ import annotations

from service.errors import ContextTooLong
from service.types import Sampling


def answer_limit(
    prompt_tokens: int, sampling: Sampling, context_length: int, *, image_tokens: int = 0
) -> int:
    """Most tokens of the answer behind a prompt, at least 1.

    image_tokens: how many of the prompt are of the images beside the task; they are to blame where
    the text alone would fit.

    Raises:
        ContextTooLong: the prompt leaves no room, or less than the caller asked for.
    """
    room = context_length - prompt_tokens
    if room < 1:
        text_fits = prompt_tokens - image_tokens < context_length
        raise ContextTooLong(
            "images" if image_tokens and text_fits else "task",
            f"{prompt_tokens} tokens leave no room for an answer in a context of "
            f"{context_length}; shorten the text or send fewer or smaller images",
        )
    limit = sampling.answer_limit(room)
    if limit > room:
        raise ContextTooLong(
            "sampling.max_tokens",
            f"{limit} tokens behind a prompt of {prompt_tokens} exceed the context of "
            f"{context_length}; at most {room} fit, and without max_tokens the answer gets them",
        )
    return limit
