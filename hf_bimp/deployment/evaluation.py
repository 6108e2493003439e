"""Metrics of a model in torch and of its export, on the same batches."""

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_concat
from transformers.utils.logging import tqdm

from .inputs import Batches, Tensors

Run = Callable[[Tensors], list[Tensor]]


class Evaluation:
    """Data and `compute_metrics`, as Trainer has it. Raises `ValueError` for data that are empty or have no labels."""

    def __init__(self, batches: Batches, compute_metrics: Callable[[EvalPrediction], dict[str, Any]]):
        rest = iter(batches)
        first = next(rest, None)
        if first is None:
            raise ValueError("eval_dataset is empty: give at least one batch.")
        if first[1] is None:
            raise ValueError(
                "eval_dataset has no labels for compute_metrics. Call the column 'labels', or give tuples whose last "
                "entry they are."
            )
        self.batches, self.compute_metrics = itertools.chain([first], rest), compute_metrics
        self.count = len(batches)

    def metrics(self, *runs: Run) -> list[dict[str, Any]]:
        """Those of each of `runs`, in one pass over the data."""
        predictions: list[Any] = [None] * len(runs)
        labels: Any = None
        for inputs, own in tqdm(self.batches, total=self.count or None, unit="batch", desc="metrics", leave=False):
            labels = own if labels is None else nested_concat(labels, own, padding_index=-100)
            for i, run in enumerate(runs):
                found = tuple(output.numpy() for output in run(inputs))
                outputs = found if len(found) > 1 else found[0]
                before = predictions[i]
                predictions[i] = outputs if before is None else nested_concat(before, outputs, padding_index=-100)
        return [dict(self.compute_metrics(EvalPrediction(found, labels))) for found in predictions]
