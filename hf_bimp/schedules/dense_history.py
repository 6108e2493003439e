"""The dense training that a model had: its length and learning-rate schedule, kept beside the weights as JSON."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import get_scheduler

from .retraining import DenseRates


def stepped_factor(step: int, steps: int, warmup_steps: int, milestones: list[float], gamma: float) -> float:
    """The field's stepped schedule: linear warm-up, then times `gamma` at each milestone, a fraction of the phase."""
    if step < warmup_steps:
        return step / warmup_steps
    return gamma ** sum(step >= round(milestone * steps) for milestone in milestones)


@dataclass(frozen=True)
class DenseHistory:
    """Everything that rebuilds the dense schedule eta(0..T-1).

    `steps` is T in optimizer steps, `learning_rate` the optimizer's own rate that the schedule's factors multiply;
    the rest are `TrainingArguments`' fields of the same names, with the warm-up in steps.
    """

    steps: int
    learning_rate: float
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    lr_scheduler_kwargs: dict = field(default_factory=dict)
    lr_milestones: list[float] | None = None
    lr_gamma: float = 0.1

    def rates(self, unit: float = 1.0) -> DenseRates:
        """The schedule in multiples of `unit`; 1.0 gives it as it was."""
        scale, factor = self.learning_rate / unit, self._factor()
        return DenseRates([scale * factor(step) for step in range(self.steps)], self.warmup_steps)

    def _factor(self) -> Callable[[int], float]:
        if self.lr_milestones is not None:
            return partial(
                stepped_factor,
                steps=self.steps,
                warmup_steps=self.warmup_steps,
                milestones=self.lr_milestones,
                gamma=self.lr_gamma,
            )
        # Transformers' own schedules are functions of the step, built around an optimizer: any will do.
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        kwargs = dict(self.lr_scheduler_kwargs)
        try:
            scheduler = get_scheduler(self.lr_scheduler_type, optimizer, self.warmup_steps, self.steps, kwargs)
        except TypeError as error:
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} does not go with lr_scheduler_kwargs={kwargs}: {error}."
                f" Numbers of steps in it are those of the dense phase, {self.steps}."
            ) from error
        return scheduler.lr_lambdas[0]
