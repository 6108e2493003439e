"""GMP: gradual magnitude pruning (Zhu and Gupta, 2017), soft or hard, with the paper's learning-rate variants."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..schedules.plan import gradual_prunings
from .base import Method

SCHEDULES = ("stepped", "linear", "cyclic")
MILESTONES = [0.5, 0.75]  # of the stepped schedule, unless lr_milestones says otherwise


@dataclass
class GradualArguments:
    """When methods that prune gradually do so."""

    num_prunings: int = field(
        default=20, metadata={"help": "gmp, dpf: K, equally distributed prunings (the paper's grid: 20, 100)."}
    )
    prune_interval: int | None = field(
        default=None,
        metadata={"help": "gmp, dpf: prune every so many optimizer steps instead (the paper: every 5 or 10 epochs)."},
    )


class Gradual(Method):
    """Prunes at t_k = round(k * T / (K + 1)) to goal * (1 - (1 - t_k / t_K)^3)."""

    Arguments = GradualArguments

    @classmethod
    def check(cls, args) -> None:
        if args.num_prunings < 1 or (args.prune_interval is not None and args.prune_interval < 1):
            raise ValueError(
                f"num_prunings={args.num_prunings} and prune_interval={args.prune_interval} must be at least 1."
            )
        if args.prune_interval is not None and args.num_prunings != GradualArguments.num_prunings:
            raise ValueError(
                f"num_prunings={args.num_prunings} and prune_interval={args.prune_interval} each say how often to "
                "prune: give one of them."
            )

    @classmethod
    def prunings(cls, steps, target_sparsity, *, num_prunings, prune_interval, **knobs):
        return gradual_prunings(steps, target_sparsity, num_prunings, prune_interval)


@dataclass
class GMPArguments(GradualArguments):
    """The knobs of GMP."""

    gmp_hard: bool = field(
        default=False,
        metadata={
            "help": "gmp: pruned weights are gone for good. By default they keep their values, frozen and unused, and "
            "compete again at the next pruning."
        },
    )
    gmp_schedule: str = field(
        default="stepped",
        metadata={
            "help": "gmp: the learning rate. 'stepped' (at lr_milestones, by default 0.5 and 0.75 of the run), "
            "'linear', or 'cyclic' (linear to 0 between each two prunings); all after warmup_steps.",
            "choices": SCHEDULES,
        },
    )


class GradualMagnitudePruning(Gradual):
    """Masks at K steps the smallest magnitudes of all weights, masked ones with the values that they had included.

    Soft by default: a masked weight is zero in the model, without gradient and optimizer state, while its value waits
    in `frozen`; at the next pruning it competes, and can come back.
    """

    description = "Gradual magnitude pruning (GMP, Zhu and Gupta, 2017)"
    Arguments = GMPArguments

    def __init__(self, plan, masks, dense, output_dims=None, **knobs):
        super().__init__(plan, masks, dense, output_dims, **knobs)
        self.is_hard, self.schedule = knobs["gmp_hard"], knobs["gmp_schedule"]
        self.frozen: dict[str, Tensor] = {}  # the values of masked weights, 0 elsewhere

    @classmethod
    def check(cls, args) -> None:
        super().check(args)
        if args.gmp_schedule not in SCHEDULES:
            raise ValueError(f"gmp_schedule={args.gmp_schedule!r} is none of {', '.join(SCHEDULES)}.")
        if args.lr_scheduler_type.value != "linear" or (args.lr_milestones and args.gmp_schedule != "stepped"):
            raise ValueError(
                f"The learning rate of method='gmp' is gmp_schedule={args.gmp_schedule!r}: leave lr_scheduler_type "
                "out (and lr_milestones, unless it is 'stepped')."
            )

    @classmethod
    def dense_schedule(cls, *, gmp_schedule, **knobs):
        return {
            "stepped": {"lr_milestones": MILESTONES},
            "linear": {},
            "cyclic": {"lr_scheduler_type": "constant_with_warmup"},
        }[gmp_schedule]

    def scheduled_rate(self, step: int) -> float:
        if self.schedule != "cyclic":
            return super().scheduled_rate(step)
        phase = self.plan.phase(step)
        length = min(phase.start + phase.steps, self.plan.schedule_steps) - phase.start
        return self.dense.rates[step] * (1 - (step - phase.start) / length)

    @torch.no_grad()
    def sparsify(self, sparsity, optimizer):
        if self.is_hard:
            return super().sparsify(sparsity, optimizer)
        for name, values in self.frozen.items():
            self.masks.weights[name].add_(values)  # to the zeros of the masked ones
        selection = self.masks.renew(sparsity)
        is_last = self.cycle + 1 == self.plan.num_cycles
        masked = {} if is_last else self.masks.weights
        self.frozen = {name: weight * self.masks.pruned[name] for name, weight in masked.items()}
        self.masks.mask_weights()
        self.masks.mask_optimizer_state(optimizer)
        return selection.threshold, selection.removed_norm

    def tensors(self) -> dict[str, Tensor]:
        return self.frozen

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.frozen = tensors
