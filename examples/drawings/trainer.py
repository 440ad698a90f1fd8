"""What both training phases share: the model with its probes, optimiser, average and state file."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.drawings.architecture import config, initial_model
from examples.drawings.batches import JointBatch, VisionBatch
from examples.drawings.conversations import Sequences, lay_out
from examples.drawings.network import decoder_states, vision_features, vision_tables
from examples.drawings.optim import MovingAverage, Optimizer
from examples.drawings.probes import PLACE_LAYER, Probes

SAVE_EVERY_S = 180.0


class Trainer:
    """A training run; `step` counts the units (batches, rounds) done in the current phase."""

    def __init__(self, options: argparse.Namespace, token_ids: dict[str, int]) -> None:
        self.options = options
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.file: Path = options.work / "state.pt"
        self.model: Any = initial_model(config(token_ids), options.seed).to(options.device)
        self.tower: Any = self.model.model.visual
        self.decoder: Any = self.model.model.language_model
        self.probes = Probes(self.model.config.text_config.hidden_size).to(options.device)
        self.phase, self.step = "vision", 0
        self.saved_at = time.monotonic()
        if self.file.exists():
            self.phase = torch.load(self.file, mmap=True)["phase"]
        elif options.init:
            self.phase = "joint"
            self._load(options.init / "model.safetensors")

    def _load(self, checkpoint: Path) -> None:
        """Start from exported weights; the heads of the probes are not among them."""
        missing, unexpected = self.model.load_state_dict(load_file(checkpoint), strict=False)
        if missing != ["lm_head.weight"] or unexpected:
            raise ValueError(f"{checkpoint}: missing {missing}, unexpected {unexpected}")

    def begin(self, phase: str, modules: list[tuple[nn.Module, float]], decay: float) -> None:
        """Start a phase, or go on with it where the state file was written in it."""
        self.phase = phase
        self.optimizer = Optimizer(modules, self.options.lr)
        state: dict[str, Any] = torch.load(self.file) if self.file.exists() else {}
        if state:
            self.model.load_state_dict(state["model"])
            self.probes.load_state_dict(state["probes"])
        self.average = MovingAverage(self.model, decay)
        if state.get("phase") == phase and "optimizer" in state:
            self.step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])

    def update(self, lr: float) -> float:
        """One step with the mean gradient of all ranks; returns its norm."""
        if self.world > 1:
            present = [p.grad for p in self.optimizer.parameters if p.grad is not None]
            together = torch.cat([gradient.flatten() for gradient in present])
            dist.all_reduce(together)
            together /= self.world
            for gradient, mean in zip(
                present, together.split([g.numel() for g in present]), strict=True
            ):
                gradient.copy_(mean.view_as(gradient))
        return self.optimizer.step(lr)

    def finish(self, next_phase: str) -> None:
        """End the phase with the averaged weights."""
        self.model.load_state_dict(self.average.weights)
        self.phase, self.step = next_phase, 0
        state = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        if self.rank == 0:
            self._write(state)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }
        self._write(state)

    def save_when_due(self) -> None:
        if self.rank == 0 and time.monotonic() - self.saved_at > SAVE_EVERY_S:
            self.save()

    def _write(self, state: dict[str, Any]) -> None:
        """Write through a second file, so that a kill never leaves half a file."""
        self.options.work.mkdir(parents=True, exist_ok=True)
        shared = {"phase": self.phase, "step": self.step, "probes": self.probes.state_dict()}
        unfinished = self.file.with_suffix(".partial")
        torch.save(state | shared, unfinished)
        os.replace(unfinished, self.file)
        self.saved_at = time.monotonic()

    def see(self, batch: VisionBatch) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Features of the images, probe loss and probe accuracies."""
        device = self.options.device
        tables = [table.to(device) for table in vision_tables(self.tower, batch.grid)]
        features = vision_features(self.tower, batch.pixels.to(device), *tables)
        loss, accuracy = self.probes(features, batch.per_token.to(device), batch.image.to(device))
        return features, loss, accuracy

    def answer(self, batch: JointBatch, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (answer tokens, vocabulary) at the places of `batch.sequences.scored`.

        And the states of the images' tokens in the middle of the decoder, (images, T, D).
        """
        sequences = batch.sequences
        length, count = sequences.ids.shape[1], sequences.prefix.images
        source = batch.source.to(self.options.device)[..., None]
        spread = []
        for feature in features:
            arranged = feature.gather(1, source.expand_as(feature))
            drawings = arranged.view(-1, count, *feature.shape[1:])
            repeated = drawings.repeat_interleave(batch.questions, 0)
            spread.append(lay_out(repeated, sequences.starts, length))
        states = decoder_states(
            self.decoder,
            sequences.ids.to(self.options.device),
            spread,
            *self._decoder_tables(sequences),
        )
        scored = states[-1].flatten(0, 1).index_select(0, sequences.scored.to(self.options.device))
        middle = states[PLACE_LAYER][:: batch.questions]  # the questions come after the images
        tokens = sequences.prefix.grid.tokens
        seen = torch.stack([middle[:, start : start + tokens] for start in sequences.starts], 1)
        return F.linear(scored, self.decoder.embed_tokens.weight), seen.flatten(0, 1)

    def _decoder_tables(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        length = sequences.ids.shape[1]
        is_image = torch.zeros(length, 1)
        for start in sequences.starts:
            is_image[start : start + sequences.prefix.grid.tokens] = 1
        device = self.options.device
        positions = sequences.positions()[:, None].to(device)
        cos, sin = self.decoder.rotary_emb(is_image.to(device), positions)
        return is_image.to(device), cos[0].float(), sin[0].float()
