"""Every knob of a BIMP run, as `TrainingArguments` with more fields."""

import os
from dataclasses import dataclass, field, fields

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .methods import METHODS
from .methods.imp import IMPArguments
from .pruning.allocation import ALLOCATIONS
from .pruning.granularity import check_rule
from .schedules.plan import check_goal

KNOBS = tuple(dict.fromkeys(method.Arguments for method in METHODS.values()))
ON_COLLAPSE = ("warn", "raise")
# What torch and transformers alone provide on any device. Each is tested to leave pruned weights at zero.
TESTED_OPTIMIZERS = (
    OptimizerNames.ADAMW_TORCH,
    OptimizerNames.ADAMW_TORCH_FUSED,
    OptimizerNames.ADAFACTOR,
    OptimizerNames.SGD,
    OptimizerNames.ADAGRAD,
    OptimizerNames.RMSPROP,
)
# They wait for a metric, so that the rate of a step is unknown until it comes.
METRIC_DRIVEN_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


@dataclass
class BIMPArguments(*KNOBS, TrainingArguments):
    """`TrainingArguments` of one budgeted run, by BIMP or by another method; the knobs of each lie in its own file.

    `num_train_epochs` or `max_steps` give the whole budget T. `learning_rate`, `lr_scheduler_type`, `warmup_steps` and
    `lr_scheduler_kwargs` describe the dense phase, over its own T0 steps; for the methods without one, all steps but
    those of `finetune_ratio`. Raises `ValueError` for values that cannot work or do not go together.
    """

    method: str = field(
        default="bimp",
        metadata={
            "help": "'bimp' trains, prunes and retrains; 'dense' only trains, and records the history that later runs "
            "with dense_ratio=0 need; the others are the pruning-stable methods that BIMP is compared with.",
            "choices": tuple(METHODS),
        },
    )
    target_sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Share of the prunable weights that are zero in the end, in (0, 1). Not of cs, str and dst."
        },
    )
    finetune_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of the budget that is fine-tuned (FT) after a pruning-stable method: masks fixed, at the "
            "last learning rate of its schedule. The paper: 30 epochs after 200."
        },
    )
    allocation: str | None = field(
        default=None,
        metadata={
            "help": "How pruned weights spread over the layers; by default one global threshold. Filters and n:m go "
            "by the same share of every layer instead.",
            "choices": ALLOCATIONS,
        },
    )
    on_collapse: str = field(
        default="warn",
        metadata={"help": "What to do when a pruning leaves a layer without any weight.", "choices": ON_COLLAPSE},
    )
    prune_modules: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: prune only the modules whose name matches one."}
    )
    skip_modules: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: leave the modules dense whose name matches one."}
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Stepped dense schedule: fractions of the dense phase, in (0, 1), at which the rate is multiplied "
            "by lr_gamma. In place of lr_scheduler_type."
        },
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of each milestone."})
    evaluate_prunings: bool = field(
        default=True,
        metadata={
            "help": "Evaluate (where there is an eval_dataset) before and after each pruning of bimp, and the last "
            "one of the other methods."
        },
    )

    def __post_init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            # Without it Transformers would train one model in each of torchrun's CPU processes, unaware of the others.
            self.use_cpu = True
        super().__post_init__()
        self.validate()

    def validate(self) -> None:
        """Checked again when the plan is made: hyperparameter search sets fields without `__post_init__`."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is none of {', '.join(METHODS)}.")
        self._refuse_foreign_knobs()
        check_rule(self.granularity, self.allocation, self.criterion)
        if self.on_collapse not in ON_COLLAPSE:
            raise ValueError(f"on_collapse={self.on_collapse!r} is none of {', '.join(ON_COLLAPSE)}.")
        METHODS[self.method].check(self)
        if METHODS[self.method].Arguments is not IMPArguments:
            self._validate_pruning_stable()
        self._validate_dense_phase()
        self._validate_setup()

    @property
    def knobs(self) -> dict:
        """The fields of the chosen method alone."""
        return {knob.name: getattr(self, knob.name) for knob in fields(METHODS[self.method].Arguments)}

    def _refuse_foreign_knobs(self) -> None:
        own = self.knobs
        for knob in {knob.name: knob for arguments in KNOBS for knob in fields(arguments)}.values():
            if knob.name not in own and getattr(self, knob.name) != knob.default:
                owners = [name for name, m in METHODS.items() if knob.name in {k.name for k in fields(m.Arguments)}]
                raise ValueError(
                    f"{knob.name}={getattr(self, knob.name)!r} is an argument of {', '.join(owners)}, not of "
                    f"method={self.method!r}. Leave it out (its default is {knob.default!r})."
                )
        if self.finetune_ratio and self.method in ("bimp", "dense"):
            raise ValueError(
                f"finetune_ratio={self.finetune_ratio} comes after a pruning-stable method; method={self.method!r} "
                "retrains by retrain_schedule ('ft' for fine-tuning). Leave it out."
            )

    def _validate_pruning_stable(self) -> None:
        method = METHODS[self.method]
        if method.implicit_sparsity and self.target_sparsity is not None:
            raise ValueError(
                f"method={self.method!r} finds its own sparsity, by {', '.join(self.knobs)} and weight_decay: leave "
                f"target_sparsity={self.target_sparsity} out."
            )
        if not method.implicit_sparsity:
            check_goal(self.target_sparsity)
        if self.allocation is not None and self.allocation not in method.allocations:
            raise ValueError(
                f"allocation={self.allocation!r} does not go with method={self.method!r}"
                f" (allowed: {', '.join(method.allocations) or 'none'}). Leave it out."
            )
        if not 0 <= self.finetune_ratio < 1:
            raise ValueError(f"finetune_ratio={self.finetune_ratio} must lie in [0, 1): it is a share of the budget.")
        if method.needs_weight_decay and not self.weight_decay > 0:
            raise ValueError(
                f"method={self.method!r} works by weight decay: set weight_decay, such as 5e-4 (given: "
                f"{self.weight_decay})."
            )
        if self.fp16 and not method.works_with_fp16:
            raise ValueError(
                f"method={self.method!r} ranks gradients or adds to them, and those of fp16 are scaled and, now and "
                "then, infinite. Use bf16."
            )

    def _validate_dense_phase(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive.")
        if self.lr_scheduler_type in METRIC_DRIVEN_SCHEDULERS:
            raise ValueError(
                f"lr_scheduler_type={str(self.lr_scheduler_type.value)!r} follows a metric, so the dense schedule "
                "that retraining refers to is not known in advance. Use linear, cosine, constant_with_warmup, ..."
            )
        if self.lr_milestones is not None:
            if not self.lr_milestones or not all(0 < milestone < 1 for milestone in self.lr_milestones):
                raise ValueError(f"lr_milestones={self.lr_milestones} must be fractions of the dense phase in (0, 1).")
            if self.lr_scheduler_type != SchedulerType.LINEAR:
                raise ValueError(
                    "lr_milestones is a schedule of its own: leave lr_scheduler_type out "
                    f"(given: {self.lr_scheduler_type.value})."
                )
        if not self.lr_gamma > 0:
            raise ValueError(f"lr_gamma={self.lr_gamma} must be positive.")

    def _validate_setup(self) -> None:
        if self.optim not in TESTED_OPTIMIZERS:
            raise ValueError(
                f"optim={OptimizerNames(self.optim).value!r} is not tested to keep pruned weights at zero. "
                f"Tested are: {', '.join(optimizer.value for optimizer in TESTED_OPTIMIZERS)}."
            )
        if self.deepspeed is not None or self.fsdp:
            raise ValueError(
                "DeepSpeed and FSDP are not supported: they keep or shard weights where a mask would not reach "
                "them. Use DDP (torchrun or accelerate launch with several processes)."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size starts over with the weights as they are, after a pruning even. Set "
                "per_device_train_batch_size (and gradient_accumulation_steps) instead."
            )


@dataclass
class BIMPSeq2SeqArguments(BIMPArguments, Seq2SeqTrainingArguments):
    """`BIMPArguments` with the generation options of `Seq2SeqTrainingArguments`."""
