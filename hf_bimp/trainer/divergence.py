"""Whether training has diverged: weights are no numbers any more."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..methods import Method

logger = logging.get_logger(__name__)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity. They are read once, and one number comes off the device."""
    found = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel()}
    # A sum is the fastest look: it is finite only if all that it adds up is.
    sums = [tensor.sum(dtype=torch.float32) for tensor in found.values()]
    if not sums or torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all():
        return []
    return [name for name, tensor in found.items() if not tensor.isfinite().all()]


class DivergenceWatch:
    """Looks at the weights of a model, and at a method's own, now and then; remembers when they were last finite.

    Weights that are not finite at the start (never used, never initialised) are left out, with a warning.
    """

    def __init__(self, model: nn.Module, method: Method, step: int, checkpoint: str | None):
        """`step`: optimizer steps done; `checkpoint`: what the run continues, if anything."""
        self.method, self.step, self.checkpoint = method, step, checkpoint
        self.parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        if given := not_finite(self.parameters):
            logger.warning(
                f"The given model holds NaN or infinite weights before any training: {', '.join(given[:5])}. They are "
                "not watched; a forward pass that uses them gives no numbers."
            )
            self.parameters = {name: p for name, p in self.parameters.items() if name not in given}

    def check(self, step: int) -> None:
        """Raises `FloatingPointError` where weights are not finite any more after `step` optimizer steps."""
        if found := not_finite(self.parameters) or not_finite(self._behind()):
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            good = (
                f"The last good checkpoint is {self.checkpoint}" if self.checkpoint else "There is no checkpoint yet"
            )
            raise FloatingPointError(
                f"Training diverged between step {self.step} and step {step}: weights are NaN or infinite "
                f"({', '.join(found[:5])}{more}). {good}. Lower learning_rate, add warm-up or gradient clipping "
                "(max_grad_norm), use bf16 in place of fp16, or check the data."
            )
        self.step = step

    def _behind(self) -> dict[str, Tensor]:
        """What the method trains or keeps beside the model: where the model has a zero, that alone tells."""
        state = self.method.state_dict().items()
        return {name: kept for name, kept in state if isinstance(kept, Tensor) and kept.is_floating_point()}
