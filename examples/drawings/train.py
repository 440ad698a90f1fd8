"""Train the drawings model: `python -m examples.drawings.train --work DIR`.

Two phases, both resumable. "vision" trains the vision tower alone on linear probes; "joint" trains
the whole model on answers to questions about drawings and keeps the probes as an auxiliary loss.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import network
from .architecture import config, initial_model
from .batches import prefetch, vision_batch
from .optim import MovingAverage, Optimizer, learning_rate
from .probes import Probes

LOG_EVERY = 25
SAVE_EVERY_S = 180.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/drawings"), help="state folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch decides")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--vision-steps", type=int, default=2000)
    parser.add_argument("--vision-batch", type=int, default=64)
    return parser.parse_args()


class Trainer:
    """The model with its probes, optimiser and moving average, and their file on disk."""

    def __init__(self, options: argparse.Namespace, token_ids: dict[str, int]) -> None:
        self.options = options
        self.file = options.work / "state.pt"
        self.model = initial_model(config(token_ids), options.seed).to(options.device)
        self.probes = Probes(self.model.config.text_config.hidden_size).to(options.device)
        self.phase, self.step = "vision", 0
        self.saved_at = time.monotonic()

    def begin(self, phase: str, modules: list[torch.nn.Module], decay: float) -> None:
        """Set the optimiser up for a phase, from the saved state where there is one."""
        self.optimizer = Optimizer(modules, self.options.lr)
        self.average = MovingAverage(self.model, decay)
        state: dict[str, Any] = torch.load(self.file) if self.file.exists() else {}
        if not state:
            return
        self.model.load_state_dict(state["model"])
        self.probes.load_state_dict(state["probes"])
        if state["phase"] == phase:
            self.step = state["step"]
            self.optimizer.adamw.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
        else:
            self.average = MovingAverage(self.model, decay)
        self.phase = phase

    def save(self) -> None:
        """Write the state through a second file, so that a kill never leaves half a file."""
        self.options.work.mkdir(parents=True, exist_ok=True)
        state = {
            "phase": self.phase,
            "step": self.step,
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict(),
            "optimizer": self.optimizer.adamw.state_dict(),
            "average": self.average.state_dict(),
        }
        partial_file = self.file.with_suffix(".partial")
        torch.save(state, partial_file)
        os.replace(partial_file, self.file)
        self.saved_at = time.monotonic()

    def save_when_due(self) -> None:
        if time.monotonic() - self.saved_at > SAVE_EVERY_S:
            self.save()


def train_vision(trainer: Trainer) -> None:
    """Vision tower and mergers on the probes."""
    options, tower = trainer.options, trainer.model.model.visual
    trainer.begin("vision", [tower, trainer.probes], decay=0.99)
    make = partial(vision_batch, size=options.vision_batch, seed=options.seed)
    started, first = time.monotonic(), trainer.step
    for batch in prefetch(make, trainer.step, options.vision_steps):
        tables = network.vision_tables(tower, batch.grid)
        with torch.autocast(options.device, torch.bfloat16):
            features = network.vision_features(tower, batch.pixels.to(options.device), *tables)
            loss, accuracy = trainer.probes(features, batch.per_token, batch.picture)
        loss.backward()
        lr = learning_rate(options.lr, trainer.step, options.vision_steps, hold=0.3)
        norm = trainer.optimizer.step(lr)
        trainer.average.update(trainer.model)
        trainer.step += 1
        if trainer.step % LOG_EVERY == 0:
            speed = (trainer.step - first) * options.vision_batch / (time.monotonic() - started)
            shown = " ".join(f"{name} {float(value):.3f}" for name, value in accuracy.items())
            print(
                f"vision {trainer.step}/{options.vision_steps} loss {loss.item():.4f} {shown}"
                f" norm {norm:.2f} lr {lr:.2e} {speed:.0f} pictures/s",
                flush=True,
            )
        trainer.save_when_due()
    trainer.model.load_state_dict(trainer.average.weights)
    trainer.phase, trainer.step = "joint", 0
    trainer.save()


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.compile:
        network.compile_blocks()
    token_ids = dict.fromkeys(
        ["<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
         "<|vision_end|>"], 0)
    trainer = Trainer(options, token_ids)
    train_vision(trainer)


if __name__ == "__main__":
    main()
