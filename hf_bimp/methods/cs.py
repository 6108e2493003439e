"""CS: continuous sparsification (Savarese et al., 2020)."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..schedules.plan import Budget
from .registry import register_method
from .reparametrized import Reparametrized


@dataclass
class CSConfig:
    """The settings of CS."""

    cs_initial_mask: float = field(
        default=0.0,
        metadata={
            "help": "cs: s_0, what the mask parameters start from; smaller ones end sparser (the paper's grid: -0.3, "
            "-0.25, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.25, 0.3)."
        },
    )
    cs_penalty: float = field(
        default=1e-8, metadata={"help": "cs: lambda, the L1 penalty on the gates (the paper's grid: 1e-8, 1e-7)."}
    )
    cs_temperature: float = field(
        default=300.0, metadata={"help": "cs: beta_final, the inverse temperature in the end (the paper: 300)."}
    )


@register_method
class ContinuousSparsification(Reparametrized):
    """Computes with w * sigmoid(beta_t * m) / sigmoid(s_0); beta_t = beta_final^(t/T) makes the gates ever harder.

    m starts at s_0 and has no weight decay; the penalty is lambda * sum(sigmoid(beta_t * m)). In the end a weight
    keeps its scaled value w / sigmoid(s_0) where m > 0, and is 0 elsewhere.
    """

    name = "cs"
    description = "Continuous sparsification (CS, Savarese et al., 2020)"
    traits = replace(Reparametrized.traits, works_with_fp16=False)
    Config = CSConfig

    @classmethod
    def check(cls, config: CSConfig, budget: Budget) -> None:
        if not (config.cs_penalty >= 0 and config.cs_temperature >= 1):
            raise ValueError(
                f"cs_penalty={config.cs_penalty} must be at least 0 and cs_temperature={config.cs_temperature} at "
                "least 1."
            )

    @property
    def beta(self) -> float:
        return self.config.cs_temperature ** (self.step / self.plan.schedule_steps)

    @property
    def scale(self) -> Tensor:
        return torch.tensor(self.config.cs_initial_mask).sigmoid()

    def initial(self, weight: Tensor, output_dim: int) -> Tensor:
        return torch.full_like(weight, self.config.cs_initial_mask)

    def used(self, dense: Tensor, extra: Tensor) -> Tensor:
        return dense * (self.beta * extra).sigmoid() / self.scale

    def penalties(self, extra: Tensor) -> list[Tensor]:
        return [self.config.cs_penalty * (self.beta * extra).sigmoid().sum()]

    def final(self, dense: Tensor, extra: Tensor) -> Tensor:
        return dense * (extra > 0) / self.scale
