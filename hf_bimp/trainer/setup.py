"""What a run is going to do, from its arguments, its model and the checkpoint that it continues."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..arguments import BIMPArgumentsMixin
from ..methods import Method, Run
from ..pruning.build import make_masks
from ..pruning.layers import layer_infos
from ..pruning.masks import Masks
from ..schedules.dense_history import DenseHistory
from ..schedules.plan import Plan
from ..storage.run_state import find_dense_history

logger = logging.get_logger(__name__)

MANY_ZEROS = 0.05  # more of them in a given model are worth a warning


@dataclass(frozen=True)
class RunSetup:
    """A run that is ready to start.

    `history`: the dense training that retraining refers to, None where it is not known. `recorded`: what checkpoints
    tell later runs of it. `stays_dense`: the weight matrices that are not pruned, each with the reason or "".
    `settings` and `identity`: what a resumed run must share, of its plan and beside it.
    """

    method: Method
    history: DenseHistory | None
    recorded: DenseHistory | None
    stays_dense: dict[str, str]
    settings: dict[str, Any]
    identity: dict[str, Any]

    @property
    def learning_rate(self) -> float:
        """The unit of the method's rates: the optimizer's own learning rate."""
        return self.method.run.learning_rate


def set_up_run(
    args: BIMPArgumentsMixin,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    example_inputs: Callable[[], Any],
    train_accuracy: Callable[[], float] | None,
    resumed: dict | None,
    identity: dict[str, Any],
) -> RunSetup:
    """Makes plan, masks and method.

    `optimizer` is out of any wrapper. `resumed` is the state of the checkpoint that the run continues. Raises
    `ValueError` where the arguments, the model, the budget of `total_steps` and the checkpoint do not go together.
    """
    masks, stays_dense = _masks(args, model, example_inputs)
    plan = _plan(args, masks, total_steps, resumed)
    masks.mask_optimizer_state(optimizer)  # one passed by hand may have moved the zeros to keep before
    learning_rate = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    dense_steps = args.dense_steps if args.method_class.traits.has_dense_phase else None
    only_trains_on = args.keep_zeros and not plan.num_cycles
    is_asked_for = only_trains_on or (plan.schedule_steps == 0 and dense_steps is None)
    given = _given_history(model, resumed) if is_asked_for else None
    history = _dense_history(args, plan, learning_rate, dense_steps, given)
    # Fine-tuning a sparse model is no dense training: its checkpoint goes on telling of the one before.
    recorded = given if only_trains_on else history
    dense = None if history is None else history.rates(unit=learning_rate)
    run = Run(plan, masks, dense, layer_infos(model), args.seed, learning_rate, train_accuracy)
    method = args.method_class(run, args.method_settings)
    return RunSetup(method, history, recorded, stays_dense, _settings(args, method, history), identity)


def _masks(
    args: BIMPArgumentsMixin, model: nn.Module, example_inputs: Callable[[], Any]
) -> tuple[Masks, dict[str, str]]:
    """The masks of a run, with the zeros that it keeps, and which weight matrices stay dense, with the reasons."""
    masks, stays_dense = make_masks(
        model,
        example_inputs,
        args.granularity,
        args.resolved_allocation,
        args.resolved_criterion,
        args.seed,
        args.prune_modules,
        args.skip_modules,
        with_frozen=args.method_class.traits.prunes_frozen,
    )
    if args.keep_zeros:
        masks.keep_zeros()
        if masks.num_pruned == 0:
            raise ValueError(
                "keep_zeros=True, but no prunable weight of this model is zero. Load the sparse checkpoint, or "
                "leave keep_zeros out to prune a dense model."
            )
    return masks, stays_dense


def _plan(args: BIMPArgumentsMixin, masks: Masks, total_steps: int, resumed: dict | None) -> Plan:
    """When the run prunes, and how far. Raises `ValueError` where the budget or the rule does not allow it."""
    # Resumed weights hold the zeros of later prunings too.
    initial = resumed["settings"]["plan"]["initial_sparsity"] if resumed else masks.sparsity
    plan = args.method_class.make_plan(args.budget(total_steps, initial), args.method_settings)
    if not args.method_class.traits.finds_sparsity:
        masks.check_plan(plan.sparsities)
        if resumed is None or resumed.get("format_version", 1) >= 3:  # as written by the version that began the run
            plan = replace(plan, sparsities=tuple(masks.planned(plan.sparsities)))
    if masks.needs_gradients and plan.prune_steps and plan.prune_steps[0] == 0:
        raise ValueError(
            f"criterion={args.resolved_criterion!r} goes by gradients, and the plan prunes before the first step. "
            "Train before it prunes (dense_ratio above 0), or use criterion='magnitude'."
        )
    if not args.keep_zeros and resumed is None:
        _warn_of_zeros(args, masks)
    return plan


def _warn_of_zeros(args: BIMPArgumentsMixin, masks: Masks) -> None:
    zeros = sum(int((weight == 0).sum()) for weight in masks.weights.values()) / masks.num_weights
    if zeros <= MANY_ZEROS:
        return
    way_out = "Without keep_zeros=True they may grow back before they are pruned, at no impact and so at a low rate."
    if args.method == "dense" or not args.method_class.traits.keeps_zeros:
        way_out = (
            f"method={args.method!r} does not hold them: the model becomes dense, or chooses its zeros anew. To train "
            "it as sparse as it is, use method='bimp' with keep_zeros=True and num_cycles=0."
        )
    logger.warning(f"{zeros:.1%} of the prunable weights are zero already. {way_out}")


def _given_history(model: nn.Module, resumed: dict | None) -> DenseHistory | None:
    """The dense training that the given model had before this run, where its checkpoint tells."""
    if resumed:
        saved = resumed["dense_history"]
        return saved and DenseHistory(**saved)
    return find_dense_history(getattr(getattr(model, "config", None), "name_or_path", ""))


def _dense_history(
    args: BIMPArgumentsMixin,
    plan: Plan,
    learning_rate: float,
    dense_steps: int | None,
    given: DenseHistory | None,
) -> DenseHistory | None:
    """The dense phase of the run, or with none in it that of the given model, if it is known."""
    if plan.schedule_steps == 0 and dense_steps is None:
        if given is not None:
            logger.warning(
                f"The model's checkpoint tells of its dense training: {given}. The retraining refers to it; "
                "learning_rate and lr_scheduler_type have no effect on this run. dense_steps would overrule it."
            )
        return given
    steps = plan.schedule_steps or dense_steps
    schedule = {
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "warmup_steps": args.get_warmup_steps(steps),
        "lr_scheduler_kwargs": dict(args.lr_scheduler_kwargs or {}),
        "lr_gamma": args.lr_gamma,
    }
    schedule |= args.method_class.dense_schedule(args.method_settings) or {}
    if args.lr_milestones is not None:
        schedule["lr_milestones"] = args.lr_milestones
    return DenseHistory(steps, learning_rate, **schedule)


def _settings(args: BIMPArgumentsMixin, method: Method, history: DenseHistory | None) -> dict[str, Any]:
    return {
        "method": args.method,
        "plan": method.plan.to_dict(),
        **method.settings,
        "dense_schedule": history and asdict(history),
        "keep_zeros": args.keep_zeros,
        "learning_rate": method.run.learning_rate if history is None else None,
        "granularity": args.granularity,
        "allocation": None if method.traits.finds_sparsity else args.resolved_allocation,
        "criterion": args.resolved_criterion,
        "random_seed": args.seed if args.resolved_criterion == "random" else None,
        "prune_modules": args.prune_modules,
        "skip_modules": args.skip_modules,
    }
