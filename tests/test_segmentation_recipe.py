"""The segmentation recipe: images and masks stay together, and a run as a user starts it, offline and tiny."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from processes import RECIPES, output_of
from semantic_segmentation import ARGUMENTS, ModelArguments, build_model, build_task, freeze_unused
from shared.cli import parse, parse_config
from shared.segmentation_data import (
    DataArguments,
    SegmentationTransform,
    load_segmentations,
    pasted_digits,
)

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
STEP = 20  # an image of the tests shows its mask in this contrast


def blocks(height: int, width: int, ignored: int = 255) -> dict:
    """A row whose mask has twelve rectangles of classes 1 to 12 and an ignored corner, and whose image shows it."""
    classes = 1 + np.arange(3)[:, None] * 4 + np.arange(4)
    mask = np.kron(classes, np.ones((height // 3, width // 4))).astype(np.uint8)
    image = Image.fromarray(mask * STEP)
    mask[: height // 6, : width // 8] = ignored
    return {"image": image, "mask": Image.fromarray(mask)}


def arguments(**kwargs) -> DataArguments:
    return DataArguments(dataset_name="none", num_classes=13, ignore_index=255, **kwargs)


def shown(item: dict) -> torch.Tensor:
    """The classes that the image of an item shows; 0 is padding."""
    return (item["image"] * 255 / STEP).round().long()


@pytest.mark.parametrize("size", [(24, 32), (30, 40)])
def test_flips_keep_image_and_mask_together(size) -> None:
    transform = SegmentationTransform(arguments(image_size=[24, 32], augmentation="flip"), **PLAIN, training=True)
    torch.manual_seed(0)
    flipped = 0
    for _ in range(8):
        item = transform(blocks(*size))
        image, labels = shown(item), item["labels"]
        assert image.shape == (3, 24, 32) and labels.shape == (24, 32) and labels.dtype == torch.int64
        assert (labels == -100).sum() == 16  # the corner, where the image does show a class
        inside = labels != -100
        equal = [channel[inside] == labels[inside] for channel in image]
        assert all(channel.all() if size == (24, 32) else channel.float().mean() > 0.8 for channel in equal)
        flipped += bool(labels[-1, 0] == 12)
    assert 0 < flipped < 8


def test_scaled_crops_keep_image_and_mask_together() -> None:
    data = arguments(image_size=[48, 64], crop_size=[40, 40], augmentation="scale_crop_flip")
    transform = SegmentationTransform(data, **PLAIN, training=True)
    torch.manual_seed(0)
    padded, counts = 0, set()
    for _ in range(20):
        item = transform(blocks(96, 128))
        image, labels = shown(item)[0], item["labels"]
        assert image.shape == labels.shape == (40, 40)
        inside = labels != -100
        assert (image[inside] == labels[inside]).float().mean() > 0.75  # all but the blurred edges of rectangles
        assert ((image == 0) <= (labels == -100)).all()  # padding is ignored
        padded += bool((image == 0).any())
        counts.add(len(labels.unique()))
    assert 0 < padded < 20 and len(counts) > 2  # images both smaller and larger than the crop


def test_evaluation_fits_images_in_and_ignores_the_rest() -> None:
    data = arguments(image_size=[48, 64], crop_size=[40, 40], augmentation="scale_crop_flip")
    transform = SegmentationTransform(data, **PLAIN, training=False)
    first, second = (transform(blocks(96, 96)) for _ in range(2))
    assert torch.equal(first["image"], second["image"]) and torch.equal(first["labels"], second["labels"])
    assert (first["labels"][:, 48:] == -100).all() and (first["labels"][:, 24:48] != -100).all()
    assert (first["image"][:, :, 48:] == 0).all()


def test_wrong_masks_are_refused_with_the_reason() -> None:
    row = blocks(24, 32)
    few = DataArguments(dataset_name="none", num_classes=5, ignore_index=255, image_size=[24, 32])
    with pytest.raises(ValueError, match="the classes are 0 to 4 with ignore_index=255"):
        SegmentationTransform(few, **PLAIN, training=False)(row)
    none = DataArguments(dataset_name="none", num_classes=13, image_size=[24, 32])
    with pytest.raises(ValueError, match="A mask holds class 255"):
        SegmentationTransform(none, **PLAIN, training=False)(row)
    transform = SegmentationTransform(arguments(image_size=[24, 32]), **PLAIN, training=False)
    for wrong in (row["mask"].convert("RGB"), row["mask"].resize((32, 32))):
        with pytest.raises(ValueError, match="need a class per pixel"):
            transform(row | {"mask": wrong})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"dataset_name": "some/data"}, "Give num_classes"),
        ({"image_size": [32]}, "give height and width"),
        ({"crop_size": [32, 32]}, "crop_size is of augmentation scale_crop_flip"),
        ({"validation_share": 1.0}, "must lie in"),
    ],
)
def test_bad_data_arguments_are_refused_with_the_reason(given, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        DataArguments(**given)


@pytest.fixture(scope="module")
def sample():
    return pasted_digits()


def test_the_sample_is_the_same_every_time(sample) -> None:
    assert {split: len(rows) for split, rows in sample.items()} == {"train": 480, "validation": 120, "test": 120}
    again = pasted_digits()
    for split in sample:
        for column in ("image", "annotation"):
            first, second = (np.stack([np.array(i) for i in s[split][column][:20]]) for s in (sample, again))
            assert (first == second).all()
            if column == "annotation":
                assert set(np.unique(first)) == {*range(11), 255}
    # Ink is bright, and ignored pixels lie beside it.
    image, mask = (np.array(sample["train"][0][column]) for column in ("image", "annotation"))
    assert image[(mask > 0) & (mask < 255)].mean() > image[mask == 0].mean() + 80


def test_held_out_images_depend_on_split_seed_alone(monkeypatch, sample) -> None:
    monkeypatch.setattr("shared.segmentation_data.pasted_digits", lambda: sample)

    def held_out(**kwargs) -> list[bytes]:
        data = load_segmentations(DataArguments(max_train_samples=50, max_test_samples=7, **kwargs))
        assert {split: len(rows) for split, rows in data.items()} == {"train": 45, "validation": 5, "test": 7}
        return [image.tobytes() for image in data["validation"]["image"]]

    assert held_out() == held_out() != held_out(split_seed=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set in the Hub's layout with columns of its own: 9 and 4 images of different sizes."""
    path = tmp_path / "data"
    path.mkdir()
    for split, length in {"train": 9, "test": 4}.items():
        rows = [blocks(24 + 6 * (i % 2), 32, ignored=0) for i in range(length)]
        columns = {"photo": [row["image"] for row in rows], "label": [row["mask"] for row in rows]}
        Dataset.from_dict(columns).to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"mask_column": "label"}, "image"),
        ({"image_column": "photo"}, "annotation"),
        ({"image_column": "photo", "mask_column": "label", "validation_split": "val"}, "val"),
        ({"image_column": "photo", "mask_column": "label", "test_split": "dev"}, "dev"),
    ],
)
def test_missing_columns_and_splits_are_named(folder, given, missing) -> None:
    with pytest.raises(ValueError, match=rf"\['photo', 'label'\], and not: {missing}\. Set validation_split"):
        load_segmentations(DataArguments(dataset_name=str(folder), num_classes=13, **given))


def config(folder: Path, output_dir: Path, **kwargs) -> dict:
    data = {"dataset_name": str(folder), "image_column": "photo", "mask_column": "label", "num_classes": 13}
    data |= {"ignore_index": 0, "image_size": [24, 32], "validation_split": "test", "test_split": None}
    training = {"target_sparsity": 0.5, "num_cycles": 1, "max_steps": 4, "per_device_train_batch_size": 4}
    training |= {"use_cpu": True, "remove_unused_columns": False, "report_to": "none", "eval_strategy": "no"}
    return data | training | {"output_dir": str(output_dir)} | kwargs


def test_a_transformers_model_on_a_local_folder(tmp_path, folder) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    tiny = SegformerConfig(
        num_encoder_blocks=2,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        num_attention_heads=[1, 1],
        sr_ratios=[2, 1],
        decoder_hidden_size=8,
    )
    SegformerForSemanticSegmentation(tiny).save_pretrained(tmp_path / "model")
    SegformerImageProcessor().save_pretrained(tmp_path / "model")
    given = config(folder, tmp_path / "out", model_name_or_path=str(tmp_path / "model"), config_only=True)
    results = build_task(*parse_config(ARGUMENTS, given)).run()
    assert {"miou", "pixel_accuracy", "loss"} <= results["final"].keys() and "test" not in results
    assert results["sparsity"]["prunable"] == pytest.approx(0.5, abs=0.01)
    saved = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert saved.config.num_labels == 13


def test_deeplabv3_meets_no_batch_of_one_image(tmp_path, folder) -> None:
    given = config(folder, tmp_path / "out", smp_architecture="DeepLabV3", num_train_epochs=1, max_steps=3)
    results = build_task(*parse_config(ARGUMENTS, given | {"model_kwargs": {"decoder_channels": 8}})).run()
    assert results["plan"]["total_steps"] == 3  # of 2 batches an epoch: the ninth image is left out
    with pytest.raises(ValueError, match="dataloader_drop_last would leave images out of evaluations"):
        build_task(*parse_config(ARGUMENTS, given | {"dataloader_drop_last": True}))


def test_unused_stages_of_an_encoder_are_not_prunable() -> None:
    def unused(**kwargs) -> list[str]:
        model = build_model(ModelArguments(smp_architecture="PSPNet", model_kwargs=kwargs), classes=3)
        patterns = freeze_unused(model, [32, 32])
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert {n.split(".")[1] for n in frozen} == {p.split(".")[1].rstrip("\\") for p in patterns}
        return patterns

    assert unused(output_stride=8, encoder_depth=5) == []
    assert r"^encoder\.layer4\.1\.conv2$" in unused(encoder_depth=4, output_stride=8)
    assert len(unused()) == 10  # the default, encoder_depth=3: both of the last stages


def test_the_sample_runs_resumes_and_its_model_loads_in_a_fresh_process(tmp_path) -> None:
    command = [sys.executable, RECIPES / "semantic_segmentation.py", "--max_steps", "6", "--max_train_samples", "64"]
    command += ["--max_test_samples", "8", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "4"]
    command += ["--save_total_limit", "3", "--output_dir", tmp_path]
    printed = output_of(*command)
    assert "offline" in printed and "recipes/configs/cityscapes_pspnet.yaml" in printed
    for row in ("miou", "dense", "pruning 2", "retraining 2", "final (validation)", "final (test)"):
        assert row in printed
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert {"miou", "pixel_accuracy", "loss"} <= results["test"].keys() & results["final"].keys()
    assert all("miou" in pruning["after"] for pruning in results["prunings"])
    assert results["sparsity"]["prunable"] == pytest.approx(0.8, abs=1e-4)
    assert "image-segmentation" in (tmp_path / "README.md").read_text()

    first = load_file(tmp_path / "model.safetensors")
    (tmp_path / "bimp_results.json").unlink()
    output_of(*command, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    code = (
        "import segmentation_models_pytorch as smp\n"
        f"model = smp.from_pretrained('{tmp_path}')\n"
        "weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}\n"
        "used = [w for n, w in weights.items() if '.layer3.' not in n and '.layer4.' not in n]\n"
        "print(sum(int((w == 0).sum()) for w in used) / sum(w.numel() for w in used))\n"
    )
    sparsity = output_of(sys.executable, "-c", code).splitlines()[-1]
    assert float(sparsity) == pytest.approx(0.8, abs=1e-4)
    again = build_model(ModelArguments(smp_architecture=f"local-dir:{tmp_path}"), classes=11)
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.state_dict().items())


def test_every_shipped_config_parses(monkeypatch) -> None:
    names = ["segmentation_sample", "camvid_pspnet", "cityscapes_pspnet", "coco_deeplabv3"]
    for name in names:
        path = RECIPES / "configs" / f"{name}.yaml"
        monkeypatch.setattr(sys, "argv", ["semantic_segmentation.py", str(path), "--use_cpu", "--bf16", "false"])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        data, model, args = parse(ARGUMENTS)
        assert model.smp_architecture and 0.8 <= args.target_sparsity <= 0.9 and not args.dataloader_drop_last
        if name != "segmentation_sample":
            assert args.weight_decay == 1e-5 and data.ignore_index is not None
