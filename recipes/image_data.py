"""Images with labels: any data set in the Hub's layout, or scikit-learn's digits offline; augmentation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from torchvision.transforms import InterpolationMode, v2

AUGMENTATIONS = ("none", "crop_flip", "crop_flip_rotation", "imagenet")


@dataclass
class DataArguments:
    """Which images, how many of them, and how they are augmented."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder. By default scikit-learn's digits, offline."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column of the images (CIFAR-10: img)."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes (CIFAR-100: fine_label)."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate on. By default a tenth of the training data is held out."}
    )
    validation_share: float = field(default=0.1, metadata={"help": "Share of the training data held out."})
    split_seed: int = field(default=0, metadata={"help": "Decides what is held out; the same in every run."})
    test_split: str | None = field(default="test", metadata={"help": "Split to test on in the end; null for none."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many of the training images, held-out ones included."}
    )
    max_test_samples: int | None = field(default=None, metadata={"help": "Use only so many of the test images."})
    augmentation: str = field(
        default="crop_flip",
        metadata={
            "help": "Of training images: crop_flip pads by an eighth, crops and flips (CIFAR-10); crop_flip_rotation "
            "also rotates by 15 degrees (CIFAR-100); imagenet crops at random sizes and flips.",
            "choices": AUGMENTATIONS,
        },
    )

    def __post_init__(self):
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must lie in (0, 1).")


def load_images(args: DataArguments) -> DatasetDict:
    """Rows {image, label} in the splits train, validation and, unless `test_split` is null, test."""
    data = digits() if args.dataset_name is None else load_dataset(args.dataset_name, args.dataset_config)
    columns = {args.image_column: "image", args.label_column: "label"}
    missing = {"train", args.validation_split, args.test_split} - {None} - data.keys()
    present = next(iter(data.values())).column_names
    if missing or (missing := columns.keys() - set(present)):
        raise ValueError(
            f"{args.dataset_name or 'The digits'} has the splits {list(data)} and the columns {present}, and not: "
            f"{', '.join(sorted(missing))}. Set validation_split, test_split, image_column and label_column."
        )
    data = data.select_columns(list(columns))
    data = data.rename_columns({old: new for old, new in columns.items() if old != new})
    if data["train"].features["label"].dtype == "string":
        names = ClassLabel(names=sorted({label for rows in data.values() for label in rows["label"]}))
        data = data.cast_column("label", names)
    train = data["train"]
    if args.max_train_samples is not None:
        train = train.shuffle(seed=args.split_seed).select(range(min(args.max_train_samples, len(train))))
    if args.validation_split is None:
        halves = train.train_test_split(args.validation_share, seed=args.split_seed)
        splits = {"train": halves["train"], "validation": halves["test"]}
    else:
        splits = {"train": train, "validation": data[args.validation_split]}
    if args.test_split is not None:
        test = data[args.test_split]
        splits["test"] = test.select(range(min(args.max_test_samples or len(test), len(test))))
    return DatasetDict(splits)


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
