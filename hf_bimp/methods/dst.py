"""DST: dynamic sparse training with trainable masked layers (Liu et al., 2020)."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..schedules.plan import Budget
from .registry import register_method
from .reparametrized import Reparametrized

LEAST_KEPT = 0.01  # a layer that keeps less of its weights starts over with thresholds of 0


@dataclass
class DSTConfig:
    """The settings of DST."""

    dst_penalty: float = field(
        default=1e-5,
        metadata={
            "help": "dst: alpha, the penalty that raises the thresholds (the paper's grid: 1e-7, 5e-7, 1e-6, 5e-6, "
            "1e-5, 5e-5, 1e-4, 5e-4)."
        },
    )


class _Step(torch.autograd.Function):
    """step(x), 0 at 0, with the long-tailed estimator of its derivative: 2 - 4|x|, then 0.4, and 0 beyond 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        size = ctx.saved_tensors[0].abs()
        derivative = torch.where(size <= 0.4, 2 - 4 * size, 0.4) * (size <= 1)
        return gradient * derivative


@register_method
class DynamicSparseTraining(Reparametrized):
    """Computes with w * step(|w| - t), one threshold t for each output, initially 0 and without weight decay.

    The penalty alpha * sum(exp(-t)) raises the thresholds.
    """

    name = "dst"
    description = "Dynamic sparse training (DST, Liu et al., 2020)"
    traits = replace(Reparametrized.traits, works_with_fp16=False)
    Config = DSTConfig

    @classmethod
    def check(cls, config: DSTConfig, budget: Budget) -> None:
        if not config.dst_penalty >= 0:
            raise ValueError(f"dst_penalty={config.dst_penalty} must be at least 0.")

    def initial(self, weight: Tensor, output_dim: int) -> Tensor:
        return weight.new_zeros([size if dim == output_dim else 1 for dim, size in enumerate(weight.shape)])

    def used(self, dense: Tensor, extra: Tensor) -> Tensor:
        return dense * _Step.apply(dense.abs() - extra)

    def penalties(self, extra: Tensor) -> list[Tensor]:
        return [self.config.dst_penalty * (-extra).exp().sum()]

    def renew(self) -> None:
        for name, dense in self.behind.items():
            kept = (dense.abs() > self.extras[name]).count_nonzero()
            if kept < LEAST_KEPT * dense.numel():
                self.extras[name].zero_()
