"""DPF: dynamic pruning with feedback (Lin et al., 2020)."""

from dataclasses import dataclass, field
from typing import Any, cast

from ..schedules.plan import Budget
from .dense_behind import DenseBehind
from .gradual import Gradual, GradualConfig
from .registry import register_method


@dataclass
class DPFConfig(GradualConfig):
    """The settings of DPF."""

    dpf_interval: int = field(
        default=16, metadata={"help": "dpf: optimizer steps after which the masks are renewed (the original: 16)."}
    )


@register_method
class DynamicPruningWithFeedback(DenseBehind, Gradual):
    """Gradual pruning whose gradient, taken at the masked weights, is applied unmasked to the dense ones.

    That is its error feedback: differentiating through w * mask would leave masked weights where they are. The masks
    are taken anew from the dense weights every `dpf_interval` steps, at the sparsity that GMP's schedule has reached.
    """

    name = "dpf"
    description = "Dynamic pruning with feedback (DPF, Lin et al., 2020)"
    Config = DPFConfig

    @classmethod
    def check(cls, config: Any, budget: Budget) -> None:
        super().check(config, budget)
        if config.dpf_interval < 1:
            raise ValueError(f"dpf_interval={config.dpf_interval} must be at least 1 optimizer step.")

    @classmethod
    def prunings(cls, steps: int, target_sparsity: float | None, config: GradualConfig) -> tuple[tuple, tuple]:
        times, sparsities = super().prunings(steps, target_sparsity, config)
        return (*times, steps), (*sparsities, target_sparsity)  # the last one is hard

    def renew(self) -> None:
        if self.cycle and self.step % self.config.dpf_interval == 0:
            self.masks.renew(cast(float, self.plan.sparsities[self.cycle - 1]), self.behind)
