"""What two stretches of one run must share beside its plan: data, batches, optimizer, precision, random numbers."""

from collections.abc import Mapping
from typing import Any

import datasets
import torch
from datasets.fingerprint import fingerprint_warnings
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

# Not the optimizer's: rates are the plan's, and these choose an implementation or are told apart by themselves.
_NOT_COMPARED = ("lr", "weight_decay", "foreach", "fused", "capturable", "differentiable")


def identity(
    args: TrainingArguments, data: Any, optimizer: torch.optim.Optimizer, precision: str | None
) -> dict[str, Any]:
    """By names that an error message can use; None for what is not known. `precision` is Accelerate's."""
    defaults = {name: value for name, value in optimizer.defaults.items() if name not in _NOT_COMPARED}
    return {
        "seed": args.seed,
        "data_seed": args.data_seed,
        "training items": len(data) if has_length(data) else None,
        "data fingerprint": _fingerprint(data),
        "batch size (all processes, accumulated)": (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        ),
        "optimizer": f"{type(optimizer).__name__}({_listed(defaults)})",
        "precision": precision,
        "weight_decay": sorted({group.get("weight_decay", 0.0) for group in optimizer.param_groups}),
    }


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(settings.items()) if not torch.is_tensor(value))


def _fingerprint(data: Any) -> str | None:
    """That of `datasets`, or of several by name; None where there is none, or it is another in each process."""
    if any(fingerprint_warnings.values()) or not datasets.is_caching_enabled():
        return None  # of a transform that cannot be hashed it is random
    if isinstance(data, Mapping):
        found = [f"{name}: {_fingerprint(part)}" for name, part in sorted(data.items())]
        return ", ".join(found)
    return getattr(data, "_fingerprint", None)
