"""Train the drawings model: `python -m examples.drawings.train --work DIR`.

Two phases, both resumable. "vision" trains the vision tower alone on linear probes; "joint" trains
the whole model on answers to questions about drawings, with the probes as an auxiliary loss. Most
drawings of the joint phase are arranged anew behind the vision tower, see `arrangements`.
`--init FOLDER` goes on from the weights of a checkpoint, with a joint phase that starts hard.

With several CPU cores one process for each is faster than one process with threads:
`torchrun --nproc-per-node 2 -m examples.drawings.train --threads 1 --work DIR`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from examples.drawings import network, tokenizer
from examples.drawings.batches import SHAPES, JointBatch, joint_round, prefetch, vision_batch
from examples.drawings.export import FOLDER, export, token_ids
from examples.drawings.optim import learning_rate
from examples.drawings.scenes import HELD_OUT_SEED
from examples.drawings.trainer import Trainer

LOG_EVERY = 25


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(".cache/drawings"), help="state folder")
    parser.add_argument("--tokenizer", type=Path, default=FOLDER, help="folder with tokenizer")
    parser.add_argument("--out", type=Path, help="write the trained model to this folder")
    parser.add_argument("--init", type=Path, help="joint phase only, from this checkpoint folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch decides")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate of vision; joint: 3/4 of it"
    )
    parser.add_argument("--vision-steps", type=int, default=1400)
    parser.add_argument("--vision-batch", type=int, default=32, help="of each process")
    parser.add_argument("--vision-rate", type=float, default=0.3, help="its share of lr, joint")
    parser.add_argument("--rounds", type=int, default=700, help="joint rounds of 4 batches")
    parser.add_argument("--probe-weight", type=float, default=0.1, help="of their loss, joint")
    parser.add_argument("--evaluate-every", type=int, default=150, help="rounds")
    return parser.parse_args()


def train_vision(trainer: Trainer) -> None:
    """Vision tower and mergers on the probes."""
    options = trainer.options
    trainer.begin("vision", [(trainer.tower, 1.0), (trainer.probes, 1.0)], decay=0.99)
    make = partial(vision_batch, size=options.vision_batch, seed=options.seed, rank=trainer.rank)
    started, first = time.monotonic(), trainer.step
    for batch in prefetch(make, trainer.step, options.vision_steps):
        with torch.autocast(options.device, torch.bfloat16):
            _, loss, accuracy = trainer.see(batch)
        loss.backward()
        lr = learning_rate(options.lr, trainer.step, options.vision_steps, warm=100)
        trainer.update(lr)
        trainer.average.update(trainer.model)
        trainer.step += 1
        if trainer.step % LOG_EVERY == 0:
            images = (trainer.step - first) * options.vision_batch * trainer.world
            speed = images / (time.monotonic() - started)
            log(f"vision {trainer.step}/{options.vision_steps} loss {loss.item():.4f}"
                f" {shown(accuracy)} lr {lr:.2e} {speed:.0f} images/s")  # fmt: skip
        trainer.save_when_due()
    trainer.finish("joint")


def train_joint(trainer: Trainer) -> None:
    """The whole model on questions and answers."""
    options = trainer.options
    trainer.begin(
        "joint",
        [(trainer.decoder, 1.0), (trainer.tower, options.vision_rate), (trainer.probes, 1.0)],
        decay=0.98,
    )
    words = tokenizer.load(options.tokenizer)
    make = partial(
        joint_round,
        rounds=options.rounds,
        seed=options.seed,
        tokenizer=words,
        rank=trainer.rank,
        easy_first=not options.init,
    )
    started, first = time.monotonic(), trainer.step
    held_out = [
        batch
        for kind in SHAPES
        for number in (1, 2)
        for batch in joint_round(number, 1, 1, words, kind, HELD_OUT_SEED, share=0.0)
    ]
    for batches in prefetch(make, trainer.step, options.rounds):
        lr = learning_rate(0.75 * options.lr, trainer.step, options.rounds, warm=30)
        for batch in batches:
            values = joint_step(trainer, batch, lr)
        trainer.average.update(trainer.model)
        trainer.step += 1
        if trainer.step % 5 == 0:
            pace = (time.monotonic() - started) / (trainer.step - first)
            log(f"joint {trainer.step}/{options.rounds} {batches[0].kind} {shown(values)}"
                f" lr {lr:.2e} {pace:.2f} s/round")  # fmt: skip
        if trainer.rank == 0 and trainer.step % options.evaluate_every == 0:
            log(f"held out {trainer.step}: {shown(exact_answers(trainer, held_out))}")
        trainer.save_when_due()
    trainer.finish("done")


def joint_step(trainer: Trainer, batch: JointBatch, lr: float) -> dict[str, Tensor | float]:
    """One update; returns what to log."""
    options = trainer.options
    with torch.autocast(options.device, torch.bfloat16):
        features, probe_loss, accuracy = trainer.see(batch.images)
        logits, seen = trainer.answer(batch, features)
        place_loss, places = trainer.probes.places(seen, batch.places.to(options.device))
    logits = logits.float()
    wanted = batch.sequences.wanted.to(options.device)
    loss = F.cross_entropy(logits, wanted)
    (loss + options.probe_weight * (probe_loss + place_loss)).backward()
    norm = trainer.update(lr)
    right = (logits.argmax(-1) == wanted).float().mean()
    return {
        "loss": loss.detach(),
        "tokens": right,
        "probes": probe_loss.detach(),
        "shape": accuracy["shape"],
        **places,
        "norm": norm,
    }


@torch.no_grad()
def exact_answers(trainer: Trainer, batches: list[JointBatch]) -> dict[str, Tensor]:
    """Share of held-out answers whose every token is the most likely one, by kind.

    Uses the averaged weights. A greedy decode gives exactly these answers.
    """
    current = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(trainer.average.weights)
    results: dict[str, list[Tensor]] = {}
    for batch in batches:
        with torch.autocast(trainer.options.device, torch.bfloat16):
            logits, _ = trainer.answer(batch, trainer.see(batch.images)[0])
        wrong = (logits.argmax(-1).cpu() != batch.sequences.wanted).float()
        rows, length = batch.sequences.ids.shape
        errors = torch.zeros(rows).index_add(0, batch.sequences.scored // length, wrong)
        results.setdefault(batch.kind, []).append((errors == 0).float())
    trainer.model.load_state_dict(current)
    return {kind: torch.cat(parts).mean() for kind, parts in results.items()}


def shown(values: Mapping[str, Tensor | float]) -> str:
    return " ".join(f"{name} {float(value):.3f}" for name, value in values.items())


def log(line: str) -> None:
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main() -> None:
    options = arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.threads:
        torch.set_num_threads(options.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    if options.compile:
        network.compile_blocks()
    trainer = Trainer(options, token_ids(options.tokenizer))
    if trainer.phase == "vision":
        train_vision(trainer)
    if trainer.phase == "joint":
        train_joint(trainer)
    if options.out and trainer.rank == 0:
        trainer.model.load_state_dict(torch.load(trainer.file)["average"]["weights"])
        export(trainer.model, options.out)


if __name__ == "__main__":
    main()
