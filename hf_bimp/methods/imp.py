"""Iterative magnitude pruning with a learning rate restarted at each pruning: IMP and, in one budget, BIMP."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..pruning.granularity import CRITERIA, parse_n_of_m
from ..pruning.masks import Masks
from ..schedules.plan import Phase, Plan, check_amount
from ..schedules.retraining import (
    ADAPTIVE,
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
from .base import Method, Pruning


@dataclass
class IMPArguments:
    """The knobs of BIMP and IMP."""

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
    granularity: str = field(
        default="weight",
        metadata={
            "help": "What is removed: 'weight'; 'filter' (whole output filters, the same share of each layer's, by "
            "their L2 norm); or 'n:m' such as 2:4 (of m consecutive inputs n stay, so the sparsity is 1 - n/m)."
        },
    )
    criterion: str = field(
        default="magnitude",
        metadata={"help": "Which weights or filters go: the smallest, or random ones.", "choices": CRITERIA},
    )
    keep_zeros: bool = field(
        default=False,
        metadata={"help": "The model is sparse already: its zeros stay zero, and its sparsity is S_0."},
    )
    dense_steps: int | None = field(
        default=None,
        metadata={
            "help": "With dense_ratio=0: T, the length in optimizer steps of the dense training that the given model "
            "had with this learning_rate, lr_scheduler_type and warmup_steps. By default it is read from the model's "
            "checkpoint, when hf_bimp wrote it."
        },
    )


class IterativeMagnitudePruning(Method):
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

    description = "Iterative magnitude pruning"
    Arguments = IMPArguments
    is_hard = True
    is_measured = True  # every pruning

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
        super().__init__(plan, masks, dense)
        self.eta_1 = eta_1
        self.schedule, self.tuned_rate, self.train_accuracy = retrain_schedule, tuned_rate, train_accuracy
        self.warmup_ratio = default_warmup_ratio(retrain_schedule) if warmup_ratio is None else warmup_ratio
        self.peaks: list[float] = []  # one for each pruning done
        self.dense_accuracy: float | None = None
        check_schedule(retrain_schedule, tuned_rate, warmup_ratio)
        self._check_plan()

    @classmethod
    def check(cls, args) -> None:
        _set_sparsity_of_pattern(args)
        _check_amount(args)
        check_schedule(args.retrain_schedule, args.retrain_learning_rate, args.retrain_warmup_ratio)

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
    def summary(self) -> str:
        cycles = self.plan.num_cycles
        if not cycles:
            return "no pruning, only training" + (" with the zeros held" if self.plan.initial_sparsity else "")
        return f"{cycles} prune-retrain cycle{'s' * (cycles > 1)}, retraining by {self.schedule}"

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

    def describe_peak(self, phase: Phase, unit: float) -> str:
        if phase.cycle == 0:
            return f"{self.dense.peak * unit:.3g}"
        if phase.cycle <= self.cycle:
            return f"{self.peaks[phase.cycle - 1] * unit:.3g}"
        if self.schedule in ADAPTIVE:
            return f"d * {self.eta_1 * unit:.3g}"
        return super().describe_peak(phase, unit)

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
        self.cycle += 1
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

    @property
    def settings(self) -> dict:
        return {
            "retrain_schedule": self.schedule,
            "retrain_learning_rate": self.tuned_rate,
            "retrain_warmup_ratio": self.warmup_ratio,
        }

    def state_dict(self) -> dict:
        return {"peaks": self.peaks, "dense_accuracy": self.dense_accuracy}

    def load_state_dict(self, state: dict) -> None:
        self.peaks, self.dense_accuracy = list(state["peaks"]), state["dense_accuracy"]
        self.cycle = len(self.peaks)


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


def _set_sparsity_of_pattern(args) -> None:
    """n:m fixes the sparsity."""
    pattern = parse_n_of_m(args.granularity)
    if pattern is None or args.method == "dense" or args.num_cycles == 0:
        return
    sparsity = 1 - pattern[0] / pattern[1]
    if args.target_sparsity is None:
        args.target_sparsity = sparsity
    if abs(args.target_sparsity - sparsity) > 1e-9:
        raise ValueError(
            f"granularity={args.granularity!r} fixes the sparsity at {sparsity:.4g}: leave target_sparsity out "
            f"(given: {args.target_sparsity})."
        )


def _check_amount(args) -> None:
    if args.dense_steps is not None and (
        args.dense_ratio > 0 or args.dense_steps < 1 or args.method == "dense" or args.num_cycles == 0
    ):
        raise ValueError(
            f"dense_steps={args.dense_steps} is the length of an earlier dense training, at least 1: it goes with "
            f"pruning and dense_ratio=0 (given: method={args.method!r}, num_cycles={args.num_cycles}, "
            f"dense_ratio={args.dense_ratio})."
        )
    if args.method == "dense":
        if args.target_sparsity is not None or args.keep_zeros:
            raise ValueError("method='dense' prunes nothing: leave target_sparsity and keep_zeros out.")
        return
    if args.num_cycles is not None and args.prune_fraction is not None:
        raise ValueError(
            f"num_cycles={args.num_cycles} and prune_fraction={args.prune_fraction} each decide the number of "
            "cycles: give one of them."
        )
    if args.num_cycles == 0:
        if not args.keep_zeros or args.target_sparsity is not None:
            raise ValueError(
                "num_cycles=0 prunes nothing: it goes with keep_zeros=True and without target_sparsity, to "
                "fine-tune a sparse model. To prune, num_cycles must be at least 1."
            )
        return
    check_amount(args.target_sparsity, args.num_cycles, args.dense_ratio, args.prune_fraction)
