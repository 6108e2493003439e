"""STR: soft threshold reparametrization (Kusupati et al., 2020)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .registry import register_method
from .reparametrized import Reparametrized


@dataclass
class STRConfig:
    """The settings of STR."""

    str_initial_threshold: float = field(
        default=-5.0,
        metadata={
            "help": "str: s_init, where the threshold sigmoid(theta) of each layer starts (the paper's grid: -100, "
            "-50, -40, -30, -20, -10, -5, -2, -1, 0, 5, 50, 100). With weight_decay it decides the sparsity."
        },
    )


@register_method
class SoftThreshold(Reparametrized):
    """Computes with sign(w) * relu(|w| - sigmoid(theta)), one theta a layer with the weights' weight decay.

    The decay is what moves theta towards 0 and so the threshold upwards. As a soft threshold it shrinks what it keeps.
    """

    name = "str"
    description = "Soft threshold reparametrization (STR, Kusupati et al., 2020)"
    decays_extras = True
    Config = STRConfig

    def initial(self, weight: Tensor, output_dim: int) -> Tensor:
        return weight.new_full((), self.config.str_initial_threshold)

    def used(self, dense: Tensor, extra: Tensor) -> Tensor:
        return dense.sign() * torch.relu(dense.abs() - extra.sigmoid())
