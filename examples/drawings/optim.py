"""Optimiser, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = re.compile(r"^(blocks|layers|merger|deepstack_merger_list)\.")
"""Parameters inside the repeated layers; embeddings and heads are better off with AdamW."""


class Optimizer:
    """Muon for the matrices of the repeated layers, AdamW for everything else; clipped gradients.

    Muon orthogonalises each update; with its scale matched to AdamW's, both share one rate.

    modules: each with its factor on the learning rate.
    """

    def __init__(self, modules: list[tuple[nn.Module, float]], lr: float) -> None:
        self.parameters: list[nn.Parameter] = []
        groups: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
        for module, factor in modules:
            hidden, others, vectors = [], [], []
            for name, parameter in module.named_parameters():
                self.parameters.append(parameter)
                if parameter.ndim < 2:
                    vectors.append(parameter)
                elif parameter.ndim == 2 and HIDDEN.search(name):
                    hidden.append(parameter)
                else:
                    others.append(parameter)
            chosen = (("muon", hidden, 0.05), ("adamw", others, 0.02), ("adamw", vectors, 0.0))
            for kind, parameters, decay in chosen:
                if parameters:
                    group = {"params": parameters, "weight_decay": decay, "factor": factor}
                    groups[kind].append(group)
        self.muon = torch.optim.Muon(groups["muon"], lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(groups["adamw"], lr=lr, betas=(0.9, 0.95), fused=True)

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def learning_rate(peak: float, step: int, steps: int, warm: int, hold: float = 0.3) -> float:
    """Linear over `warm` steps, the peak up to the share `hold` of the run, then a cosine."""
    rise = min(1.0, (step + 1) / warm)
    fall = max(0.0, (step / steps - hold) / (1 - hold))
    return peak * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


class MovingAverage:
    """Exponential moving average of a model's weights, with a short memory early on."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        averaged: dict[str, Tensor] = state["weights"]
        self.weights = {k: v.clone() for k, v in averaged.items()}
