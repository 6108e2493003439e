"""Images with labels: any data set in the Hub's layout, or scikit-learn's digits offline; augmentation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from torchvision.transforms import InterpolationMode, v2

from shared.splits import SplitArguments, load_columns, make_splits

AUGMENTATIONS = ("none", "crop_flip", "crop_flip_rotation", "imagenet")


@dataclass
class DataArguments(SplitArguments):
    """Which images, how many of them, and how they are augmented."""

    image_column: str = field(default="image", metadata={"help": "Column of the images (CIFAR-10: img)."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes (CIFAR-100: fine_label)."})
    augmentation: str = field(
        default="crop_flip",
        metadata={
            "help": "Of training images: crop_flip pads by an eighth, crops and flips (CIFAR-10); crop_flip_rotation "
            "also rotates by 15 degrees (CIFAR-100); imagenet crops at random sizes and flips.",
            "choices": AUGMENTATIONS,
        },
    )


def load_images(args: DataArguments) -> DatasetDict:
    """Rows {image, label} in the splits train, validation and, unless `test_split` is null, test."""
    data = load_columns(args, {args.image_column: "image", args.label_column: "label"}, digits)
    if data["train"].features["label"].dtype == "string":
        names = ClassLabel(names=sorted({label for rows in data.values() for label in rows["label"]}))
        data = data.cast_column("label", names)
    return make_splits(args, data)


def digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits (8 x 8, ten classes), every fifth of them for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * 255 / 16).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
    is_test = np.arange(len(images)) % 5 == 4
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": list(images[chosen]), "label": bunch.target[chosen].tolist()}, features=features
            )
            for split, chosen in {"train": ~is_test, "test": is_test}.items()
        }
    )


def num_classes(data: DatasetDict) -> int:
    feature = data["train"].features["label"]
    return feature.num_classes if isinstance(feature, ClassLabel) else max(max(d["label"]) for d in data.values()) + 1


class ImageTransform:
    """A row {image, label} becomes {"image": normalised float (C, size, size), "labels": class}."""

    def __init__(self, augmentation: str, channels: int, size: int, mean: tuple, std: tuple, training: bool):
        mode = "RGB" if channels == 3 else "L"
        self.convert: Callable = lambda image: image.convert(mode)
        self.pipeline = v2.Compose(
            [
                v2.PILToTensor(),
                *(_augmented(augmentation, size) if training else _plain(augmentation, size)),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
            ]
        )

    def __call__(self, row: dict) -> dict:
        return {"image": self.pipeline(self.convert(row["image"])), "labels": row["label"]}


def _plain(augmentation: str, size: int) -> list[v2.Transform]:
    if augmentation != "imagenet":
        return [v2.Resize((size, size), antialias=True)]
    return [v2.Resize(round(size / 0.875), InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]


def _augmented(augmentation: str, size: int) -> list[v2.Transform]:
    if augmentation == "none":
        return _plain(augmentation, size)
    if augmentation == "imagenet":
        crop = v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return [crop, v2.RandomHorizontalFlip()]
    rotation = [v2.RandomRotation(15)] if augmentation == "crop_flip_rotation" else []
    crop = v2.RandomCrop(size, padding=size // 8)  # by 4 at 32 x 32
    return [v2.Resize((size, size), antialias=True), crop, v2.RandomHorizontalFlip(), *rotation]
