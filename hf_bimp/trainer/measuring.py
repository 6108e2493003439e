"""Measuring a model in the middle of a run, from plain values and callables."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers.utils import logging

from ..reporting.flops import MultiplyAdds, count_multiply_adds

logger = logging.get_logger(__name__)


def check_readable_twice(data: Dataset) -> None:
    """Raises `ValueError` for data whose first items training would go without, once they have been looked at."""
    if isinstance(data, IterableDataset) and iter(data) is data:
        raise ValueError(
            "granularity='filter' traces the model with the first training items, and this data set gives every item "
            "only once. Use one that starts over when iterated again, such as a datasets.IterableDataset."
        )


def first_items(inputs: dict[str, Any], items: int = 2) -> dict[str, Any]:
    """The first items of a batch."""
    return {name: value[:items] if torch.is_tensor(value) else value for name, value in inputs.items()}


def try_to_count(model: nn.Module, inputs: dict[str, Any]) -> MultiplyAdds | None:
    """Multiply-adds of one pass over `inputs`; None, with a warning, where a model defies counting."""
    try:
        return count_multiply_adds(model, inputs)
    except Exception as error:  # any model's code runs here, and a measure alone must not end a training
        logger.warning(f"No theoretical speedup will be reported, multiply-adds cannot be counted: {error!r}")
        return None


def predicted_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class of each label, in the shape of `labels`.

    Logits are (items, classes), (items, tokens, classes), or for segmentation (items, classes, height, width), which
    are resized to the labels' height and width.
    """
    if labels.ndim < 3:
        return logits.argmax(-1)
    return resized(logits, labels).argmax(1)


def resized(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (items, classes, h, w) at the height and width of `labels` (items, H, W): many models give a quarter."""
    if logits.shape[-2:] == labels.shape[-2:]:
        return logits
    return nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def accuracy(
    batches: Iterable[dict[str, Any]],
    forward: Callable[[dict[str, Any]], Any],
    gather: Callable[[Tensor], Tensor],
    shifts_labels: bool,
) -> float:
    """Share of the labels (tokens, pixels) of all `batches` that the model gets right.

    `forward` gives the outputs of a batch, `gather` puts the rows of all processes together. Where `shifts_labels`, a
    position predicts the next label.
    """
    counts = torch.zeros(2, dtype=torch.int64)
    for inputs in batches:
        labels, outputs = inputs["labels"], forward(inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        predictions = predicted_classes(logits, labels)
        if shifts_labels:
            predictions, labels = predictions[..., :-1], labels[..., 1:]
        counted = labels.ne(-100)
        # One row an item, so that the copies that fill up the last batch of some processes are dropped.
        rows = [(predictions.eq(labels) & counted).reshape(len(labels), -1), counted.reshape(len(labels), -1)]
        counts = gather(torch.stack([row.sum(1) for row in rows], 1)).sum(0) + counts.to(labels.device)
    right, total = counts.tolist()
    return right / total
