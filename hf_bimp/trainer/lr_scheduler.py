"""The learning-rate scheduler that `Trainer` sees: it follows the optimizer step that it is told."""

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class PlannedScheduler(LRScheduler):
    """Sets every group's learning rate to its initial one times `factor(step)`.

    `step()` deliberately does nothing: the trainer calls it after every optimizer step but not after one that the fp16
    scaler skipped, whereas the plan counts both. `set_step` says which optimizer step comes next.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]):
        self.factor = factor
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        super().__init__(optimizer)

    def step(self, epoch: int | None = None) -> None:
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def set_step(self, step: int) -> None:
        """Sets the learning rates for optimizer step `step`."""
        self.last_epoch, factor = step, self.factor(step)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict:
        return {"last_epoch": self.last_epoch, "_last_lr": self._last_lr}
