"""What a BIMP run cannot work with, refused before any training, and what can go wrong at a pruning."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Adafactor
from transformers.trainer_utils import _is_peft_model
from transformers.utils import logging

from ..methods import LayerCollapseError, Pruning
from ..pruning.granularity import WeightRule
from ..pruning.masks import Masks
from ..reporting.flops import MultiplyAdds

logger = logging.get_logger(__name__)

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


def warn_of_unused(model: nn.Module, masks: Masks, counts: MultiplyAdds | None) -> None:
    """Warns of weights that are pruned although the model computes nothing with them: they hide in its sparsity."""
    # torch's attention uses the weight of this layer without calling it, so that nothing is counted for it.
    attention = {id(m.out_proj.weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    weights = {} if counts is None else masks.weights
    unused = [name for name, w in weights.items() if not counts.per_weight[name] and id(w) not in attention]
    if unused:
        share = sum(masks.weights[name].numel() for name in unused) / masks.num_weights
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        logger.warning(
            f"The model does not use {len(unused)} of its prunable weights ({share:.1%} of their elements): {shown}. "
            "They count in its sparsity all the same; skip_modules leaves them out."
        )


def check_ranks_agree(accelerator: Accelerator, masks: Masks, pruning: Pruning) -> None:
    """Raises `RuntimeError` where the processes did not prune the same weights."""
    if accelerator.num_processes == 1:
        return
    mine = torch.tensor([masks.checksum(), pruning.d1 or 0.0], dtype=torch.float64, device=accelerator.device)
    everyone = accelerator.gather(mine).view(-1, len(mine))
    if not torch.equal(everyone, mine.expand_as(everyone)):
        raise RuntimeError(
            f"The processes prune differently in cycle {pruning.cycle} (mask checksum, d1 by rank: "
            f"{everyone.tolist()}): their weights had drifted apart. Check that each process starts from the same "
            "weights and that nothing updates them outside of the optimizer."
        )


def report_collapse(masks: Masks, pruning: Pruning, on_collapse: str) -> None:
    """Warns of layers that a pruning left nothing of, or raises `LayerCollapseError` if `on_collapse` is "raise"."""
    if not (collapsed := masks.collapsed):
        return
    spread = "another allocation (uniform, erk), " if isinstance(masks.rule, WeightRule) else ""
    message = (
        f"Layer collapse: pruning {pruning.cycle} to {pruning.sparsity:.2%} left nothing of {', '.join(collapsed)}. "
        f"Use more cycles, a lower target_sparsity, {spread}or skip_modules."
    )
    if on_collapse == "raise":
        raise LayerCollapseError(message)
    logger.warning(message)
