"""Movement pruning (Sanh et al., 2020): gradual pruning by how weights move, not by how large they are."""

from dataclasses import dataclass
from typing import Annotated, cast

from ..schedules.plan import gradual_prunings
from .base import Traits
from .gradual import SoftMasks
from .registry import register_method
from .settings import at_least


@dataclass
class MovementConfig:
    """`num_prunings`: K, along GMP's cubic schedule."""

    num_prunings: Annotated[int, at_least(1)] = 20


@register_method
class MovementPruning(SoftMasks):
    """Keeps the weights with the largest -sum of w * dL/dw over all steps so far, those that move away from zero.

    The paper's hard variant (top v): scores of masked weights go on, from the gradient at the zero in their place and
    the value that they had, so that they can come back. Without its regularization and its score learning rate.
    """

    name = "movement"
    description = "Movement pruning (Sanh et al., 2020)"
    Config = MovementConfig
    traits = Traits(works_with_fp16=False, allocations=("global", "uniform"), criteria=("movement",))

    @classmethod
    def prunings(
        cls, steps: int, target_sparsity: float | None, config: MovementConfig
    ) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
        return gradual_prunings(steps, cast(float, target_sparsity), config.num_prunings)
