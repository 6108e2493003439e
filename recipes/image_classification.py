"""Prune an image classifier while training it: any model of timm or Transformers, and the paper's CIFAR models.

    accelerate launch recipes/image_classification.py  # offline: scikit-learn's digits, under 2 minutes
    accelerate launch recipes/image_classification.py recipes/configs/cifar10_resnet56.yaml
    accelerate launch --mixed_precision bf16 recipes/image_classification.py recipes/configs/imagenet_resnet50.yaml

Any field of `BIMPArguments`, `DataArguments` or `ModelArguments` can be given in the file and overridden on the
command line; the optimizer is `optim` with `optim_args`.
"""

import json
from dataclasses import dataclass, field

import timm
from timm.data import resolve_model_data_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    set_seed,
)

import hf_bimp.models  # noqa: F401, registers cifar_resnet56 and the like with timm
from hf_bimp import BIMPArguments, BIMPTrainer
from hf_bimp.metrics import Accuracy
from hf_bimp.trainer.train_accuracy import predicted_classes
from shared.cli import parse
from shared.image_data import DataArguments, ImageTransform, load_images, num_classes
from shared.outcome import Task
from shared.vision import Streamed, Transformed, collate, prepare_arguments

DEFAULT_CONFIG = "digits_resnet20.yaml"
METRIC = "accuracy"


@dataclass
class ModelArguments:
    """Which model to train: one of timm's by its name, or a checkpoint of Transformers."""

    timm_model: str | None = field(
        default=None,
        metadata={"help": "Name in timm (resnet50, cifar_resnet56), or local-dir:FOLDER of a saved one."},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "In its place: a checkpoint for AutoModelForImageClassification."}
    )
    config_only: bool = field(
        default=False, metadata={"help": "Take only the checkpoint's configuration: train from scratch."}
    )
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's pretrained weights."})
    model_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'More arguments of timm.create_model, as JSON: {"drop_path_rate": 0.1}.'}
    )
    channels: int = field(default=3, metadata={"help": "Of the images: 3, or 1 for grey ones."})
    image_size: int | None = field(default=None, metadata={"help": "Height and width; by default the model's."})

    def __post_init__(self):
        if isinstance(self.model_kwargs, str):
            self.model_kwargs = json.loads(self.model_kwargs)
        if (self.timm_model is None) == (self.model_name_or_path is None):
            raise ValueError(
                f"Give either timm_model or model_name_or_path (given: {self.timm_model}, {self.model_name_or_path})."
            )


ARGUMENTS = (DataArguments, ModelArguments, BIMPArguments)


def build_model(args: ModelArguments, classes: int) -> nn.Module:
    if args.timm_model is not None:
        pretrained = args.pretrained or args.timm_model.startswith("local-dir:")
        return timm.create_model(
            args.timm_model,
            pretrained=pretrained,
            num_classes=classes,
            in_chans=args.channels,
            **(args.model_kwargs or {}),
        )
    config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=classes)
    if isinstance(config, TimmWrapperConfig) and config.model_args:
        # timm writes the number of classes among the arguments too, and Transformers would give it twice.
        config.model_args = {name: value for name, value in config.model_args.items() if name != "num_classes"}
    if args.config_only:
        return AutoModelForImageClassification.from_config(config)
    return AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path, config=config, ignore_mismatched_sizes=True
    )


def input_statistics(
    args: ModelArguments, model: nn.Module, processor: BaseImageProcessor | None
) -> tuple[int, tuple, tuple]:
    """Image size, mean and standard deviation that the model expects."""
    if processor is None or isinstance(processor, TimmWrapperImageProcessor):
        config = resolve_model_data_config(model) if processor is None else processor.data_config
        size, mean, std = config["input_size"][-1], config["mean"], config["std"]
    else:
        size = processor.size.get("height") or processor.size["shortest_edge"]
        mean, std = processor.image_mean, processor.image_std
    if args.channels == 1 and len(mean) == 3:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return args.image_size or size, tuple(mean), tuple(std)


def build_task(
    data_args: DataArguments, model_args: ModelArguments, args: BIMPArguments, restarts: bool = False
) -> Task:
    """The whole task; with `restarts` every `train()` starts from a new model, as hyperparameter search wants it."""
    loss = prepare_arguments(args)
    set_seed(args.seed)
    data = load_images(data_args)
    model = build_model(model_args, num_classes(data))
    name = model_args.model_name_or_path
    processor = None if name is None else AutoImageProcessor.from_pretrained(name)
    size, mean, std = statistics = input_statistics(model_args, model, processor)

    def tell_statistics(model: nn.Module) -> nn.Module:
        if model_args.timm_model is not None:  # the saved model's configuration tells how to prepare its images
            model.pretrained_cfg |= {"input_size": (model_args.channels, size, size), "mean": mean, "std": std}
        return model

    def new_model() -> nn.Module:
        return tell_statistics(build_model(model_args, num_classes(data)))

    sets = {
        split: Transformed(
            rows, ImageTransform(data_args.augmentation, model_args.channels, *statistics, training=split == "train")
        )
        for split, rows in data.items()
    }
    trainer = BIMPTrainer(
        **({"model_init": new_model} if restarts else {"model": tell_statistics(model)}),
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        data_collator=collate,
        processing_class=processor,
        compute_loss_func=loss,
        compute_metrics=Streamed(Accuracy()),
        preprocess_logits_for_metrics=predicted_classes,
    )
    card = {
        "tasks": "image-classification",
        "dataset": data_args.dataset_name or "scikit-learn digits",
        "finetuned_from": model_args.model_name_or_path,
    }
    return Task(trainer, sets.get("test"), METRIC, card)


def main() -> None:
    data_args, model_args, args = parse(ARGUMENTS, DEFAULT_CONFIG)
    if data_args.dataset_name is None and args.should_log:
        print("Using scikit-learn's digits, offline. To prune ResNet-56 on CIFAR-10, run:")
        print("    accelerate launch recipes/image_classification.py recipes/configs/cifar10_resnet56.yaml")
    build_task(data_args, model_args, args).run()


if __name__ == "__main__":
    main()
