"""Images with a class per pixel: any data set in the Hub's layout, or pasted digits offline; augmentation."""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from shared.splits import SplitArguments, load_columns, make_splits

AUGMENTATIONS = ("none", "flip", "scale_crop_flip")
IGNORED = -100  # what the loss and the metrics leave out
SAMPLE_CLASSES = 11  # background and the digits
SAMPLE_IGNORED = 255


@dataclass
class DataArguments(SplitArguments):
    """Which images and masks, how many of them, and how they are augmented."""

    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    mask_column: str = field(default="annotation", metadata={"help": "Column of the masks, a class per pixel."})
    num_classes: int | None = field(
        default=None, metadata={"help": "Number of classes, without the ignored one; required for a named data set."}
    )
    ignore_index: int | None = field(
        default=None, metadata={"help": "Pixels of this class in the masks (often 255) count neither way."}
    )
    image_size: list[int] = field(
        default_factory=lambda: [48, 48],
        metadata={"help": "Height and width that images are resized to fit in; the rest is padding that is ignored."},
    )
    crop_size: list[int] | None = field(
        default=None, metadata={"help": "Height and width of scale_crop_flip's crops; by default image_size."}
    )
    augmentation: str = field(
        default="flip",
        metadata={
            "help": "Of training images: flip mirrors half; scale_crop_flip also resizes by 0.5 to 2 and crops.",
            "choices": AUGMENTATIONS,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("image_size", "crop_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ValueError(f"{name}={size}: give height and width.")
        if self.crop_size is not None and self.augmentation != "scale_crop_flip":
            raise ValueError(f"crop_size is of augmentation scale_crop_flip, not {self.augmentation}; leave it out.")
        if self.dataset_name is None:
            self.num_classes, self.ignore_index, self.mask_column = SAMPLE_CLASSES, SAMPLE_IGNORED, "annotation"
        elif self.num_classes is None:
            raise ValueError(f"Give num_classes, the number of classes in {self.dataset_name}'s masks.")


def load_segmentations(args: DataArguments) -> DatasetDict:
    """Rows {image, mask} in the splits train, validation and, unless `test_split` is null, test."""
    return make_splits(args, load_columns(args, {args.image_column: "image", args.mask_column: "mask"}, pasted_digits))


def pasted_digits() -> DatasetDict:
    """480 noisy grey images of up to four of scikit-learn's digits, and 120 each to validate and to test on.

    Mask: 0 for background, 1 to 10 for the ink of the digits 0 to 9; 255, to be ignored, around every other digit.
    No handwritten digit is in two of the splits.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    features = Features({"image": Image(), "annotation": Image()})
    fifth = np.arange(len(bunch.target)) % 5
    splits = {}
    for seed, (split, length, chosen) in enumerate(
        [("train", 480, fifth < 3), ("validation", 120, fifth == 3), ("test", 120, fifth == 4)]
    ):
        rng = np.random.default_rng(seed)
        pairs = [_paste(bunch.images[chosen], bunch.target[chosen], rng) for _ in range(length)]
        images, masks = map(list, zip(*pairs, strict=True))
        splits[split] = Dataset.from_dict({"image": images, "annotation": masks}, features=features)
    return DatasetDict(splits)


def _paste(digits: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A 48 x 48 image, with a digit of twice its size (16 x 16) somewhere in most of its quarters, and its mask."""
    image, mask = rng.normal(30, 15, (48, 48)), np.zeros((48, 48), np.uint8)
    for top, left in ((0, 0), (0, 24), (24, 0), (24, 24)):
        which, present, bordered = rng.integers(len(digits)), rng.random() < 0.8, rng.random() < 0.5
        row, column = (top, left) + rng.integers(1, 8, 2)  # a pixel stays free for the border
        if not present:
            continue
        digit = np.kron(digits[which], np.ones((2, 2)))
        image[row : row + 16, column : column + 16] += 14 * digit
        ink = np.pad(digit >= 6, 1)
        place = mask[row - 1 : row + 17, column - 1 : column + 17]
        if bordered:
            around = [np.roll(ink, (down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
            place[np.any(around, axis=0)] = SAMPLE_IGNORED
        place[ink] = classes[which] + 1
    return image.clip(0, 255).astype(np.uint8), mask


class SegmentationTransform:
    """A row {image, mask} becomes {"image": normalised float (3, H, W), "labels": classes (H, W), -100 if ignored}."""

    def __init__(self, args: DataArguments, mean: tuple, std: tuple, training: bool):
        self.num_classes, self.ignore_index, self.size = args.num_classes, args.ignore_index, tuple(args.image_size)
        augmentation = args.augmentation if training else "none"
        self.scales = (0.5, 2.0) if augmentation == "scale_crop_flip" else None
        if augmentation == "scale_crop_flip":
            fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
            framed = [v2.RandomCrop(args.crop_size or self.size, pad_if_needed=True, fill=fill)]
        else:
            framed = [self._pad]
        self.augment = v2.Compose(framed + ([] if augmentation == "none" else [v2.RandomHorizontalFlip()]))
        # Normalize and ToDtype(scale=True) leave masks as they are.
        self.normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))])

    def __call__(self, row: dict) -> dict:
        image = tv_tensors.Image(F.pil_to_tensor(row["image"].convert("RGB")))
        mask = self._classes(np.array(row["mask"]), image.shape[-2:])
        scale = 1.0 if self.scales is None else torch.empty(()).uniform_(*self.scales).item()
        image, mask = self.augment(*self._fit(image, mask, scale))
        return {"image": self.normalize(image.as_subclass(torch.Tensor)), "labels": mask.as_subclass(torch.Tensor)}

    def _classes(self, mask: np.ndarray, size: tuple) -> tv_tensors.Mask:
        if mask.shape != tuple(size):
            raise ValueError(f"A mask of shape {mask.shape} for an image of {tuple(size)}: need a class per pixel.")
        mask = torch.from_numpy(mask.astype(np.int64))
        if self.ignore_index is not None:
            mask[mask == self.ignore_index] = IGNORED
        wrong = mask[(mask != IGNORED) & ((mask < 0) | (mask >= self.num_classes))]
        if wrong.numel():
            raise ValueError(
                f"A mask holds class {wrong[0]}, and the classes are 0 to {self.num_classes - 1} with ignore_index="
                f"{self.ignore_index}: correct num_classes or ignore_index."
            )
        return tv_tensors.Mask(mask)

    def _fit(self, image: tv_tensors.Image, mask: tv_tensors.Mask, scale: float) -> tuple:
        """Both resized, in proportion, to `scale` times what fits into the image size."""
        height, width = image.shape[-2:]
        scale *= min(self.size[0] / height, self.size[1] / width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        return F.resize(image, size, antialias=True), F.resize(mask, size, InterpolationMode.NEAREST)

    def _pad(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple:
        height, width = image.shape[-2:]
        padding = [0, 0, self.size[1] - width, self.size[0] - height]  # left, top, right, bottom
        return F.pad(image, padding), F.pad(mask, padding, fill=IGNORED)
