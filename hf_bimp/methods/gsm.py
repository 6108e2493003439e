"""GSM: global sparse momentum (Ding et al., 2019)."""

import torch

from ..pruning.ranking import mark_smallest
from ..pruning.zeroing import zero_masked
from .base import Method, Traits
from .registry import register_method


@register_method
class GlobalSparseMomentum(Method):
    """Only the top (1 - goal) of the weights by |w * dL/dw| receive the gradient of the loss, chosen at every step.

    The others only decay, by weight decay and momentum, so that one hard pruning at the end removes little. Its knob
    is the optimizer's own momentum (the paper's grid: 0.9, 0.95, 0.99; `optim_args: momentum=0.95`), or `adam_beta1`.
    """

    name = "gsm"
    description = "Global sparse momentum (GSM, Ding et al., 2019)"
    traits = Traits(needs_weight_decay=True, works_with_fp16=False, allocations=("global",))

    @torch.no_grad()
    def edit_gradients(self) -> None:
        if self.is_complete:
            return super().edit_gradients()
        found = [(weight, weight.grad) for weight in self.masks.weights.values() if weight.grad is not None]
        weights = [weight for weight, _ in found]
        passive = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
        count = sum(weight.numel() for weight in weights)
        mark_smallest([weight * gradient for weight, gradient in found], passive, round(self.goal * count))
        for (_, gradient), mask in zip(found, passive, strict=True):
            zero_masked(gradient, mask)
