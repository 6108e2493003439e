"""What a BIMP run cannot work with, refused before any training."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Adafactor
from transformers.trainer_utils import _is_peft_model

# The classes behind arguments.TESTED_OPTIMIZERS, for optimizers that are passed by hand.
TESTED_CLASSES = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    Adafactor,
)


def check_model(model: nn.Module) -> None:
    if _is_peft_model(model):
        raise ValueError(
            "PEFT models are not supported: adapters are dense, so pruning the weights under them leaves the merged "
            "model dense. Merge first (model.merge_and_unload()) or train the base model."
        )


def check_scheduler(scheduler: LRScheduler | None) -> None:
    if scheduler is not None:
        raise ValueError(
            f"An lr_scheduler was passed by hand ({type(scheduler).__name__}), but the learning rate follows the "
            "plan. Pass optimizers=(optimizer, None) and describe the dense phase with lr_scheduler_type, "
            "warmup_steps and lr_scheduler_kwargs, or lr_milestones."
        )


def check_optimizer(optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer]) -> None:
    """Raises `ValueError` for an optimizer, or its class, that is not tested to leave pruned weights at zero."""
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    if cls not in TESTED_CLASSES:
        raise ValueError(
            f"{cls.__name__} is not tested to keep pruned weights at zero. Tested are: "
            f"{', '.join(c.__name__ for c in TESTED_CLASSES)}."
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


def check_devices(n_gpu: int, is_fsdp: bool, is_deepspeed: bool) -> None:
    if n_gpu > 1:
        raise ValueError(
            f"{n_gpu} GPUs in one process mean DataParallel, which is not supported. Start one process per GPU "
            "(accelerate launch or torchrun), or show one with CUDA_VISIBLE_DEVICES=0."
        )
    if is_fsdp or is_deepspeed:
        raise ValueError(
            "DeepSpeed and FSDP are not supported: they keep or shard weights where a mask would not reach them. "
            "Choose plain multi-GPU (DDP) in `accelerate config`."
        )
