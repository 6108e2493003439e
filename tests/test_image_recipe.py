"""The image classification recipe and the study of vision models, as a user starts them: offline and tiny."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file

from processes import RECIPES, output_of, output_of_recipe
from shared.image_data import AUGMENTATIONS, DataArguments, ImageTransform, load_images, num_classes

TINY = ["--max_steps", "6", "--max_train_samples", "80", "--max_test_samples", "20", "--eval_strategy", "no"]


def test_digits_are_the_default_and_the_model_loads_in_a_fresh_process(tmp_path) -> None:
    arguments = [*TINY, "--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "3"]
    arguments += ["--output_dir", tmp_path]
    printed = output_of_recipe("image_classification.py", *arguments)
    assert "offline" in printed and "recipes/configs/cifar10_resnet56.yaml" in printed
    for row in ("dense", "pruning 2", "retraining 2", "final (validation)", "final (test)", "Theoretical speedup"):
        assert row in printed
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert results["sparsity"]["prunable"] == pytest.approx(0.9, abs=1e-4)
    assert {"accuracy", "loss"} <= results["test"].keys() and results["theoretical_speedup"] > 1
    first = load_file(tmp_path / "model.safetensors")
    (tmp_path / "bimp_results.json").unlink()
    output_of_recipe("image_classification.py", *arguments, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    code = (
        "import timm, hf_bimp.models, torch\n"
        f"model = timm.create_model('local-dir:{tmp_path}', pretrained=True)\n"
        "weights = [p for p in model.parameters() if p.ndim > 1]\n"
        "print(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))\n"
        "print(model.pretrained_cfg['input_size'])\n"
    )
    sparsity, size = output_of(sys.executable, "-c", code).splitlines()
    assert float(sparsity) == pytest.approx(0.9, abs=1e-4) and size == "(1, 16, 16)"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data set in the Hub's layout with columns of its own."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)) for _ in range(40)]
    rows = Dataset.from_dict({"img": images, "fine_label": [i % 3 for i in range(40)]})
    path = tmp_path / "data"
    path.mkdir()
    for split in ("train", "test"):
        rows.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


def test_a_transformers_model_on_a_local_folder_with_filters(tmp_path, folder) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(
        tmp_path / "model"
    )
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    config = yaml.safe_load((RECIPES / "configs" / "digits_resnet20.yaml").read_text())
    del config["timm_model"]
    config |= {"model_name_or_path": str(tmp_path / "model"), "channels": 3, "granularity": "filter"}
    config |= {"dataset_name": str(folder), "image_column": "img", "label_column": "fine_label"}
    config |= {"target_sparsity": 0.5, "augmentation": "crop_flip_rotation", "label_smoothing_factor": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output_of_recipe("image_classification.py", tmp_path / "config.json", *TINY, "--output_dir", tmp_path / "out")
    loaded = ResNetForImageClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.num_labels == 3
    stem = loaded.resnet.embedder.embedder.convolution.weight
    assert (stem == 0).flatten(1).all(1).sum() == 4


def run_here(directory: Path, **changes) -> dict:
    """The recipe in this process, on a few digits."""
    from image_classification import ARGUMENTS, build_task
    from shared.cli import parse_config

    config = yaml.safe_load((RECIPES / "configs" / "digits_resnet20.yaml").read_text())
    config |= {"use_cpu": True, "max_steps": 4, "max_train_samples": 60, "max_test_samples": 20}
    config |= {"eval_strategy": "no", "output_dir": str(directory), "num_cycles": 1, "disable_tqdm": True}
    config = {name: value for name, value in (config | changes).items() if value is not None}
    return build_task(*parse_config(ARGUMENTS, config)).run()


def test_label_smoothing_of_a_timm_model(tmp_path) -> None:
    smooth, plain = (run_here(tmp_path / str(s), label_smoothing_factor=s) for s in (0.3, 0.0))
    assert smooth["final"]["loss"] != plain["final"]["loss"] and smooth["test"]["accuracy"] >= 0


def test_a_timm_checkpoint_through_transformers_and_its_result_again(tmp_path) -> None:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    save_for_hf(timm.create_model("resnet10t"), tmp_path / "timm", safe_serialization=True)
    wrapper = {"timm_model": None, "channels": 3, "image_size": 32}
    first = run_here(tmp_path / "one", model_name_or_path=str(tmp_path / "timm"), **wrapper)
    assert first["sparsity"]["prunable"] == pytest.approx(0.9, abs=1e-3)
    sparse = {"keep_zeros": True, "target_sparsity": 0.95, "dense_ratio": 0.0}
    again = run_here(tmp_path / "two", model_name_or_path=str(tmp_path / "one"), **wrapper, **sparse)
    assert again["plan"]["initial_sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert again["sparsity"]["prunable"] == pytest.approx(0.95, abs=1e-3)


def test_evaluation_without_its_last_images_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="dataloader_drop_last"):
        run_here(tmp_path, dataloader_drop_last=True)


def test_the_study_compares_and_repeats_nothing(tmp_path) -> None:
    base = yaml.safe_load((RECIPES / "configs" / "digits_resnet20.yaml").read_text())
    base |= {"max_train_samples": 80, "max_test_samples": 20, "eval_strategy": "no", "save_strategy": "no"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "recipe": "image_classification",
        "base": "base.yaml",
        "model_key": "timm_model",
        "model_prefix": "local-dir:",
        "final": "test",
        "seeds": [1, 2],
        "dense": {"num_train_epochs": 4},
        "grids": {
            "rules": {
                "vary": {"retrain_schedule": ["ft", "allr"]},
                "fixed": {"allocation": "erk", "num_cycles": 1, "target_sparsity": 0.5, "retrain_ratio": 0.5},
            }
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    arguments = [tmp_path / "study.yaml", "--output_dir", tmp_path / "out"]
    output_of_recipe("retraining_study.py", *arguments)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "2 seeds" in table and "| ft |" in table and "| allr |" in table and "±" in table
    files = {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/result.json")}
    assert len(files) == 6
    pruned = json.loads((tmp_path / "out" / "rules-allr-1" / "result.json").read_text())
    assert pruned["prunings"][0]["d2"] == 0.5 and pruned["allocation"] == "erk"
    output_of_recipe("retraining_study.py", *arguments)
    assert files == {path: path.stat().st_mtime for path in files}


def test_every_image_config_parses(monkeypatch) -> None:
    from image_classification import ARGUMENTS
    from shared.cli import parse

    configs = [path for path in (RECIPES / "configs").glob("*.yaml") if "timm_model:" in path.read_text()]
    assert len(configs) >= 9
    for path in configs:
        monkeypatch.setattr(sys, "argv", ["image_classification.py", str(path), "--use_cpu", "--report_to", "none"])
        data, model, args = parse(ARGUMENTS)
        assert 0 < args.target_sparsity < 1 and model.timm_model and args.optim == "sgd"


def test_the_splits_are_fixed_and_apart() -> None:
    first, again = (load_images(DataArguments()) for _ in range(2))
    assert {split: len(rows) for split, rows in first.items()} == {"train": 1294, "validation": 144, "test": 359}
    assert first["validation"]["label"] == again["validation"]["label"] and num_classes(first) == 10
    other = load_images(DataArguments(split_seed=1))
    assert first["validation"]["label"] != other["validation"]["label"]
    seen = {split: {image.tobytes() for image in rows["image"]} for split, rows in first.items()}
    assert len(seen["train"] & seen["test"]) == 0 and len(seen["train"] & seen["validation"]) == 0


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_become_tensors_of_one_size(augmentation, channels) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    statistics = (0.5,) * channels, (0.25,) * channels
    torch.manual_seed(0)
    train, plain = (ImageTransform(augmentation, channels, 24, *statistics, training=t) for t in (True, False))
    row = {"image": image, "label": 2}
    outputs = [plain(row)["image"] for _ in range(2)] + [train(row)["image"] for _ in range(4)]
    assert all(output.shape == (channels, 24, 24) and output.dtype == torch.float32 for output in outputs)
    assert torch.equal(outputs[0], outputs[1]) and plain(row)["labels"] == 2
    assert any(not torch.equal(outputs[2], output) for output in outputs[3:]) == (augmentation != "none")


def test_a_column_or_split_that_is_not_there_is_named(folder) -> None:
    with pytest.raises(ValueError, match="and not: label"):
        load_images(DataArguments(dataset_name=str(folder), image_column="img"))
    with pytest.raises(ValueError, match="and not: dev"):
        load_images(DataArguments(dataset_name=str(folder), image_column="img", validation_split="dev"))
    with pytest.raises(ValueError, match=r"validation_share=1 must lie in \(0, 1\)"):
        DataArguments(validation_share=1)
    assert isinstance(load_images(DataArguments()), DatasetDict)


@pytest.mark.slow
def test_a_model_pruned_by_filters_is_exported_to_int8(tmp_path) -> None:
    arguments = [*TINY, "--granularity", "filter", "--target_sparsity", "0.5", "--output_dir", tmp_path]
    output_of_recipe("image_classification.py", *arguments)
    printed = output_of_recipe("export_int8.py", *arguments)
    for row in ("dense torch", "shrunk torch", "OpenVINO int8", "accuracy", "openvino_model_int8.xml"):
        assert row in printed
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    before = results["deployment"]["metrics_before"]["accuracy"]
    assert before == pytest.approx(results["test"]["accuracy"])
    assert "## Deployment" in (tmp_path / "README.md").read_text()
