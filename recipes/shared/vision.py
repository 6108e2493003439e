"""What the vision recipes share: loss, streamed metrics, batches and arguments."""

import inspect
from collections.abc import Callable

import evaluate
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel

from hf_bimp import BIMPArguments
from hf_bimp.trainer.train_accuracy import resized


def _named(module: nn.Module, inputs: tuple, output: Tensor | dict) -> dict[str, Tensor]:
    return {"logits": output} if torch.is_tensor(output) else output


def name_logits(model: nn.Module) -> nn.Module:
    """Has a model of timm or segmentation-models-pytorch return {"logits": ...}, as Trainer expects of models."""
    if not isinstance(model, PreTrainedModel):
        model.register_forward_hook(_named)
    return model


def input_name(model: nn.Module) -> str:
    """The keyword of the images."""
    return next(iter(inspect.signature(model.forward).parameters))


class CrossEntropy:
    """`compute_loss_func` for images and pixels; labels of -100 do not count, logits are resized to the labels."""

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: dict, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"].float()
        if labels.ndim == 3:
            logits = resized(logits, labels)
        total = nn.functional.cross_entropy(
            logits, labels, ignore_index=-100, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


class Streamed:
    """`compute_metrics` that adds up batch by batch (`batch_eval_metrics`), so no predictions pile up."""

    def __init__(self, metric: evaluate.Metric):
        self.metric = metric

    def __call__(self, evaluated: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.metric.add_batch(predictions=evaluated.predictions, references=evaluated.label_ids)
        return self.metric.compute() if compute_result else {}


class Collate:
    """Stacks items {"image": (C, H, W), "labels": class or (H, W)} into a batch under the model's input name.

    The images lie channels last in memory, in which layout convolutions run up to twice as fast.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        labels = torch.stack([torch.as_tensor(item["labels"]) for item in items])
        images = torch.stack([item["image"] for item in items]).contiguous(memory_format=torch.channels_last)
        return {self.name: images, "labels": labels}


class Transformed(torch.utils.data.Dataset):
    """A data set whose rows go through `transform` one by one, when asked for."""

    def __init__(self, rows, transform: Callable[[dict], dict]):
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.transform(self.rows[index])


def prepare_arguments(args: BIMPArguments) -> CrossEntropy:
    """Sets what these recipes need of the arguments; the loss, which takes over the label smoothing.

    Raises `ValueError` for arguments that the recipes cannot work with.
    """
    if args.dataloader_drop_last:
        raise ValueError("dataloader_drop_last would leave images out of evaluations too: remove it.")
    loss = CrossEntropy(args.label_smoothing_factor)
    args.label_smoothing_factor = 0.0  # Trainer's own expects language models
    args.label_names, args.batch_eval_metrics = ["labels"], True
    return loss
