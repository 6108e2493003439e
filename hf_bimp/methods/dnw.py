"""DNW: discovering neural wirings (Wortsman et al., 2019)."""

from .base import NoConfig
from .dense_behind import DenseBehind
from .registry import register_method


@register_method
class DiscoveringNeuralWirings(DenseBehind):
    """Every step computes with the top (1 - goal) of the dense weights alone, chosen anew; all receive the gradient.

    That is the straight-through estimator: the gradient with respect to a weight that is not used is the one with
    respect to the zero in its place. Sparse from the first step on, so its last, hard pruning changes nothing.
    """

    name = "dnw"
    description = "Discovering neural wirings (DNW, Wortsman et al., 2019)"

    @classmethod
    def prunings(cls, steps: int, target_sparsity: float | None, config: NoConfig) -> tuple[tuple, tuple]:
        return (0, steps), (target_sparsity, target_sparsity)

    def renew(self) -> None:
        self.masks.renew(self.goal, self.behind)
