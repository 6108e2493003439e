"""LC: learning-compression (Carreira-Perpinan and Idelbayev, 2018), as selective weight decay."""

import torch
from transformers import Adafactor

from .base import Method, Traits
from .registry import register_method


@register_method
class LearningCompression(Method):
    """Weight decay acts only on the weights outside the top (1 - goal) by magnitude, chosen anew at every step.

    So the smallest are driven to zero while the others are not held back, and one hard pruning at the end removes
    little. The optimizer decays all of them; for the top ones that is undone beforehand, to rounding error: where the
    decay is part of the gradient (SGD, Adam) by subtracting it, where it shrinks the weight (AdamW) by growing it.
    """

    name = "lc"
    description = "Learning-compression (LC, Carreira-Perpinan and Idelbayev, 2018)"
    traits = Traits(needs_weight_decay=True, works_with_fp16=False)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        super().attach(optimizer)
        if isinstance(optimizer, Adafactor) and any(group["scale_parameter"] for group in optimizer.param_groups):
            raise ValueError(
                f"{self.description} cannot undo the weight decay of an Adafactor that scales it by the size of the "
                "weights. Pass scale_parameter=False."
            )

    @torch.no_grad()
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_complete:
            return
        decaying = self.masks.marks(self.goal)
        names = {id(weight): name for name, weight in self.masks.weights.items()}
        for group in optimizer.param_groups:
            decay = group["weight_decay"]
            is_decoupled = isinstance(optimizer, Adafactor) or group.get("decoupled_weight_decay", False)
            for weight in group["params"]:
                if id(weight) not in names or weight.grad is None or not decay:
                    continue
                kept = ~decaying[names[id(weight)]]
                if is_decoupled:
                    weight.copy_(torch.where(kept, weight / (1 - group["lr"] * decay), weight))
                else:
                    weight.grad.addcmul_(weight, kept.to(weight.dtype), value=-decay)
