"""Iterative magnitude pruning with a learning rate restarted at each pruning: IMP and, in one budget, BIMP."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..masks import Masks
from ..plan import Phase, Plan
from ..schedules import (
    NEED_DENSE_HISTORY,
    RETRAIN_SCHEDULES,
    TUNED,
    WITHOUT_WARMUP,
    DenseRates,
    default_warmup_ratio,
    discount,
    retrain_peak,
    retrain_rate,
)


@dataclass(frozen=True)
class Pruning:
    """What pruning `cycle` (1..J) before optimizer step `step` did.

    `sparsity` is the share of pruned weights that it reached, `threshold` the largest magnitude that it removed,
    `distance` ||W - W_p||_2 over the prunable weights, `d1` its impact, `d2` the relative length of the retraining
    (None without a dense history), and `retrain_peak` the largest learning rate of the cycle, in the unit of the
    caller's rates. `collapsed_layers` counts the weights that have nothing left.
    """

    cycle: int
    step: int
    sparsity: float
    threshold: float
    distance: float
    d1: float
    d2: float | None
    retrain_peak: float
    collapsed_layers: int


class LayerCollapseError(RuntimeError):
    """A pruning left a layer without any weight, and `on_collapse` is "raise"."""


class IterativeMagnitudePruning:
    """Prunes where the plan says so, as the masks' rule does, and gives the learning rate of every step.

    Args:
        plan: when to prune and how far.
        masks: over the weights to prune.
        eta_1: the largest dense learning rate.
        dense: the dense schedule; None where it is not known, which rules out the schedules that need it.
        retrain_schedule: one of `RETRAIN_SCHEDULES` (default ALLR, section 2.1 of the paper).
        tuned_rate: peak of the four tuned schedules.
        warmup_ratio: share of a cycle to warm up; None takes the paper's (10 %, or 0 for tuned schedules).
        train_accuracy: gives the accuracy on the training set, for `acc_allr` alone.

    Call `prune` before a step where `is_due`, set the optimizer's learning rate to `rate`, and call
    `edit_gradients` between backward and clipping.
    """

    def __init__(
        self,
        plan: Plan,
        masks: Masks,
        eta_1: float,
        dense: DenseRates | None = None,
        retrain_schedule: str = "allr",
        tuned_rate: float | None = None,
        warmup_ratio: float | None = None,
        train_accuracy: Callable[[], float] | None = None,
    ):
        self.plan, self.masks, self.eta_1, self.dense = plan, masks, eta_1, dense
        self.schedule, self.tuned_rate, self.train_accuracy = retrain_schedule, tuned_rate, train_accuracy
        self.warmup_ratio = default_warmup_ratio(retrain_schedule) if warmup_ratio is None else warmup_ratio
        self.peaks: list[float] = []  # one for each pruning done
        self.dense_accuracy: float | None = None
        check_schedule(retrain_schedule, tuned_rate, warmup_ratio)
        self._check_plan()

    def _check_plan(self) -> None:
        if self.plan.num_cycles and self.dense is None and self.schedule in NEED_DENSE_HISTORY:
            raise ValueError(
                f"retrain_schedule={self.schedule!r} needs the dense schedule, and the model's dense training is not "
                "known: the checkpoint has none of its records. Give dense_steps (its length in optimizer steps) with "
                "learning_rate, lr_scheduler_type and warmup_steps as they were, or use allr, which then goes by the "
                "pruning's impact alone."
            )
        if self.plan.num_cycles and self.eta_1 == 0:
            raise ValueError(
                "The dense schedule never leaves a learning rate of 0, so there is none to retrain with. Use fewer "
                "warmup_steps, or a longer dense phase."
            )
        longest = max((phase.steps for phase in self.plan.phases if phase.cycle), default=0)
        if self.schedule == "lrw" and longest > self.dense.steps:
            raise ValueError(
                f"retrain_schedule='lrw' replays the last {longest} learning rates of the dense training, which had "
                f"only {self.dense.steps} steps. Use more cycles, a larger dense_ratio, or another schedule."
            )

    @property
    def cycle(self) -> int:
        """How many prunings are done."""
        return len(self.peaks)

    @property
    def is_complete(self) -> bool:
        return self.cycle == self.plan.num_cycles

    def is_due(self, step: int) -> bool:
        """Whether a pruning comes before optimizer step `step`."""
        return not self.is_complete and step >= self.plan.prune_steps[self.cycle]

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`."""
        phase = self.plan.phase(step)
        if phase.cycle == 0:
            return self.dense.rates[step]
        peak = self.peaks[phase.cycle - 1]
        return retrain_rate(self.schedule, step - phase.start, phase.steps, peak, self.dense, self.warmup_ratio)

    def planned_peak(self, phase: Phase) -> float:
        """The largest rate of a cycle whose schedule does not wait for the pruning."""
        return retrain_peak(self.schedule, phase.steps, self.eta_1, self.dense, 1.0, self.tuned_rate)

    def prune(self, optimizer: torch.optim.Optimizer) -> Pruning:
        """Does the next pruning: masks, weights, the state of `optimizer`, and the next cycle's peak rate."""
        if self.schedule == "acc_allr" and self.dense_accuracy is None:
            self.dense_accuracy = self.train_accuracy()
        phase = self.plan.cycle_phase(self.cycle + 1)
        selection = self.masks.prune(phase.sparsity)
        self.masks.mask_optimizer_state(optimizer)
        if self.schedule == "acc_allr":
            impact = (self.dense_accuracy - self.train_accuracy()) / (self.dense_accuracy or 1.0)
        else:
            scale = selection.norm * math.sqrt(self.plan.pruned_fraction(phase.cycle))
            impact = selection.removed_norm / scale if scale else 0.0
        d1 = min(max(impact, 0.0), 1.0)
        d2 = None if self.dense is None else min(phase.steps / self.dense.steps, 1.0)
        d = discount(self.schedule, d1, d2)
        peak = retrain_peak(self.schedule, phase.steps, self.eta_1, self.dense, d, self.tuned_rate)
        self.peaks.append(peak)
        return Pruning(
            cycle=phase.cycle,
            step=phase.start,
            sparsity=self.masks.sparsity,
            threshold=selection.threshold,
            distance=selection.removed_norm,
            d1=d1,
            d2=d2,
            retrain_peak=peak,
            collapsed_layers=len(self.masks.collapsed),
        )

    def edit_gradients(self) -> None:
        self.masks.mask_gradients()

    def state_dict(self) -> dict:
        """What a checkpoint needs beside the masks, as JSON."""
        return {"peaks": self.peaks, "dense_accuracy": self.dense_accuracy}

    def load_state_dict(self, state: dict) -> None:
        self.peaks, self.dense_accuracy = list(state["peaks"]), state["dense_accuracy"]


def check_schedule(schedule: str, tuned_rate: float | None, warmup_ratio: float | None) -> None:
    """Raises `ValueError` where the retraining arguments do not go together."""
    if schedule not in RETRAIN_SCHEDULES:
        raise ValueError(f"retrain_schedule={schedule!r} is none of {', '.join(RETRAIN_SCHEDULES)}.")
    if (schedule in TUNED) != (tuned_rate is not None):
        raise ValueError(
            f"retrain_learning_rate={tuned_rate} with retrain_schedule={schedule!r}: it is the peak of "
            f"{', '.join(TUNED)}, which need it, and of no other schedule."
        )
    if tuned_rate is not None and not tuned_rate > 0:
        raise ValueError(f"retrain_learning_rate={tuned_rate} must be positive.")
    if warmup_ratio is not None and not 0 <= warmup_ratio < 1:
        raise ValueError(f"retrain_warmup_ratio={warmup_ratio} must lie in [0, 1): it is a share of a cycle.")
    if warmup_ratio and schedule in WITHOUT_WARMUP:
        raise ValueError(f"retrain_warmup_ratio={warmup_ratio}: {schedule!r} has no warm-up. Leave it out.")
