"""Optimiser, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW with gradient clipping; weight decay on matrices only."""

    def __init__(self, modules: list[nn.Module], lr: float) -> None:
        self.parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": 0.02},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(norm)


def learning_rate(peak: float, step: int, steps: int, hold: float = 0.0) -> float:
    """Linear warm-up over 100 steps, the peak up to the share `hold` of the run, then cosine."""
    warm = min(1.0, (step + 1) / 100)
    fall = max(0.0, (step / steps - hold) / (1 - hold))
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall))))


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
