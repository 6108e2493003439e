"""Accuracy and mean IoU, counted batch by batch."""

from abc import ABC, abstractmethod

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike


class CountingMetric(evaluate.Metric, ABC):
    """A metric that needs only counts: batches are counted as they come, and nothing is written or kept.

    Predictions and references are integers, a list, an array or a tensor of any one shape. References equal to
    `ignore_index` do not count, whatever was predicted there. `compute` gives the result of all batches since the
    last `compute` and starts afresh. Raises `ValueError` where shapes differ, values are no integers or nothing
    counts. Subclasses give `_start`, `_count` and `_result`.
    """

    def __init__(self, ignore_index: int = -100, **kwargs):
        super().__init__(**kwargs)
        if self.num_process != 1:
            raise ValueError(
                f"num_process={self.num_process}: the counts are those of one process. Gather predictions and "
                "references first, as the Trainer does, and leave num_process out."
            )
        self.ignore_index = ignore_index
        self._start()

    @abstractmethod
    def _start(self) -> None:
        """Sets all counts to zero."""

    @abstractmethod
    def _count(self, predictions: np.ndarray, references: np.ndarray) -> None:
        """Adds a batch (N,), int64, without what is ignored; changes nothing where it raises."""

    @abstractmethod
    def _result(self) -> dict[str, float]:
        """The metrics by name. Raises `ValueError` where nothing was counted."""

    # evaluate copies these three and appends to their docstrings, so each must have one.

    def add_batch(self, *, predictions: ArrayLike | None = None, references: ArrayLike | None = None) -> None:
        """Counts a batch."""
        predictions, references = _integers(predictions, "predictions"), _integers(references, "references")
        if predictions.shape != references.shape:
            raise ValueError(
                f"The predictions have shape {predictions.shape} and the references {references.shape}: "
                "give one class for each reference (the argmax of the logits, at the references' size)."
            )
        counted = references != self.ignore_index
        self._count(predictions[counted], references[counted])

    def add(self, *, prediction: ArrayLike | None = None, reference: ArrayLike | None = None) -> None:
        """Counts one example."""
        self.add_batch(predictions=prediction, references=reference)

    def compute(
        self, *, predictions: ArrayLike | None = None, references: ArrayLike | None = None
    ) -> dict[str, float]:
        """Counts the batch, if one is given, and finishes."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        result = self._result()
        self._start()
        return result

    def _nothing(self) -> ValueError:
        return ValueError(
            f"Nothing was counted: no batch was added, or every reference is ignore_index={self.ignore_index}. "
            "Add a batch that has other references before compute."
        )


class Accuracy(CountingMetric):
    """Share of right predictions: `{"accuracy": ...}` between 0 and 1."""

    def _info(self) -> evaluate.MetricInfo:
        return _info_of_classes("Share of predictions that equal the reference.")

    def _start(self) -> None:
        self._correct = self._total = 0

    def _count(self, predictions: np.ndarray, references: np.ndarray) -> None:
        self._correct += int((predictions == references).sum())
        self._total += references.size

    def _result(self) -> dict[str, float]:
        if not self._total:
            raise self._nothing()
        return {"accuracy": self._correct / self._total}


class MeanIoU(CountingMetric):
    """Mean intersection over union of segmentations: `{"miou": ..., "pixel_accuracy": ...}` between 0 and 1.

    All pixels of all batches make one confusion matrix. A class whose union is empty, being in no counted reference
    and no counted prediction, has no IoU and is left out of the mean, as usual in the field; a class only ever
    predicted has IoU 0 and stays in. `iou_per_class` lists the IoUs of the last `compute`, None where left out.
    Classes outside 0 ... `num_classes` - 1 raise `ValueError`.
    """

    def __init__(self, num_classes: int, ignore_index: int = -100, **kwargs):
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: give the number of classes, at least 1.")
        self.num_classes = num_classes
        self.iou_per_class: list[float | None] = []
        super().__init__(ignore_index, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return _info_of_classes("Mean intersection over union over the classes that occur, and pixel accuracy.")

    def _start(self) -> None:
        self._confusion = np.zeros((self.num_classes, self.num_classes), np.int64)  # references by predictions

    def _count(self, predictions: np.ndarray, references: np.ndarray) -> None:
        for name, classes in (("predictions", predictions), ("references", references)):
            wrong = classes[(classes < 0) | (classes >= self.num_classes)]
            if wrong.size:
                raise ValueError(
                    f"The {name} hold class {wrong[0]}, and the classes are 0 to {self.num_classes - 1} (references "
                    f"may be ignore_index={self.ignore_index} too): correct num_classes, ignore_index or the labels."
                )
        pairs = np.bincount(references * self.num_classes + predictions, minlength=self._confusion.size)
        self._confusion += pairs.reshape(self._confusion.shape)

    def _result(self) -> dict[str, float]:
        if not self._confusion.any():
            raise self._nothing()
        correct = self._confusion.diagonal()
        union = self._confusion.sum(axis=0) + self._confusion.sum(axis=1) - correct
        self.iou_per_class = [int(c) / int(u) if u else None for c, u in zip(correct, union, strict=True)]
        occurring = [iou for iou in self.iou_per_class if iou is not None]
        accuracy = int(correct.sum()) / int(self._confusion.sum())
        return {"miou": sum(occurring) / len(occurring), "pixel_accuracy": accuracy}


def _info_of_classes(description: str) -> evaluate.MetricInfo:
    classes = datasets.Value("int64")  # evaluate asks for features; the shape is free here
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions and references: integers of any one shape, a class each.",
        features=datasets.Features({"predictions": classes, "references": classes}),
    )


def _integers(values: ArrayLike | None, name: str) -> np.ndarray:
    """Lists, arrays and tensors (of any device) as int64."""
    if values is None:
        raise ValueError(f"There are no {name}: give predictions and references together.")
    if torch.is_tensor(values):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # NumPy knows no bfloat16
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iub":
        raise ValueError(f"The {name} are of type {array.dtype}: give integer classes, the argmax of logits.")
    return array.astype(np.int64)
