"""What the vision recipes share: streamed metrics, batches and arguments."""

from collections.abc import Callable

import evaluate
import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_bimp import BIMPArguments, CrossEntropy


class Streamed:
    """`compute_metrics` that adds up batch by batch (`batch_eval_metrics`), so no predictions pile up."""

    def __init__(self, metric: evaluate.Metric):
        self.metric = metric

    def __call__(self, evaluated: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.metric.add_batch(predictions=evaluated.predictions, references=evaluated.label_ids)
        return self.metric.compute() if compute_result else {}


def collate(items: list[dict]) -> dict[str, Tensor]:
    """Stacks items {"image": (C, H, W), "labels": class or (H, W)} into a batch, as Transformers' models name it.

    The images lie channels last in memory, in which layout convolutions run up to twice as fast.
    """
    labels = torch.stack([torch.as_tensor(item["labels"]) for item in items])
    images = torch.stack([item["image"] for item in items]).contiguous(memory_format=torch.channels_last)
    return {"pixel_values": images, "labels": labels}


class Transformed(torch.utils.data.Dataset):
    """A data set whose rows go through `transform` one by one, when asked for."""

    def __init__(self, rows, transform: Callable[[dict], dict]):
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.transform(self.rows[index])


def prepare_arguments(args: BIMPArguments) -> CrossEntropy:
    """Sets what these recipes need of the arguments; the loss of all models.

    Transformers' own for segmentation has another label that does not count. Raises `ValueError` for arguments that
    the recipes cannot work with.
    """
    if args.dataloader_drop_last:
        raise ValueError("dataloader_drop_last would leave images out of evaluations too: remove it.")
    args.label_names, args.batch_eval_metrics = ["labels"], True
    return CrossEntropy(args.label_smoothing_factor)
