"""What can go wrong at a pruning, and what is worth a warning before the first one."""

import torch
from accelerate import Accelerator
from transformers.utils import logging

from ..methods import LayerCollapseError, Pruning
from ..pruning.granularity import WeightRule
from ..pruning.masks import Masks
from ..reporting.flops import MultiplyAdds

logger = logging.get_logger(__name__)


def warn_of_unused(masks: Masks, counts: MultiplyAdds | None) -> None:
    """Warns of weights that are pruned although the model computes nothing with them: they hide in its sparsity."""
    unused = [] if counts is None else [name for name in masks.weights if name not in counts.used]
    if unused:
        share = sum(masks.weights[name].numel() for name in unused) / masks.num_weights
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        logger.warning(
            f"The model does not use {len(unused)} of its prunable weights ({share:.1%} of their elements): {shown}. "
            "No operation of a pass over the first training items reads them, so their layers are not called there. "
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
