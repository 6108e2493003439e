"""Iterative magnitude pruning with a learning rate restarted at each pruning: IMP and, in one budget, BIMP."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers.utils import logging

from ..pruning.ranking import Selection
from ..schedules.plan import Budget, Phase, Plan, check_amount, make_plan
from ..schedules.retraining import (
    ADAPTIVE,
    NEED_DENSE_HISTORY,
    RETRAIN_SCHEDULES,
    TUNED,
    WITHOUT_WARMUP,
    default_warmup_ratio,
    discount,
    retrain_peak,
    retrain_rate,
)
from .base import Method, Pruning, Run, Traits
from .registry import register_method

logger = logging.get_logger(__name__)

MOST_DENSE_STEPS = 10_000_000


@dataclass
class BIMPConfig:
    """The settings of BIMP and IMP."""

    num_cycles: int | None = field(
        default=None,
        metadata={
            "help": "J, the number of prune-retrain cycles (default 1: one shot). 0 is allowed with keep_zeros alone."
        },
    )
    dense_ratio: float = field(
        default=0.5,
        metadata={"help": "T0/T, the dense share of the budget. 0 prunes the given model at once (IMP)."},
    )
    prune_fraction: float | None = field(
        default=None,
        metadata={
            "help": "s, the share of the remaining weights that each pruning removes, in place of num_cycles: the "
            "target then decides how many cycles there are (Renda et al., 2020, with 0.2)."
        },
    )
    retrain_schedule: str = field(
        default="allr",
        metadata={"help": "Learning-rate schedule of each cycle.", "choices": RETRAIN_SCHEDULES},
    )
    retrain_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak rate of the tuned schedules: constant, stepped, cosine, linear."},
    )
    retrain_warmup_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of each cycle that warms up. By default the paper's: 0.1, and 0 for the tuned schedules "
            "(ft and lrw have no warm-up)."
        },
    )
    dense_steps: int | None = field(
        default=None,
        metadata={
            "help": "With dense_ratio=0: T, the length in optimizer steps of the dense training that the given model "
            "had with this learning_rate, lr_scheduler_type and warmup_steps. By default it is read from the model's "
            "checkpoint, when hf_bimp wrote it."
        },
    )


@register_method
class IterativeMagnitudePruning(Method):
    """Prunes where the plan says so, as the masks' rule does, and gives the learning rate of every step.

    A dense phase, then cycles of a pruning and a retraining by `retrain_schedule` (ALLR by default, section 2.1 of the
    paper). Schedules that replay or compress the dense one need `run.dense`; `acc_allr` needs `run.train_accuracy`.
    """

    name = "bimp"
    description = "Iterative magnitude pruning"
    paper = '"How I Learned to Stop Worrying and Love Retraining" (Zimmer, Spiegel and Pokutta, ICLR 2023)'
    Config = BIMPConfig
    traits = Traits(
        is_hard=True,
        has_dense_phase=True,
        keeps_zeros=True,
        granularities=("weight", "filter", "n:m"),
        criteria=None,
    )
    most_evaluated = 100  # prunings, which is nearly always every one

    def __init__(self, run: Run, config: BIMPConfig | None = None):
        super().__init__(run, config)
        self.retrain_schedule = self.config.retrain_schedule
        tuned = self.config.retrain_learning_rate
        self.tuned_rate = None if tuned is None else tuned / run.learning_rate
        given = self.config.retrain_warmup_ratio
        self.warmup_ratio = default_warmup_ratio(self.retrain_schedule) if given is None else given
        self.eta_1 = 1.0 if run.dense is None else run.dense.peak
        self.peaks: list[float] = []  # of the cycles begun so far
        self.dense_accuracy: float | None = None  # on the training set, for acc_allr
        self._check_run()

    @property
    def cycle(self) -> int:  # type: ignore[override]  # counted by the peaks, which the base counts itself
        return len(self.peaks)

    @classmethod
    def check(cls, config: BIMPConfig, budget: Budget) -> None:
        check_schedule(config)
        if config.dense_steps is not None and (
            config.dense_ratio > 0 or config.dense_steps < 1 or config.num_cycles == 0
        ):
            raise ValueError(
                f"dense_steps={config.dense_steps} is the length of an earlier dense training, at least 1: it goes "
                f"with pruning and dense_ratio=0 (given: num_cycles={config.num_cycles}, "
                f"dense_ratio={config.dense_ratio})."
            )
        if config.dense_steps is not None and config.dense_steps > MOST_DENSE_STEPS:
            raise ValueError(
                f"dense_steps={config.dense_steps} must be at most {MOST_DENSE_STEPS}: the learning rate of each is "
                "kept. Give the length of the dense training in optimizer steps, not in items or tokens."
            )
        if config.num_cycles is not None and config.prune_fraction is not None:
            raise ValueError(
                f"num_cycles={config.num_cycles} and prune_fraction={config.prune_fraction} each decide the number "
                "of cycles: give one of them."
            )
        if config.num_cycles == 0:
            if not budget.keep_zeros or budget.target_sparsity is not None:
                raise ValueError(
                    "num_cycles=0 prunes nothing: it goes with keep_zeros=True and without target_sparsity, to "
                    "fine-tune a sparse model. To prune, num_cycles must be at least 1."
                )
            return
        check_amount(budget.target_sparsity, config.num_cycles, config.dense_ratio, config.prune_fraction)

    @classmethod
    def prunes(cls, config: BIMPConfig) -> bool:
        return config.num_cycles != 0

    @classmethod
    def make_plan(cls, budget: Budget, config: BIMPConfig) -> Plan:
        return make_plan(
            budget.steps,
            budget.target_sparsity,
            config.num_cycles,
            config.dense_ratio,
            config.prune_fraction,
            budget.initial_sparsity,
        )

    def _check_run(self) -> None:
        check_schedule(self.config)
        dense, plan = self.dense, self.plan
        if plan.num_cycles and dense is None:
            if self.retrain_schedule in NEED_DENSE_HISTORY:
                raise ValueError(
                    f"retrain_schedule={self.retrain_schedule!r} needs the dense schedule, and the model's dense "
                    "training is not known: the checkpoint has none of its records. Give dense_steps (its length in "
                    "optimizer steps) with learning_rate, lr_scheduler_type and warmup_steps as they were, or use "
                    "allr, which then goes by the pruning's impact alone."
                )
            if self.retrain_schedule in ("allr", "acc_allr"):
                logger.warning(
                    f"The dense training of this model is not known, so {self.retrain_schedule} goes by the pruning's "
                    "impact d1 alone. Give dense_steps (its length in optimizer steps) to have d2 = T_rt / T as well."
                )
        if self.needs_train_accuracy and self.run.train_accuracy is None:
            raise ValueError(
                "retrain_schedule='acc_allr' measures the accuracy on the whole training set, and this one has no "
                "length. Use a sized data set, or allr."
            )
        if plan.num_cycles and self.eta_1 == 0:
            raise ValueError(
                "The dense schedule never leaves a learning rate of 0, so there is none to retrain with. Use fewer "
                "warmup_steps, or a longer dense phase."
            )
        longest = max((phase.steps for phase in plan.phases if phase.cycle), default=0)
        if self.retrain_schedule == "lrw" and dense is not None and longest > dense.steps:
            raise ValueError(
                f"retrain_schedule='lrw' replays the last {longest} learning rates of the dense training, which had "
                f"only {dense.steps} steps. Use more cycles, a larger dense_ratio, or another schedule."
            )

    @property
    def needs_train_accuracy(self) -> bool:
        return self.retrain_schedule == "acc_allr" and self.plan.num_cycles > 0

    @property
    def summary(self) -> str:
        cycles = self.plan.num_cycles
        if not cycles:
            return "no pruning, only training" + (" with the zeros held" if self.plan.initial_sparsity else "")
        return f"{cycles} prune-retrain cycle{'s' * (cycles > 1)}, retraining by {self.retrain_schedule}"

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`."""
        phase = self.plan.phase(step)
        if phase.cycle == 0:
            return self.schedule.rates[step]
        peak = self.peaks[phase.cycle - 1]
        return retrain_rate(
            self.retrain_schedule, step - phase.start, phase.steps, peak, self.dense, self.warmup_ratio
        )

    def planned_peak(self, phase: Phase) -> float:
        """The largest rate of a cycle whose schedule does not wait for the pruning."""
        return retrain_peak(self.retrain_schedule, phase.steps, self.eta_1, self.dense, 1.0, self.tuned_rate)

    def describe_peak(self, phase: Phase) -> str:
        unit = self.run.learning_rate
        if phase.cycle == 0:
            return f"{self.schedule.peak * unit:.3g}"
        if phase.cycle <= self.cycle:
            return f"{self.peaks[phase.cycle - 1] * unit:.3g}"
        if self.retrain_schedule in ADAPTIVE:
            return f"d * {self.eta_1 * unit:.3g}"
        return super().describe_peak(phase)

    def prune(self, optimizer: torch.optim.Optimizer) -> Pruning:
        """Does the next pruning: masks, weights, the state of `optimizer`, and the next cycle's peak rate."""
        if self.needs_train_accuracy and self.dense_accuracy is None:
            self.dense_accuracy = self._train_accuracy()
        phase = self.plan.cycle_phase(self.cycle + 1)
        selection = self.masks.prune(cast(float, phase.sparsity))
        self.masks.mask_optimizer_state(optimizer)
        accuracy = self._train_accuracy() if self.needs_train_accuracy else None
        impact = self._distance_ratio(selection, phase) if accuracy is None else self._lost_accuracy(accuracy)
        d1 = min(max(impact, 0.0), 1.0)
        d2 = None if self.dense is None else min(phase.steps / self.dense.steps, 1.0)
        d = discount(self.retrain_schedule, d1, d2)
        peak = retrain_peak(self.retrain_schedule, phase.steps, self.eta_1, self.dense, d, self.tuned_rate)
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
            train_accuracy_before=self.dense_accuracy,
            train_accuracy_after=accuracy,
        )

    def _train_accuracy(self) -> float:
        return cast(Callable[[], float], self.run.train_accuracy)()

    def _lost_accuracy(self, now: float) -> float:
        """acc_allr's d1 before it is clipped: the share of the dense model's training accuracy that is gone."""
        before = cast(float, self.dense_accuracy)
        return (before - now) / (before or 1.0)

    def _distance_ratio(self, selection: Selection, phase: Phase) -> float:
        """d1 before it is clipped: the relative change of the weights."""
        scale = selection.norm * math.sqrt(self.plan.pruned_fraction(phase.cycle))
        return selection.removed_norm / scale if scale else 0.0

    @property
    def settings(self) -> dict:
        return {
            "retrain_schedule": self.retrain_schedule,
            "retrain_learning_rate": self.tuned_rate,
            "retrain_warmup_ratio": self.warmup_ratio,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"peaks": self.peaks, "dense_accuracy": self.dense_accuracy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.peaks, self.dense_accuracy = list(state["peaks"]), state["dense_accuracy"]


def check_schedule(config: BIMPConfig) -> None:
    """Raises `ValueError` where the retraining settings do not go together."""
    schedule, tuned_rate = config.retrain_schedule, config.retrain_learning_rate
    warmup_ratio = config.retrain_warmup_ratio
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
