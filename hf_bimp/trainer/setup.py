"""What a run is going to do, from its arguments, its model and the checkpoint that it continues."""

from functools import partial

from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..methods import METHODS, IterativeMagnitudePruning, Method
from ..pruning.build import make_masks
from ..pruning.layers import output_dims
from ..pruning.masks import Masks
from ..schedules.dense_history import DenseHistory
from ..schedules.plan import Plan, finetune_split, make_plan
from ..storage.run_state import find_dense_history
from .measuring import example_inputs, train_accuracy

logger = logging.get_logger(__name__)


def run_masks(trainer) -> tuple[Masks, dict[str, str]]:
    """The masks of a run, with the zeros that it keeps, and which weight matrices stay dense, with the reasons."""
    args = trainer.args
    masks, dense = make_masks(
        trainer.model,
        partial(example_inputs, trainer),
        args.granularity,
        args.allocation,
        args.criterion,
        args.seed,
        args.prune_modules,
        args.skip_modules,
    )
    if args.keep_zeros:
        masks.keep_zeros()
        if masks.num_pruned == 0:
            raise ValueError(
                "keep_zeros=True, but no prunable weight of this model is zero. Load the sparse checkpoint, or "
                "leave keep_zeros out to prune a dense model."
            )
    return masks, dense


def run_plan(trainer, masks: Masks, num_training_steps: int) -> Plan:
    """When the run prunes, and how far. Raises `ValueError` where the budget or the rule does not allow it."""
    args, resumed = trainer.args, trainer.resumed
    method = METHODS[args.method]
    if method is not IterativeMagnitudePruning:
        steps = finetune_split(num_training_steps, args.finetune_ratio)
        plan = Plan(
            num_training_steps, *method.prunings(steps, args.target_sparsity, **args.knobs), schedule_steps=steps
        )
        masks.check_plan([sparsity for sparsity in plan.sparsities if sparsity is not None])
        return plan
    # Resumed weights hold the zeros of later prunings too.
    initial = resumed["settings"]["plan"]["initial_sparsity"] if resumed else masks.sparsity
    num_cycles = 0 if args.method == "dense" else args.num_cycles
    plan = make_plan(
        num_training_steps, args.target_sparsity, num_cycles, args.dense_ratio, args.prune_fraction, initial
    )
    masks.check_plan(plan.sparsities)
    zeros = sum(int((weight == 0).sum()) for weight in masks.weights.values()) / masks.num_weights
    if plan.num_cycles and not args.keep_zeros and not resumed and zeros > 0.05:
        logger.warning(
            f"{zeros:.1%} of the prunable weights are zero already. Without keep_zeros=True they may grow back "
            "before they are pruned, at no impact and so at a low learning rate."
        )
    if args.retrain_schedule == "acc_allr" and not has_length(trainer.train_dataset):
        raise ValueError(
            "retrain_schedule='acc_allr' measures the accuracy on the whole training set, and this one has no "
            "length. Use a sized data set, or allr."
        )
    return plan


def given_history(trainer) -> DenseHistory | None:
    """The dense training that the given model had before this run, where its checkpoint tells."""
    if trainer.resumed:
        saved = trainer.resumed["dense_history"]
        return saved and DenseHistory(**saved)
    return find_dense_history(getattr(getattr(trainer.model, "config", None), "name_or_path", ""))


def dense_history(trainer, plan: Plan, learning_rate: float) -> DenseHistory | None:
    """The dense phase of the run, or with none in it that of the given model, if it is known."""
    args = trainer.args
    if plan.schedule_steps == 0 and args.dense_steps is None:
        history = given_history(trainer)
        if history is not None:
            logger.warning(
                f"The model's checkpoint tells of its dense training: {history}. The retraining refers to it; "
                "learning_rate and lr_scheduler_type have no effect on this run. dense_steps would overrule it."
            )
        if history is None and args.retrain_schedule in ("allr", "acc_allr"):
            logger.warning(
                f"The dense training of this model is not known, so {args.retrain_schedule} goes by the pruning's "
                "impact d1 alone. Give dense_steps (its length in optimizer steps) to have d2 = T_rt / T as well."
            )
        return history
    steps = plan.schedule_steps or args.dense_steps
    given = {
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "warmup_steps": args.get_warmup_steps(steps),
        "lr_scheduler_kwargs": dict(args.lr_scheduler_kwargs or {}),
        "lr_gamma": args.lr_gamma,
    }
    given |= METHODS[args.method].dense_schedule(**args.knobs)
    if args.lr_milestones is not None:
        given["lr_milestones"] = args.lr_milestones
    return DenseHistory(steps, learning_rate, **given)


def make_method(trainer, plan: Plan, masks: Masks, history: DenseHistory | None, base: float) -> Method:
    """The method of a run, whose rates are multiples of `base`."""
    args = trainer.args
    dense = history and history.rates(unit=base)
    method = METHODS[args.method]
    if method is not IterativeMagnitudePruning:
        return method(plan, masks, dense, output_dims(trainer.model), **args.knobs)
    return IterativeMagnitudePruning(
        plan,
        masks,
        eta_1=dense.peak if dense else 1.0,
        dense=dense,
        retrain_schedule=args.retrain_schedule,
        tuned_rate=args.retrain_learning_rate and args.retrain_learning_rate / base,
        warmup_ratio=args.retrain_warmup_ratio,
        train_accuracy=partial(train_accuracy, trainer),
    )
