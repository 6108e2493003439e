"""RigL (Evci et al., 2020): sparse from the start; the smallest weights give way where the gradient is largest."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch

from ..pruning.ranking import mark_smallest
from .base import Method, Traits, skip_update
from .registry import register_method
from .settings import at_least, between


@dataclass
class RigLConfig:
    """`interval`: Delta T in optimizer steps; `fraction`: alpha; `end`: T_end over T. Defaults are the paper's."""

    interval: Annotated[int, at_least(1)] = 100
    fraction: Annotated[float, between(0, 1)] = 0.3
    end: Annotated[float, between(0, 1)] = 0.75


@register_method
class RigL(Method):
    """Every Delta T steps before T_end, in place of an update, each layer drops its smallest weights, a share of
    alpha / 2 * (1 + cos(pi * t / T_end)); as many grow from zero where the gradient is largest.
    """

    name = "rigl"
    description = "RigL (Evci et al., 2020)"
    Config = RigLConfig
    traits = Traits(works_with_fp16=False, allocations=("erk", "uniform", "uniform_plus", "global", "lamp"))

    @classmethod
    def prunings(cls, steps: int, target_sparsity: float | None, config: RigLConfig) -> tuple[tuple, tuple]:
        return (0,), (target_sparsity,)

    @property
    def swaps(self) -> bool:
        return 0 < self.step < self.config.end * self.plan.schedule_steps and self.step % self.config.interval == 0

    def edit_gradients(self) -> None:
        if not self.swaps:
            super().edit_gradients()

    @torch.no_grad()
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        if self.swaps:
            progress = self.step / (self.config.end * self.plan.schedule_steps)
            share = self.config.fraction / 2 * (1 + math.cos(math.pi * progress))
            for name, pruned in self.masks.pruned.items():
                weight, left = self.masks.weights[name], int((~pruned).count_nonzero())
                if weight.grad is not None and (count := int(share * left)):
                    mark_smallest([weight], [fewer := pruned.clone()], weight.numel() - left + count)
                    rest = ~fewer  # with, of the others, all but the largest gradients
                    mark_smallest([weight], [rest], weight.numel() - count, [weight.grad.abs()])
                    self.masks.swap({name: fewer & ~pruned}, {name: ~rest})
            self.masks.mask_optimizer_state(optimizer)
            skip_update(optimizer)
