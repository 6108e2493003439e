"""What a run cannot work with, refused before any training; each limit stands here once."""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Adafactor
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .methods.settings import checked

NUMBERS = {int, float, bool}

# What torch and Transformers alone provide on any device. Each is tested to leave pruned weights at zero.
TESTED_OPTIMIZERS: dict[OptimizerNames, type[torch.optim.Optimizer]] = {
    OptimizerNames.ADAMW_TORCH: torch.optim.AdamW,
    OptimizerNames.ADAMW_TORCH_FUSED: torch.optim.AdamW,
    OptimizerNames.ADAFACTOR: Adafactor,
    OptimizerNames.SGD: torch.optim.SGD,
    OptimizerNames.ADAGRAD: torch.optim.Adagrad,
    OptimizerNames.RMSPROP: torch.optim.RMSprop,
}
_TESTED_CLASSES = tuple(dict.fromkeys([*TESTED_OPTIMIZERS.values(), torch.optim.Adam]))
# They wait for a metric, so that the rate of a step is unknown until it comes.
METRIC_DRIVEN_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def check_types(arguments: Any, declared: type) -> None:
    """Raises `ValueError` for a field of the dataclass `declared` that is not of its type, or a number not finite."""
    hints = get_type_hints(declared, include_extras=True)
    for field in fields(declared):
        checked(field.name, getattr(arguments, field.name), hints[field.name])


def check_numbers(arguments: Any, declared: type) -> None:
    """As `check_types`, for the numbers and flags alone, where they are not None.

    `TrainingArguments` compares them without looking: a file gives texts for numbers, and infinities.
    """
    hints = get_type_hints(declared)
    for field in fields(declared):
        hint, value = hints[field.name], getattr(arguments, field.name)
        kinds = {hint} if hint in NUMBERS else set(get_args(hint)) - {type(None)}
        if kinds and kinds <= NUMBERS and value is not None:
            checked(field.name, value, hint)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}={getattr(arguments, name)} must be at least 1.")


def check_optimizer_name(name: OptimizerNames | str) -> None:
    """Raises `ValueError` for an argument `optim` that is not tested to leave pruned weights at zero."""
    if name not in TESTED_OPTIMIZERS:
        raise ValueError(
            f"optim={OptimizerNames(name).value!r} is not tested to keep pruned weights at zero. "
            f"Tested are: {', '.join(optimizer.value for optimizer in TESTED_OPTIMIZERS)}."
        )


def check_optimizer(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> None:
    """Raises `ValueError` for an optimizer, or its class, that is not tested to leave pruned weights at zero."""
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    if cls not in _TESTED_CLASSES:
        raise ValueError(
            f"{cls.__name__} is not tested to keep pruned weights at zero. Tested are: "
            f"{', '.join(c.__name__ for c in _TESTED_CLASSES)}."
        )
    groups = [] if isinstance(optimizer, type) else optimizer.param_groups
    if any(group.get("eps") == 0 for group in groups):
        raise ValueError(
            f"{cls.__name__} with eps=0 divides 0 by 0 at every pruned weight. Pass a positive eps, such as 1e-8."
        )
    if any(group["lr"] is None for group in groups):
        raise ValueError(
            f"{cls.__name__} sets its own learning rate (lr=None), but the plan does. Pass a rate, and for Adafactor "
            "relative_step=False."
        )


def check_scheduler_type(kind: SchedulerType) -> None:
    """Raises `ValueError` for an argument `lr_scheduler_type` whose rates are not known in advance."""
    if kind in METRIC_DRIVEN_SCHEDULERS:
        raise ValueError(
            f"lr_scheduler_type={str(kind.value)!r} follows a metric, so the dense schedule that retraining refers to "
            "is not known in advance. Use linear, cosine, constant_with_warmup, ..."
        )


def check_scheduler(scheduler: LRScheduler | None) -> None:
    """Raises `ValueError` for a scheduler that was passed by hand."""
    if scheduler is not None:
        raise ValueError(
            f"An lr_scheduler was passed by hand ({type(scheduler).__name__}), but the learning rate follows the "
            "plan. Pass optimizers=(optimizer, None) and describe the dense phase with lr_scheduler_type, "
            "warmup_steps and lr_scheduler_kwargs, or lr_milestones."
        )


def check_sharding(is_fsdp: bool, is_deepspeed: bool) -> None:
    """Raises `ValueError` where weights would be sharded, or kept in a second copy."""
    if is_fsdp or is_deepspeed:
        raise ValueError(
            "DeepSpeed and FSDP are not supported: they keep or shard weights where a mask would not reach them. "
            "Use DDP: plain multi-GPU in `accelerate config`, or torchrun with several processes."
        )


def check_devices(n_gpu: int) -> None:
    """Raises `ValueError` for several GPUs in one process."""
    if n_gpu > 1:
        raise ValueError(
            f"{n_gpu} GPUs in one process mean DataParallel, which is not supported. Start one process per GPU "
            "(accelerate launch or torchrun), or show one with CUDA_VISIBLE_DEVICES=0."
        )


def check_model(model: nn.Module) -> None:
    """Raises `ValueError` for a model that masks would not make sparse: one with adapters, however they came in."""
    found = next((name for name, module in model.named_modules() if _is_of_peft(module)), None)
    if found is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"PEFT models are not supported, and {found or 'the model'} has adapters: they are dense and saved alone, "
            "so pruning the weights under them leaves the merged model dense. Merge first "
            "(model.merge_and_unload()) or train the base model without adapters."
        )


def _is_of_peft(module: nn.Module) -> bool:
    """By the name of the package: it need not be installed."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)
