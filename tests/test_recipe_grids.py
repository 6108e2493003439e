"""Every recipe can be tuned: one signature, and a grid of two points over each, as a user starts it."""

import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import compare_methods
from comparison.recipe import RECIPES, Recipe, load_recipe
from hf_bimp import BIMPArguments
from processes import RECIPES as FOLDER

SHORT = {"max_steps": 4, "use_cpu": True, "eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
BASES = {
    "image_classification": (
        "digits_resnet20.yaml",
        {"image_size": 8, "max_train_samples": 60, "max_test_samples": 9},
    ),
    "semantic_segmentation": (
        "segmentation_sample.yaml",
        {"image_size": [16, 16], "max_train_samples": 40, "max_test_samples": 9, "per_device_train_batch_size": 8},
    ),
    "t5_wmt16": (
        "t5_sample.yaml",
        {"max_train_samples": 64, "max_eval_samples": 8, "tiny_d_model": 16, "tiny_num_layers": 1, "warmup_steps": 0}
        | {"tiny_vocab_size": 200, "generation_max_length": 8, "per_device_train_batch_size": 16},
    ),
}


def parameters(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_every_recipe_is_one() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if "def build_task" in path.read_text()}
    assert scripts == set(RECIPES) == set(BASES)
    for name in RECIPES:
        recipe = load_recipe(name)
        assert parameters(recipe.build_task) == parameters(Recipe.build_task), name
        assert len(recipe.ARGUMENTS) == 3 and issubclass(recipe.ARGUMENTS[2], BIMPArguments)
        assert isinstance(recipe.METRIC, str)


@pytest.mark.parametrize("name", RECIPES)
def test_a_grid_of_two_points(tmp_path: Path, monkeypatch, name) -> None:
    config, changes = BASES[name]
    base = yaml.safe_load((FOLDER / "configs" / config).read_text()) | SHORT | changes
    study = {
        "recipe": name,
        "base": "base.yaml",
        "sparsities": [0.5],
        "seeds": [1],
        "methods": {"bimp": {"settings": {"num_cycles": 1}, "grid": {"learning_rate": [1.0e-4, 1.0e-2]}}},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    built, build_model = [], importlib.import_module(name).build_model

    def watched(*args):
        made = build_model(*args)
        model = made[0] if isinstance(made, tuple) else made  # T5's comes with its tokenizer
        built.append(next(p for p in model.parameters() if p.ndim > 1).detach().clone())
        return made

    monkeypatch.setattr(importlib.import_module(name), "build_model", watched)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", str(tmp_path / "study.yaml"), "--output_dir", str(out)])
    compare_methods.main()
    trials = json.loads((out / "tune-bimp-0.5" / "result.json").read_text())["trials"]
    assert [trial["params"]["learning_rate"] for trial in trials] == [1e-4, 1e-2]
    assert [trial["sparsity"] for trial in trials] == pytest.approx([0.5, 0.5], abs=1e-3)
    best = max(trials, key=lambda trial: trial["value"])
    run = json.loads((out / "bimp-0.5-1" / "settings.json").read_text())
    assert run["learning_rate"] == best["params"]["learning_rate"]
    (row,) = map(json.loads, (out / "runs.jsonl").read_text().splitlines())
    assert row["sparsity"] == pytest.approx(0.5, abs=1e-3)
    # A trial builds three: one for the data, one with the trainer, one to train. The last of all is that of the run.
    assert len(built) == 7 and torch.equal(built[2], built[5])  # points are compared from the same weights
