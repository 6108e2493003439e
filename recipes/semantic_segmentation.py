"""Prune a semantic segmentation model while training it: any of segmentation-models-pytorch or Transformers.

    accelerate launch recipes/semantic_segmentation.py  # offline: scikit-learn's digits, about 2 minutes
    accelerate launch recipes/semantic_segmentation.py recipes/configs/camvid_pspnet.yaml --dataset_name path/to/camvid
    accelerate launch --mixed_precision bf16 recipes/semantic_segmentation.py recipes/configs/cityscapes_pspnet.yaml

Any field of `BIMPArguments`, `DataArguments` or `ModelArguments` can be given in the file and overridden on the
command line; the optimizer is `optim` with `optim_args`. Metrics are taken at `image_size`.
"""

import json
import re
from dataclasses import dataclass, field

import segmentation_models_pytorch as smp
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    set_seed,
)

from hf_bimp import BIMPArguments, BIMPTrainer
from hf_bimp.metrics import MeanIoU
from hf_bimp.pruning.layers import PRUNABLE_MODULES
from hf_bimp.trainer.cross_entropy import logits_of
from hf_bimp.trainer.train_accuracy import predicted_classes
from shared.cli import parse
from shared.outcome import Task
from shared.segmentation_data import DataArguments, SegmentationTransform, load_segmentations
from shared.vision import Streamed, Transformed, collate, prepare_arguments

DEFAULT_CONFIG = "segmentation_sample.yaml"
METRIC = "miou"
LOCAL = "local-dir:"


@dataclass
class ModelArguments:
    """Which model to train: an architecture of segmentation-models-pytorch, or a checkpoint of Transformers."""

    smp_architecture: str | None = field(
        default=None,
        metadata={"help": "Class of segmentation_models_pytorch (PSPNet), or local-dir:FOLDER of a saved model."},
    )
    encoder_name: str = field(default="resnet18", metadata={"help": "Its encoder (backbone): resnet50, tu-convnext."})
    encoder_weights: str | None = field(
        default=None, metadata={"help": "Pretrained weights of the encoder: imagenet. By default none."}
    )
    model_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'More arguments of smp.create_model, as JSON: {"psp_dropout": 0.1}.'}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "In its place: a checkpoint for AutoModelForSemanticSegmentation."}
    )
    config_only: bool = field(
        default=False, metadata={"help": "Take only the checkpoint's configuration: train from scratch."}
    )

    def __post_init__(self):
        if isinstance(self.model_kwargs, str):
            self.model_kwargs = json.loads(self.model_kwargs)
        if (self.smp_architecture is None) == (self.model_name_or_path is None):
            raise ValueError(
                "Give either smp_architecture or model_name_or_path "
                f"(given: {self.smp_architecture}, {self.model_name_or_path})."
            )


ARGUMENTS = (DataArguments, ModelArguments, BIMPArguments)


def build_model(args: ModelArguments, classes: int) -> nn.Module:
    if args.smp_architecture is not None:
        if args.smp_architecture.startswith(LOCAL):
            folder = args.smp_architecture.removeprefix(LOCAL)
            # The folder has all weights: the encoder's pretrained ones must not be downloaded first.
            model = smp.from_pretrained(folder, encoder_weights=None, classes=classes)
        else:
            model = smp.create_model(
                args.smp_architecture,
                args.encoder_name,
                encoder_weights=args.encoder_weights,
                classes=classes,
                **(args.model_kwargs or {}),
            )
        return model
    if args.config_only:
        config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=classes)
        return AutoModelForSemanticSegmentation.from_config(config)
    return AutoModelForSemanticSegmentation.from_pretrained(
        args.model_name_or_path, num_labels=classes, ignore_mismatched_sizes=True
    )


def input_statistics(args: ModelArguments, processor: BaseImageProcessor | None) -> tuple[tuple, tuple]:
    """Mean and standard deviation that the model expects: those of its pretraining, by default ImageNet's."""
    mean, std = None, None
    if processor is not None:
        mean, std = processor.image_mean, processor.image_std
    elif args.encoder_weights is not None:  # asks the Hub, as the weights do
        expected = smp.encoders.get_preprocessing_params(args.encoder_name, args.encoder_weights)
        mean, std = expected["mean"], expected["std"]
    return tuple(mean or IMAGENET_DEFAULT_MEAN), tuple(std or IMAGENET_DEFAULT_STD)


def freeze_unused(model: nn.Module, size: list[int]) -> list[str]:
    """Freezes what no gradient reaches; the patterns for `skip_modules` of these layers.

    segmentation-models-pytorch builds all stages of an encoder, also those beyond `encoder_depth`: most weights of a
    PSPNet with encoder_depth=3. Pruned, they would pass for sparsity.
    """
    parameters = dict(model.named_parameters())
    logits = logits_of(model.eval()(torch.zeros(1, 3, *size)))
    gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad_(False)
    layers = [name for name, module in model.named_modules() if isinstance(module, PRUNABLE_MODULES)]
    return [f"^{re.escape(layer)}$" for layer in layers if f"{layer}.weight" in unused]


def build_used(args: ModelArguments, data_args: DataArguments) -> tuple[nn.Module, list[str]]:
    """The model, and what `freeze_unused` gives of it."""
    model = build_model(args, data_args.num_classes)
    return model, freeze_unused(model, data_args.crop_size or data_args.image_size)


def build_task(
    data_args: DataArguments, model_args: ModelArguments, args: BIMPArguments, restarts: bool = False
) -> Task:
    """The whole task; with `restarts` every `train()` starts from a new model, as hyperparameter search wants it."""
    loss = prepare_arguments(args)
    set_seed(args.seed)
    data = load_segmentations(data_args)
    if len(data["train"]) % args.train_batch_size == 1:  # DeepLabV3's pooling cannot be normalised over one image
        data["train"] = data["train"].select(range(len(data["train"]) - 1))
    model, unused = build_used(model_args, data_args)
    if unused:
        args.skip_modules = [*(args.skip_modules or ()), *unused]
    name = model_args.model_name_or_path
    processor = None if name is None else AutoImageProcessor.from_pretrained(name)
    statistics = input_statistics(model_args, processor)
    sets = {
        split: Transformed(rows, SegmentationTransform(data_args, *statistics, training=split == "train"))
        for split, rows in data.items()
    }
    trainer = BIMPTrainer(
        **({"model_init": lambda: build_used(model_args, data_args)[0]} if restarts else {"model": model}),
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=loss,
        compute_metrics=Streamed(MeanIoU(data_args.num_classes)),
        preprocess_logits_for_metrics=predicted_classes,
    )
    card = {
        "tasks": "image-segmentation",
        "dataset": data_args.dataset_name or "scikit-learn digits",
        "finetuned_from": model_args.model_name_or_path,
    }
    return Task(trainer, sets.get("test"), METRIC, card)


def main() -> None:
    data_args, model_args, args = parse(ARGUMENTS, DEFAULT_CONFIG)
    if data_args.dataset_name is None and args.should_log:
        print("Using scikit-learn's digits, offline. To prune PSPNet on CityScapes, run:")
        print("    accelerate launch recipes/semantic_segmentation.py recipes/configs/cityscapes_pspnet.yaml")
    build_task(data_args, model_args, args).run()


if __name__ == "__main__":
    main()
