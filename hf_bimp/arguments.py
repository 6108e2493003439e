"""Every knob of a BIMP run, as `TrainingArguments` with more fields."""

import os
from dataclasses import dataclass, field

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .allocation import ALLOCATIONS
from .methods.imp import check_schedule
from .plan import check_amount
from .rules import CRITERIA, check_rule, parse_n_of_m
from .schedules import RETRAIN_SCHEDULES

METHODS = ("bimp", "dense")
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
class BIMPArguments(TrainingArguments):
    """`TrainingArguments` of one budgeted run: a dense phase, then prune-retrain cycles.

    `num_train_epochs` or `max_steps` give the whole budget T. `learning_rate`, `lr_scheduler_type`, `warmup_steps` and
    `lr_scheduler_kwargs` describe the dense phase, over its own T0 steps. Raises `ValueError` for values that cannot
    work or do not go together.
    """

    method: str = field(
        default="bimp",
        metadata={
            "help": "'bimp' prunes; 'dense' trains densely to the end and records the history that a later run with "
            "dense_ratio=0 needs.",
            "choices": METHODS,
        },
    )
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Share of the prunable weights that are zero in the end, in (0, 1)."}
    )
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
    allocation: str | None = field(
        default=None,
        metadata={
            "help": "How pruned weights spread over the layers; by default one global threshold. Filters and n:m go "
            "by the same share of every layer instead.",
            "choices": ALLOCATIONS,
        },
    )
    criterion: str = field(
        default="magnitude",
        metadata={"help": "Which weights or filters go: the smallest, or random ones.", "choices": CRITERIA},
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
    keep_zeros: bool = field(
        default=False,
        metadata={"help": "The model is sparse already: its zeros stay zero, and its sparsity is S_0."},
    )
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Stepped dense schedule: fractions of the dense phase, in (0, 1), at which the rate is multiplied "
            "by lr_gamma. In place of lr_scheduler_type."
        },
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of each milestone."})
    dense_steps: int | None = field(
        default=None,
        metadata={
            "help": "With dense_ratio=0: T, the length in optimizer steps of the dense training that the given model "
            "had with this learning_rate, lr_scheduler_type and warmup_steps. By default it is read from the model's "
            "checkpoint, when hf_bimp wrote it."
        },
    )
    evaluate_prunings: bool = field(
        default=True,
        metadata={"help": "Evaluate before and after each pruning (where there is an eval_dataset)."},
    )

    def __post_init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            # Without it Transformers would train one model in each of torchrun's CPU processes, unaware of the others.
            self.use_cpu = True
        super().__post_init__()
        self.validate()

    def validate(self) -> None:
        """Checked again when the plan is made: hyperparameter search sets fields without `__post_init__`."""
        check_rule(self.granularity, self.allocation, self.criterion)
        if self.on_collapse not in ON_COLLAPSE:
            raise ValueError(f"on_collapse={self.on_collapse!r} is none of {', '.join(ON_COLLAPSE)}.")
        self._set_sparsity_of_pattern()
        self._validate_amount()
        check_schedule(self.retrain_schedule, self.retrain_learning_rate, self.retrain_warmup_ratio)
        self._validate_dense_phase()
        self._validate_setup()

    def _set_sparsity_of_pattern(self) -> None:
        """n:m fixes the sparsity."""
        pattern = parse_n_of_m(self.granularity)
        if pattern is None or self.method == "dense" or self.num_cycles == 0:
            return
        sparsity = 1 - pattern[0] / pattern[1]
        if self.target_sparsity is None:
            self.target_sparsity = sparsity
        if abs(self.target_sparsity - sparsity) > 1e-9:
            raise ValueError(
                f"granularity={self.granularity!r} fixes the sparsity at {sparsity:.4g}: leave target_sparsity out "
                f"(given: {self.target_sparsity})."
            )

    def _validate_amount(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is none of {', '.join(METHODS)}.")
        if self.method == "dense":
            if self.target_sparsity is not None or self.keep_zeros:
                raise ValueError("method='dense' prunes nothing: leave target_sparsity and keep_zeros out.")
            return
        if self.num_cycles is not None and self.prune_fraction is not None:
            raise ValueError(
                f"num_cycles={self.num_cycles} and prune_fraction={self.prune_fraction} each decide the number of "
                "cycles: give one of them."
            )
        if self.num_cycles == 0:
            if not self.keep_zeros or self.target_sparsity is not None:
                raise ValueError(
                    "num_cycles=0 prunes nothing: it goes with keep_zeros=True and without target_sparsity, to "
                    "fine-tune a sparse model. To prune, num_cycles must be at least 1."
                )
            return
        check_amount(self.target_sparsity, self.num_cycles, self.dense_ratio, self.prune_fraction)

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
        if self.dense_steps is not None and (
            self.dense_ratio > 0 or self.dense_steps < 1 or self.method == "dense" or self.num_cycles == 0
        ):
            raise ValueError(
                f"dense_steps={self.dense_steps} is the length of an earlier dense training, at least 1: it goes with "
                f"pruning and dense_ratio=0 (given: method={self.method!r}, num_cycles={self.num_cycles}, "
                f"dense_ratio={self.dense_ratio})."
            )

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
