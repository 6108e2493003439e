"""The contract of a method: what it is given, what it promises, and the hooks around each optimizer step."""

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..pruning.allocation import ALLOCATIONS
from ..pruning.layers import LayerInfo
from ..pruning.masks import Masks
from ..schedules.plan import Budget, Phase, Plan
from ..schedules.retraining import DenseRates


@dataclass(frozen=True)
class Run:
    """All that a method sees of a run.

    `plan`: when to prune and how far, as the method's own `make_plan` has it. `masks`: over the weights to prune.
    `dense`: the learning rates of the first `plan.schedule_steps` steps, or of the dense training that the model had
    before; None where that is not known. Rates are multiples of `learning_rate`, the optimizer's own. `layers`: what
    each layer is, by the name of its weight. `train_accuracy` gives the model's accuracy on the training set as it is;
    None where that cannot be measured.
    """

    plan: Plan
    masks: Masks
    dense: DenseRates | None = None
    layers: Mapping[str, LayerInfo] = field(default_factory=dict)
    seed: int = 0
    learning_rate: float = 1.0
    train_accuracy: Callable[[], float] | None = None


@dataclass(frozen=True)
class Traits:
    """What a method promises, and what it works with; anything else is refused by name.

    `is_hard`: what is pruned stays so, before the last pruning already. `finds_sparsity`: its own settings decide how
    sparse the model becomes, and there is no target_sparsity. `has_dense_phase`: it prunes a model that was trained
    densely, and retrains. `prunes_frozen`: it can decide on weights that are not trained. None in place of criteria
    allows all.
    """

    is_hard: bool = False
    finds_sparsity: bool = False
    has_dense_phase: bool = False
    keeps_zeros: bool = False
    prunes_frozen: bool = True
    needs_weight_decay: bool = False
    works_with_fp16: bool = True  # not where gradients that are scaled, or infinite at times, lead astray
    allocations: tuple[str, ...] = ALLOCATIONS
    granularities: tuple[str, ...] = ("weight",)  # of weight, filter and n:m
    criteria: tuple[str, ...] | None = ("magnitude",)


@dataclass(frozen=True)
class Pruning:
    """What pruning `cycle` (1..J) before optimizer step `step` did.

    `sparsity` is the share of pruned weights that it reached, `threshold` the largest magnitude that it removed
    (None where no threshold decided), `distance` ||W - W_p||_2 over the prunable weights, with the values that soft
    masks had kept aside in W, and `collapsed_layers` counts the weights that have nothing left. BIMP alone has the
    rest: `d1` its impact, `d2` the relative length of the retraining (None without a dense history), and
    `retrain_peak` the largest learning rate of the cycle, in the unit of the caller's rates. acc_allr alone has the
    accuracies on the training set that d1 compares: of the dense model, and just after this pruning.
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
    train_accuracy_before: float | None = None
    train_accuracy_after: float | None = None


class LayerCollapseError(RuntimeError):
    """A pruning left a layer without any weight, and `on_collapse` is "raise"."""


def skip_update(optimizer: torch.optim.Optimizer) -> None:
    """For `Method.before_update`: the optimizer's next step does nothing, and the learning rate goes on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@dataclass
class NoConfig:
    """A method without settings of its own."""


class Method(ABC):
    """A way to make a model sparse while it trains; as it stands, one hard pruning at the end.

    Around step t: `begin_step(t)`, `prune` where `is_due(t)`, `rate(t)` for the optimizer's learning rate,
    `edit_gradients` between backward and clipping, `before_update` and `after_update` around the optimizer's step.
    After the last step `is_due` is asked once more. `register_method` makes a subclass known by its `name`.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    paper: ClassVar[str | None] = None  # for the model card, where `description` does not tell
    Config: ClassVar[type] = NoConfig  # a dataclass: its settings
    most_evaluated: ClassVar[int] = 1  # prunings with an evaluation before and after; 1: the last
    traits: Traits = Traits()
    cycle = 0  # how many prunings are done

    def __init__(self, run: Run, config: Any = None):
        self.run, self.config = run, self.Config() if config is None else config
        self.plan, self.masks, self.dense = run.plan, run.masks, run.dense
        self.step = 0  # that the model's weights are ready for

    # ---- Before a run ----

    @classmethod  # noqa: B027  as two other hooks, nothing that every method needs
    def check(cls, config: Any, budget: Budget) -> None:
        """Raises `ValueError` where `config` cannot work, alone or with `budget`, whose steps are not known yet."""

    @classmethod
    def prunes(cls, config: Any) -> bool:
        """Whether it prunes to target_sparsity, which is then needed."""
        return not cls.traits.finds_sparsity

    @classmethod
    def make_plan(cls, budget: Budget, config: Any) -> Plan:
        """When it prunes, and how far. Raises `ValueError` where the budget does not allow it."""
        steps = budget.method_steps
        times, sparsities = cls.prunings(steps, budget.target_sparsity, config)
        return Plan(budget.steps, times, sparsities, schedule_steps=steps)

    @classmethod
    def prunings(
        cls, steps: int, target_sparsity: float | None, config: Any
    ) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
        """The steps of the prunings within the method's own `steps`, and the sparsities after them."""
        return (steps,), (target_sparsity,)

    @classmethod
    def dense_schedule(cls, config: Any) -> dict | None:
        """Fields of `DenseHistory` that it decides in place of the user's schedule; None where it decides nothing.

        lr_milestones among them are a default, which the user's replace.
        """
        return None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes up the weights as they are, and gives `optimizer` what the method trains beside them."""
        if self.traits.needs_weight_decay and not self._weight_decay(optimizer):
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
        settings = ", ".join(f"{name} {value}" for name, value in asdict(self.config).items() if value is not None)
        return self.description + (f" with {settings}" if settings else "")

    @property
    def sparsity(self) -> float:
        """The share of pruned weights."""
        return self.masks.sparsity

    @property
    def goal(self) -> float:
        """The sparsity to reach, of a method that has one."""
        return cast(float, self.plan.sparsities[-1])

    @property
    def schedule(self) -> DenseRates:
        """The learning rates of the first `plan.schedule_steps`, of a method that has any."""
        return cast(DenseRates, self.run.dense)

    @property
    def is_complete(self) -> bool:
        return self.cycle == self.plan.num_cycles

    def is_due(self, step: int) -> bool:
        """Whether a pruning comes before optimizer step `step`."""
        return not self.is_complete and step >= self.plan.prune_steps[self.cycle]

    @property
    def needs_train_accuracy(self) -> bool:
        """Whether it is going to ask for `run.train_accuracy`, so that this is tried before training."""
        return False

    @property
    def is_measured(self) -> bool:
        """Whether the next pruning is worth an evaluation before and after it: `most_evaluated` are, evenly spread."""
        later = self.plan.num_cycles - self.cycle - 1
        is_first = self.cycle == 0 and self.most_evaluated > 1  # before it the model is dense
        return is_first or later % math.ceil(self.plan.num_cycles / self.most_evaluated) == 0

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`; after the method's own steps the last one holds (FT)."""
        return self.scheduled_rate(min(step, self.plan.schedule_steps - 1))

    def scheduled_rate(self, step: int) -> float:
        """That of one of the first `schedule_steps`."""
        return self.schedule.rates[step]

    def planned_peak(self, phase: Phase) -> float:
        """The largest rate of a phase."""
        return max(self.rate(step) for step in range(phase.start, phase.start + phase.steps))

    def describe_peak(self, phase: Phase) -> str:
        """`planned_peak` in the optimizer's unit, for the printed plan."""
        return f"{self.planned_peak(phase) * self.run.learning_rate:.3g}"

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
        selection = self.masks.prune(cast(float, sparsity))
        self.masks.mask_optimizer_state(optimizer)
        return selection.threshold, selection.removed_norm

    def competing(self) -> Mapping[str, Tensor]:
        """The values by which weights are ranked at the next pruning, pruned ones included."""
        return self.masks.weights

    def edit_gradients(self) -> None:
        """Once an optimizer step, when its gradient is whole."""
        if self.masks.needs_gradients and not self.is_complete:
            self.masks.observe(self.competing())
        self.masks.mask_gradients()

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027
        """Gradients are clipped, and the optimizer steps next; `skip_update` keeps it from doing so."""

    def after_update(self) -> None:  # noqa: B027
        """The optimizer has stepped."""

    # ---- What a checkpoint needs beside the masks ----

    @property
    def extra_parameters(self) -> list[nn.Parameter]:
        """What it trains beside the model's parameters."""
        return []

    @property
    def settings(self) -> dict:
        """What a resumed run must share."""
        return {"knobs": asdict(self.config)}

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists of them, and tensors."""
        return {"cycle": self.cycle, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave, after the masks."""
        self.cycle, self.step = state["cycle"], state["step"]
