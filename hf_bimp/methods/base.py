"""What every method has: its place in a run, and the hooks that the trainer calls around each optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..pruning.allocation import ALLOCATIONS
from ..pruning.masks import Masks
from ..schedules.plan import Phase, Plan
from ..schedules.retraining import DenseRates


@dataclass(frozen=True)
class Pruning:
    """What pruning `cycle` (1..J) before optimizer step `step` did.

    `sparsity` is the share of pruned weights that it reached, `threshold` the largest magnitude that it removed
    (None where no threshold decided), `distance` ||W - W_p||_2 over the prunable weights, with the values that soft
    masks had kept aside in W, and `collapsed_layers` counts the weights that have nothing left. BIMP alone has the
    rest: `d1` its impact, `d2` the relative length of the retraining (None without a dense history), and
    `retrain_peak` the largest learning rate of the cycle, in the unit of the caller's rates.
    """

    cycle: int
    step: int
    sparsity: float
    threshold: float | None
    distance: float
    collapsed_layers: int
    d1: float | None = None
    d2: float | None = None
    retrain_peak: float | None = None


class LayerCollapseError(RuntimeError):
    """A pruning left a layer without any weight, and `on_collapse` is "raise"."""


class Method:
    """A way to make a model sparse while it trains; the base is one hard magnitude pruning at the end.

    Args:
        plan: when to prune and how far, as the class's own `prunings` has it.
        masks: over the weights to prune.
        dense: the learning rates of the first `plan.schedule_steps`; the last one holds for what follows (FT).
        output_dims: the dimension of each weight that counts its layer's outputs, where it is not 0.
        knobs: the fields of the class's `Arguments`.

    Around step t: `begin_step(t)`, `prune` where `is_due(t)`, `rate(t)` for the optimizer's learning rate,
    `edit_gradients` between backward and clipping, `before_update` and `after_update` around the optimizer's step.
    After the last step `is_due` is asked once more.
    """

    description: ClassVar[str]
    implicit_sparsity = False  # the knobs decide how sparse it becomes, not target_sparsity
    needs_weight_decay = False
    is_hard = False  # what is pruned stays so, before the last pruning already
    works_with_fp16 = True  # not where gradients that are scaled, or infinite at times, lead astray
    allocations = ALLOCATIONS

    @dataclass
    class Arguments:
        """Its knobs, as fields of `BIMPArguments`."""

    def __init__(
        self,
        plan: Plan,
        masks: Masks,
        dense: DenseRates | None,
        output_dims: Mapping[str, int] | None = None,
        **knobs,
    ):
        self.plan, self.masks, self.dense, self.knobs = plan, masks, dense, knobs
        self.output_dims = output_dims or {}
        self.cycle = 0  # how many prunings are done
        self.step = 0  # that the model's weights are ready for

    # ---- Before a run ----

    @classmethod
    def check(cls, args) -> None:
        """Raises `ValueError` where its knobs in these `BIMPArguments` cannot work."""

    @classmethod
    def prunings(cls, steps: int, target_sparsity: float | None, **knobs) -> tuple[tuple, tuple]:
        """The steps of the prunings within the method's own `steps`, and the sparsities after them."""
        return (steps,), (target_sparsity,)

    @classmethod
    def dense_schedule(cls, **knobs) -> dict:
        """Fields of `DenseHistory` that its knobs decide rather than the user's schedule."""
        return {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes up the weights as they are, and gives `optimizer` what the method trains beside them."""
        if self.needs_weight_decay and not self._weight_decay(optimizer):
            raise ValueError(
                f"{self.description} works by weight decay, and the optimizer has none for the prunable weights. Set "
                "weight_decay, such as 5e-4."
            )

    def detach(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes back what `attach` gave."""
        mine = {id(parameter) for parameter in self.extra_parameters}
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if not mine & {id(p) for p in g["params"]}]
        for parameter in self.extra_parameters:
            optimizer.state.pop(parameter, None)

    def _weight_decay(self, optimizer: torch.optim.Optimizer) -> float:
        """The largest that any prunable weight has."""
        prunable = {id(weight) for weight in self.masks.weights.values()}
        groups = [group for group in optimizer.param_groups if prunable & {id(p) for p in group["params"]}]
        return max((group["weight_decay"] for group in groups), default=0.0)

    # ---- Where a run stands ----

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        knobs = ", ".join(f"{name} {value}" for name, value in self.knobs.items() if value is not None)
        return self.description + (f" with {knobs}" if knobs else "")

    @property
    def sparsity(self) -> float:
        """The share of pruned weights."""
        return self.masks.sparsity

    @property
    def goal(self) -> float:
        return self.plan.sparsities[-1]

    @property
    def is_complete(self) -> bool:
        return self.cycle == self.plan.num_cycles

    def is_due(self, step: int) -> bool:
        """Whether a pruning comes before optimizer step `step`."""
        return not self.is_complete and step >= self.plan.prune_steps[self.cycle]

    @property
    def is_measured(self) -> bool:
        """Whether the next pruning is worth an evaluation before and after it: here the last one alone."""
        return self.cycle + 1 == self.plan.num_cycles

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`."""
        return self.scheduled_rate(min(step, self.plan.schedule_steps - 1))

    def scheduled_rate(self, step: int) -> float:
        """That of one of the first `schedule_steps`."""
        return self.dense.rates[step]

    def planned_peak(self, phase: Phase) -> float:
        """The largest rate of a phase."""
        return max(self.rate(step) for step in range(phase.start, phase.start + phase.steps))

    def describe_peak(self, phase: Phase, unit: float) -> str:
        """`planned_peak`, times `unit`, for the printed plan."""
        return f"{self.planned_peak(phase) * unit:.3g}"

    # ---- Steps ----

    def begin_step(self, step: int) -> None:
        self.step = step

    def prune(self, optimizer: torch.optim.Optimizer) -> Pruning:
        """Does the next pruning: masks, weights and the state of `optimizer`."""
        phase = self.plan.cycle_phase(self.cycle + 1)
        threshold, distance = self.sparsify(phase.sparsity, optimizer)
        self.cycle += 1
        return Pruning(phase.cycle, phase.start, self.masks.sparsity, threshold, distance, len(self.masks.collapsed))

    def sparsify(self, sparsity: float | None, optimizer: torch.optim.Optimizer) -> tuple[float | None, float]:
        """Prunes to `sparsity`; the threshold and ||W - W_p||_2."""
        selection = self.masks.prune(sparsity)
        self.masks.mask_optimizer_state(optimizer)
        return selection.threshold, selection.removed_norm

    def edit_gradients(self) -> None:
        """Once an optimizer step, when its gradient is whole."""
        self.masks.mask_gradients()

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are clipped, and the optimizer steps next."""

    def after_update(self) -> None:
        """The optimizer has stepped."""

    # ---- What a checkpoint needs beside the masks ----

    @property
    def extra_parameters(self) -> list[nn.Parameter]:
        """What it trains beside the model's parameters."""
        return []

    @property
    def settings(self) -> dict:
        """What a resumed run must share."""
        return {"knobs": self.knobs}

    def state_dict(self) -> dict:
        """As JSON."""
        return {"cycle": self.cycle, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.cycle, self.step = state["cycle"], state["step"]

    def tensors(self) -> dict[str, Tensor]:
        """As safetensors."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` gave, after `load_state_dict` and the masks."""
