"""Builds forward passes from sequences.

Letters: R rows; M image rows; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from service.engines.reference.cache import KeyValueCache
from service.engines.reference.decoder import Decoder, DeepStack, Pass
from service.engines.reference.linear import padded
from service.engines.reference.rotary import Rotary
from service.engines.reference.sequence import Sequence


class Runner:
    """Runs parts of prompts and decode steps on one decoder."""

    def __init__(self, decoder: Decoder, cache: KeyValueCache, rotary: Rotary, piece: int) -> None:
        """piece: number of prompt rows that are computed in one pass."""
        self._decoder, self._cache, self._rotary = decoder, cache, rotary
        self._piece = piece

    def prefill(self, sequence: Sequence) -> Tensor | None:
        """Compute the next part of a prompt. After the last part, returns logits float32 (1, V) on
        the CPU.

        Parts always begin at multiples of ``piece``.
        """
        run = sequence.run
        if run is None:
            raise RuntimeError("the sequence has no memory")
        prompt, begin = sequence.prompt, sequence.computed
        end = min(begin + self._piece, sequence.prompt_length)
        device = self._decoder.device
        rows = end - begin
        size = padded(rows)
        ids = np.zeros(size, np.int64)
        ids[:rows] = prompt.token_ids[begin:end]
        positions = np.zeros((3, size), np.int64)
        positions[:, :rows] = prompt.position_ids[:, begin:end]
        places = np.full(size, self._cache.spare, np.int64)
        places[:rows] = np.arange(run.begin + begin, run.begin + end)
        hidden = self._decoder.embed(torch.from_numpy(ids).to(device))
        step = Pass(
            hidden,
            self._rotary.for_prompt(torch.from_numpy(positions)),
            torch.from_numpy(places).to(device),
            [(run.begin, run.begin + end)],
            prompt=rows,
            deepstack=_place_inplace(hidden, sequence, begin, end),
        )
        hidden = self._decoder.forward(step, self._cache)
        sequence.computed = end
        if end < sequence.prompt_length:
            return None
        return self._decoder.logits(hidden).cpu()

    def decode(self, sequences: Many[Sequence]) -> list[Tensor]:
        """Compute the last token and the draft of each sequence.

        Returns logits float32 (1 + draft, V) on the CPU for each sequence.
        """
        rows: list[tuple[int, int, int]] = []  # token, position, row of the pool
        spans: list[tuple[int, int]] = []
        counts: list[int] = []
        for sequence in sequences:
            run = sequence.run
            if run is None:
                raise RuntimeError("the sequence has no memory")
            delta, index = sequence.prompt.position_delta, sequence.computed
            for offset, token in enumerate((sequence.answer[-1], *sequence.draft)):
                place = run.begin + index + offset
                rows.append((token, index + offset + delta, place))
                spans.append((run.begin, place + 1))
            counts.append(1 + len(sequence.draft))
        used = len(rows)
        rows += [(0, 0, self._cache.spare)] * (padded(used) - used)
        ids, positions, places = torch.tensor(rows, device=self._decoder.device).unbind(1)
        step = Pass(
            self._decoder.embed(ids), self._rotary.for_text(positions), places, spans, prompt=0
        )
        logits = self._decoder.logits(self._decoder.forward(step, self._cache))[:used].cpu()
        for sequence in sequences:
            sequence.computed += 1
        return list(torch.split(logits, counts))


def _place_inplace(hidden: Tensor, sequence: Sequence, begin: int, end: int) -> DeepStack | None:
    """Write the image embeddings into hidden (R, D); returns the features that DeepStack adds
    later."""
    if not sequence.features:
        return None
    first, rows, taken = 0, [], []
    for left, right in sequence.prompt.spans:
        low, high = max(left, begin), min(right, end)
        if low < high:
            rows.append(np.arange(low - begin, high - begin))
            taken.append(np.arange(first + low - left, first + high - left))
        first += right - left
    if not rows:
        return None
    here = torch.from_numpy(np.concatenate(rows)).to(hidden.device)
    chosen = torch.from_numpy(np.concatenate(taken)).to(hidden.device)
    embeddings, *deepstack = (stream[chosen].to(hidden.dtype) for stream in sequence.features)
    hidden[here] = embeddings
    return DeepStack(here, tuple(deepstack))
