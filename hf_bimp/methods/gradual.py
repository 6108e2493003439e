"""The family that prunes at K steps along a cubic schedule, and the soft masks that let weights come back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..schedules.plan import Budget, gradual_prunings
from .base import Method, Run


@dataclass
class GradualConfig:
    """When methods that prune gradually do so."""

    num_prunings: int = field(
        default=20, metadata={"help": "gmp, dpf: K, equally distributed prunings (the paper's grid: 20, 100)."}
    )
    prune_interval: int | None = field(
        default=None,
        metadata={"help": "gmp, dpf: prune every so many optimizer steps instead (the paper: every 5 or 10 epochs)."},
    )


class Gradual(Method):
    """Prunes at t_k = round(k * T / (K + 1)) to goal * (1 - (1 - t_k / t_K)^3)."""

    Config = GradualConfig

    @classmethod
    def check(cls, config: Any, budget: Budget) -> None:
        if config.num_prunings < 1 or (config.prune_interval is not None and config.prune_interval < 1):
            raise ValueError(
                f"num_prunings={config.num_prunings} and prune_interval={config.prune_interval} must be at least 1."
            )
        if config.prune_interval is not None and config.num_prunings != GradualConfig.num_prunings:
            raise ValueError(
                f"num_prunings={config.num_prunings} and prune_interval={config.prune_interval} each say how often "
                "to prune: give one of them."
            )

    @classmethod
    def prunings(
        cls, steps: int, target_sparsity: float | None, config: GradualConfig
    ) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
        return gradual_prunings(steps, cast(float, target_sparsity), config.num_prunings, config.prune_interval)


class SoftMasks(Method):
    """Masked weights are zero in the model, without gradient and optimizer state, while their values wait in `frozen`.

    At the next pruning they compete, and can come back. The last pruning is hard; all are where `traits.is_hard`.
    """

    def __init__(self, run: Run, config: Any = None):
        super().__init__(run, config)
        self.frozen: dict[str, Tensor] = {}  # the values of masked weights, 0 elsewhere

    @torch.no_grad()
    def competing(self) -> Mapping[str, Tensor]:
        weights = self.masks.weights  # the masked ones are zero
        return {name: weights[name] + values for name, values in self.frozen.items()} if self.frozen else weights

    @torch.no_grad()
    def sparsify(self, sparsity: float | None, optimizer: torch.optim.Optimizer) -> tuple[float | None, float]:
        if self.traits.is_hard:
            return super().sparsify(sparsity, optimizer)
        for name, values in self.frozen.items():
            self.masks.weights[name].add_(values)
        self.masks.renew(cast(float, sparsity))
        selection = self.masks.removal()
        is_last = self.cycle + 1 == self.plan.num_cycles
        masked = {} if is_last else self.masks.weights
        self.frozen = {name: weight * self.masks.pruned[name] for name, weight in masked.items()}
        self.masks.mask_weights()
        self.masks.mask_optimizer_state(optimizer)
        return selection.threshold, selection.removed_norm

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.frozen

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.frozen = {name: state[name] for name in self.masks.weights if name in state}
