"""Cross-entropy of whatever holds logits, over labels that are checked: a wrong loss is worse than none."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .train_accuracy import resized

OWN_LOSS = "Pass compute_loss_func=f, where f(outputs, labels, num_items_in_batch) is the loss that you mean."


class CrossEntropy:
    """`compute_loss_func` for classes of items, tokens or pixels: the mean over the labels of the accumulated batch.

    Logits, which the model returns bare or as the only or the "logits" entry of a mapping, are (items, classes),
    (items, tokens, classes) or (items, classes, height, width), which are resized to the labels' height and width.
    Labels are class numbers of as many dimensions less one; those of -100 do not count. `ValueError` for others.
    """

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = logits_of(outputs).float()
        check_labels(logits, labels)
        logits = resized(logits, labels) if labels.ndim == 3 else logits.movedim(-1, 1)
        total = nn.functional.cross_entropy(
            logits, labels.long(), ignore_index=-100, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or the "logits" or the only entry of a mapping.

    Raises `ValueError` where that is something else.
    """
    if isinstance(outputs, Mapping) and "loss" not in outputs:
        outputs = next(iter(outputs.values())) if len(outputs) == 1 else outputs.get("logits", outputs)
    if not torch.is_tensor(outputs):
        entries = f" of {', '.join(outputs)}" if isinstance(outputs, Mapping) else ""
        raise ValueError(
            f"The model returns a {type(outputs).__name__}{entries} in place of logits. {OWN_LOSS} An auxiliary head "
            "of torchvision's goes with aux_loss=False, aux_logits=False or model.aux_classifier = None."
        )
    return outputs


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raises `ValueError` for labels that are no classes of these logits: numbers to regress to, other shapes."""
    shapes = f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}"
    if labels.is_floating_point():
        raise ValueError(f"Cross-entropy takes class numbers, not labels of {labels.dtype} ({shapes}). {OWN_LOSS}")
    has_pixels = labels.ndim == 3 and logits.ndim == 4 and len(logits) == len(labels)
    if has_pixels:
        fits = logits.shape[2:] == labels.shape[1:] or logits.shape[:-1] != labels.shape  # else classes come last
    else:
        fits = logits.ndim > 1 and logits.shape[:-1] == labels.shape
    if not fits:
        raise ValueError(f"Cross-entropy takes a label an item, a token or a pixel, not {shapes}. {OWN_LOSS}")
    classes = logits.shape[1 if has_pixels else -1]
    if classes == 1:
        raise ValueError(f"The model has a single output ({shapes}), and cross-entropy takes one a class. {OWN_LOSS}")
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"Label {int(wrong[0])} is none of the model's classes, 0 to {classes - 1}. Build the model with more, or "
            "call what does not count -100."
        )
