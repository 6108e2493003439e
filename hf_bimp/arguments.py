"""Every argument of a run, as `TrainingArguments` with more fields."""

import os
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.trainer_utils import SchedulerType

from . import support
from .methods import METHODS, BIMPConfig, Method, make_config, method_named, parse_mapping, setting_names
from .methods.cs import CSConfig
from .methods.dpf import DPFConfig
from .methods.dst import DSTConfig
from .methods.gmp import GMPConfig
from .methods.str import STRConfig
from .pruning.allocation import ALLOCATIONS
from .pruning.criteria import criterion_named
from .pruning.granularity import check_rule, kind_of, parse_n_of_m
from .schedules.plan import Budget, check_goal

__all__ = ["TESTED_OPTIMIZERS", "BIMPArguments", "BIMPArgumentsMixin", "BIMPSeq2SeqArguments"]

TESTED_OPTIMIZERS = support.TESTED_OPTIMIZERS
# Their fields are arguments of their own; the settings of all other methods come as `method_config`.
FLAT_CONFIGS = (BIMPConfig, GMPConfig, DPFConfig, CSConfig, STRConfig, DSTConfig)
ON_COLLAPSE = ("warn", "raise")


@dataclass
class BIMPArgumentsMixin(*FLAT_CONFIGS):
    """The arguments of one budgeted run, to put before any subclass of `TrainingArguments`.

    `num_train_epochs` or `max_steps` give the whole budget T. `learning_rate`, `lr_scheduler_type`, `warmup_steps` and
    `lr_scheduler_kwargs` describe the dense phase, over its own T0 steps; for the methods without one, all steps but
    those of `finetune_ratio`. Raises `ValueError` for values that cannot work or do not go together.

        @dataclass
        class SparseSFTConfig(BIMPArgumentsMixin, SFTConfig): ...
    """

    method: str = field(
        default="bimp",
        metadata={
            "help": "'bimp' trains, prunes and retrains; 'dense' only trains, and records the history that later runs "
            "with dense_ratio=0 need; the others, and those that you register, train through their prunings."
        },
    )
    method_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Settings of a method that has no arguments of its own, such as '{\"interval\": 50}'."},
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
    granularity: str = field(
        default="weight",
        metadata={
            "help": "What is removed: 'weight'; 'filter' (whole output filters and attention heads, the same share of "
            "each layer's, by L2 norm); or 'n:m' such as 2:4 (of m consecutive inputs n stay: a sparsity of 1 - n/m)."
        },
    )
    allocation: str | None = field(
        default=None,
        metadata={
            "help": "How pruned weights spread over the layers; by default as the method has it, mostly by one global "
            "threshold. Filters and n:m go by the same share of every layer instead.",
            "choices": ALLOCATIONS,
        },
    )
    criterion: str | None = field(
        default=None,
        metadata={
            "help": "Which weights or filters go: those of the smallest 'magnitude' (the default of most methods), "
            "'taylor' score or 'movement', 'random' ones, or by a criterion that you register."
        },
    )
    keep_zeros: bool = field(
        default=False,
        metadata={"help": "The model is sparse already: its zeros stay zero, and its sparsity is S_0."},
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
        metadata={"help": "Evaluate before and after the prunings of bimp (100 where there are more), others' last."},
    )
    measure_deployment: bool = field(
        default=True, metadata={"help": "On the CPU, up to 300 M weights: measure at the end what the zeros save."}
    )

    def __post_init__(self):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
            # Without it Transformers would train one model in each of torchrun's CPU processes, unaware of the others.
            self.use_cpu = True
        if isinstance(self.granularity, int) and not isinstance(self.granularity, bool):
            # YAML 1.1 reads an unquoted 2:4 as minutes and seconds, 124.
            self.granularity = "{}:{}".format(*divmod(self.granularity, 60))
        support.check_numbers(self, TrainingArguments)
        super().__post_init__()
        if isinstance(self.method_config, str):
            self.method_config = parse_mapping(self.method_config)
        support.check_types(self, BIMPArgumentsMixin)
        self.target_sparsity = self.goal
        self.validate()

    # ---- What they say together ----

    @property
    def method_class(self) -> type[Method]:
        return method_named(self.method)

    @property
    def method_settings(self) -> Any:
        """The `Config` of the chosen method."""
        method = self.method_class
        if method.Config in FLAT_CONFIGS:
            return method.Config(**{name: getattr(self, name) for name in setting_names(method)})
        return make_config(method, cast(dict, self.method_config or {}))

    @property
    def goal(self) -> float | None:
        """The sparsity to reach: n:m fixes it."""
        pattern = parse_n_of_m(self.granularity)
        if pattern is None or self.target_sparsity is not None:
            return self.target_sparsity
        return 1 - pattern[0] / pattern[1] if self.method_class.prunes(self.method_settings) else None

    @property
    def resolved_allocation(self) -> str:
        if kind_of(self.granularity) != "weight":
            return "uniform"
        return self.allocation or next(iter(self.method_class.traits.allocations), "global")

    @property
    def resolved_criterion(self) -> str:
        return self.criterion or (self.method_class.traits.criteria or ("magnitude",))[0]

    def budget(self, total_steps: int | None = None, initial_sparsity: float = 0.0) -> Budget:
        return Budget(total_steps, self.goal, initial_sparsity, self.keep_zeros, self.finetune_ratio)

    # ---- Whether they work ----

    def validate(self) -> None:
        """Checked again when the plan is made: hyperparameter search sets fields without `__post_init__`."""
        support.check_types(self, BIMPArgumentsMixin)
        method = self.method_class
        self._refuse_foreign_settings()
        check_rule(self.granularity, self.allocation, self.resolved_criterion)
        if self.on_collapse not in ON_COLLAPSE:
            raise ValueError(f"on_collapse={self.on_collapse!r} is none of {', '.join(ON_COLLAPSE)}.")
        settings = self.method_settings
        self._check_goal(settings)
        method.check(settings, self.budget())
        self._check_traits()
        self._check_schedule(settings)
        support.check_optimizer_name(self.optim)
        support.check_sharding(bool(self.fsdp), self.deepspeed is not None)
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size starts over with the weights as they are, after a pruning even. Set "
                "per_device_train_batch_size (and gradient_accumulation_steps) instead."
            )

    def _refuse_foreign_settings(self) -> None:
        config = self.method_class.Config
        own = setting_names(self.method_class) if config in FLAT_CONFIGS else ()
        for setting in {setting.name: setting for flat in FLAT_CONFIGS for setting in fields(flat)}.values():
            if setting.name not in own and getattr(self, setting.name) != setting.default:
                owners = [
                    name
                    for name, m in METHODS.items()
                    if m.Config in FLAT_CONFIGS and setting.name in setting_names(m)
                ]
                raise ValueError(
                    f"{setting.name}={getattr(self, setting.name)!r} is an argument of {', '.join(owners)}, not of "
                    f"method={self.method!r}. Leave it out (its default is {setting.default!r})."
                )
        if self.method_config and config in FLAT_CONFIGS:
            raise ValueError(
                f"method_config={self.method_config!r}: the settings of method={self.method!r} are arguments of their "
                f"own: {', '.join(own)}."
            )

    def _check_goal(self, settings: Any) -> None:
        pattern = parse_n_of_m(self.granularity)
        fixed = 1 - pattern[0] / pattern[1] if pattern else None
        if self.method_class.traits.finds_sparsity and self.target_sparsity is not None:
            raise ValueError(
                f"method={self.method!r} finds its own sparsity, by {', '.join(setting_names(self.method_class))} and "
                f"weight_decay: leave target_sparsity={self.target_sparsity} out."
            )
        if not self.method_class.prunes(settings):
            return
        check_goal(self.goal)
        if fixed is not None and abs(self.goal - fixed) > 1e-9:
            raise ValueError(
                f"granularity={self.granularity!r} fixes the sparsity at {fixed:.4g}: leave target_sparsity out "
                f"(given: {self.target_sparsity})."
            )

    def _check_traits(self) -> None:
        traits = self.method_class.traits
        self._check_among("granularity", kind_of(self.granularity), traits.granularities)
        if self.allocation is not None:
            self._check_among("allocation", self.allocation, traits.allocations)
        if traits.criteria is not None:
            self._check_among("criterion", self.resolved_criterion, traits.criteria)
        if self.keep_zeros and not traits.keeps_zeros:
            raise ValueError(
                f"keep_zeros=True does not go with method={self.method!r}, which chooses its zeros anew. Leave it "
                "out, or use method='bimp'."
            )
        if self.finetune_ratio and traits.has_dense_phase:
            raise ValueError(
                f"finetune_ratio={self.finetune_ratio} comes after a pruning-stable method; method={self.method!r} "
                "retrains by retrain_schedule ('ft' for fine-tuning). Leave it out."
            )
        if not 0 <= self.finetune_ratio < 1:
            raise ValueError(f"finetune_ratio={self.finetune_ratio} must lie in [0, 1): it is a share of the budget.")
        if traits.needs_weight_decay and not self.weight_decay > 0:
            raise ValueError(
                f"method={self.method!r} works by weight decay: set weight_decay, such as 5e-4 (given: "
                f"{self.weight_decay})."
            )
        by_gradients = criterion_named(self.resolved_criterion).accumulate is not None
        if self.fp16 and (by_gradients or not traits.works_with_fp16):
            what = f"criterion={self.resolved_criterion!r}" if by_gradients else f"method={self.method!r}"
            raise ValueError(
                f"{what} ranks gradients or adds to them, and those of fp16 are scaled and, now and then, infinite. "
                "Use bf16."
            )

    def _check_among(self, argument: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(
                f"{argument}={value!r} does not go with method={self.method!r}"
                f" (allowed: {', '.join(allowed) or 'none'}). Leave it out."
            )

    def _check_schedule(self, settings: Any) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive.")
        support.check_scheduler_type(self.lr_scheduler_type)
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
        own = self.method_class.dense_schedule(settings)
        if own is not None and (
            self.lr_scheduler_type != SchedulerType.LINEAR or (self.lr_milestones and "lr_milestones" not in own)
        ):
            raise ValueError(
                f"method={self.method!r} has a learning rate of its own, by {settings}: leave lr_scheduler_type out "
                f"(given: {self.lr_scheduler_type.value}), and lr_milestones where its schedule is not stepped."
            )


@dataclass
class BIMPArguments(BIMPArgumentsMixin, TrainingArguments):
    __doc__ = BIMPArgumentsMixin.__doc__


@dataclass
class BIMPSeq2SeqArguments(BIMPArguments, Seq2SeqTrainingArguments):
    """`BIMPArguments` with the generation options of `Seq2SeqTrainingArguments`."""
