"""The accuracy on the training set that acc_allr goes by: logits in any form of output, one class for each label."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

INSTEAD = "Use retrain_schedule='allr', which goes by the weights alone."


def resized(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (items, classes, h, w) at the height and width of `labels` (items, H, W): many models give a quarter."""
    if logits.shape[-2:] == labels.shape[-2:]:
        return logits
    return nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


def predicted_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class of each label, in the shape of `labels`.

    Logits are (items, classes), (items, tokens, classes), or for segmentation (items, classes, height, width), which
    are resized to the labels' height and width.
    """
    if labels.ndim < 3:
        return logits.argmax(-1)
    return resized(logits, labels).argmax(1)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if torch.is_tensor(outputs):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in [outputs.get("logits"), *outputs.values()]:
            yield from _tensors(value)
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from _tensors(value)


def _scores_classes(logits: Tensor, labels: Tensor) -> bool:
    """Whether each label has at least two scores in `logits`."""
    if labels.ndim >= 3:
        return logits.ndim == 4 and labels.ndim == 3 and len(logits) == len(labels) and logits.shape[1] > 1
    return logits.ndim == labels.ndim + 1 and logits.shape[:-1] == labels.shape and logits.shape[-1] > 1


def logits_of(outputs: Any, labels: Tensor) -> Tensor:
    """The first tensor in `outputs` (a tensor, or a mapping or tuple of them) that scores the classes of `labels`.

    Raises `ValueError` where there is none.
    """
    for tensor in _tensors(outputs):
        if tensor.is_floating_point() and _scores_classes(tensor, labels):
            return tensor
    shapes = [tuple(tensor.shape) for tensor in _tensors(outputs)]
    raise ValueError(
        f"retrain_schedule='acc_allr' measures the share of labels whose class is the likeliest, and no output of the "
        f"model scores two classes or more for each label: labels have shape {tuple(labels.shape)}, outputs {shapes}. "
        + INSTEAD
    )


def labels_of(inputs: Any, names: list[str]) -> Tensor:
    """The classes in a batch, under one of the trainer's label names. Raises `ValueError` where there are none."""
    found = [name for name in names if isinstance(inputs, Mapping) and torch.is_tensor(inputs.get(name))]
    if len(found) != 1:
        what = f"{' and '.join(found)} together" if found else f"a batch without {' or '.join(names) or 'labels'}"
        raise ValueError(
            f"retrain_schedule='acc_allr' measures an accuracy, for which it needs one tensor of classes in each "
            f"batch, and this task has {what}. {INSTEAD} Or name the labels with label_names."
        )
    labels = inputs[found[0]]
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim == 0:
        raise ValueError(
            f"retrain_schedule='acc_allr' measures an accuracy, and {found[0]} (shape {tuple(labels.shape)}, "
            f"{labels.dtype}) is no class for each prediction, as in a regression or with several labels an item. "
            + INSTEAD
        )
    return labels


@torch.no_grad()
def accuracy(
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    gather: Callable[[Tensor], Tensor],
    label_names: list[str],
    shifts_labels: bool,
) -> float:
    """Share of the labels (tokens, pixels) of all `batches` that the model gets right.

    `forward` gives the outputs of a batch, `gather` puts the rows of all processes together. Where `shifts_labels`, a
    position predicts the next label. Raises `ValueError` where labels are no classes, or no output scores them.
    """
    counts = torch.zeros(2, dtype=torch.int64)
    for inputs in batches:
        labels = labels_of(inputs, label_names)
        predictions = predicted_classes(logits_of(forward(inputs), labels), labels)
        if shifts_labels:
            predictions, labels = predictions[..., :-1], labels[..., 1:]
        counted = labels.ne(-100)
        # One row an item, so that the copies that fill up the last batch of some processes are dropped.
        rows = [(predictions.eq(labels) & counted).reshape(len(labels), -1), counted.reshape(len(labels), -1)]
        counts = gather(torch.stack([row.sum(1) for row in rows], 1)).sum(0) + counts.to(labels.device)
    right, total = counts.tolist()
    if not total:
        raise ValueError(f"retrain_schedule='acc_allr' finds no label on the training set but -100. {INSTEAD}")
    return right / total
