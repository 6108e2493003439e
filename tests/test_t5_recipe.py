"""The translation recipe, as a user starts it: offline, tiny, from the command line."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from processes import RECIPES, output_of_recipe, run_recipe

SMALL = ["--max_steps", "6", "--max_train_samples", "64", "--max_eval_samples", "8", "--eval_strategy", "no"]


def test_without_arguments_the_offline_sample_is_used_and_said(tmp_path):
    printed = output_of_recipe("t5_wmt16.py", *SMALL, "--output_dir", tmp_path)
    assert "offline" in printed and "recipes/configs/t5_small_wmt16_de_en.yaml" in printed
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert results["plan"]["prune_steps"] == [3, 4]
    assert abs(results["sparsity"]["prunable"] - 0.8) < 1e-4
    assert results["bleu_signature"] and {"bleu", "loss"} <= results["test"].keys()
    assert [set(p["after"]) >= {"bleu"} for p in results["prunings"]] == [True, True]
    for row in (
        "dense",
        "pruning 1",
        "retraining 1",
        "pruning 2",
        "retraining 2",
        "final (validation)",
        "final (test)",
    ):
        assert row in printed
    assert (tmp_path / "bimp_run.png").stat().st_size > 1000
    assert "translation" in (tmp_path / "README.md").read_text()


@pytest.fixture
def pairs_file(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"translation": {"en": f"The number {i}.", "ro": f"Numărul {i}."}} for i in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_config_file_and_a_local_file_with_overrides(tmp_path, pairs_file):
    sample = yaml.safe_load((RECIPES / "configs" / "t5_sample.yaml").read_text())
    config = sample | {"dataset_name": str(pairs_file), "target_lang": "ro", "tiny_vocab_size": 60, "num_cycles": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [tmp_path / "config.json", *SMALL, "--num_cycles", "1", "--output_dir", tmp_path / "out"]
    output_of_recipe("t5_wmt16.py", *arguments)
    results = json.loads((tmp_path / "out" / "bimp_results.json").read_text())
    assert results["plan"]["prune_steps"] == [3]  # one cycle: the command line overrides the file


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ({"target_sparcity": 0.9}, "no such argument: target_sparcity"),
        ({"target_lang": "fr"}, "not both source_lang=en and target_lang=fr"),
    ],
)
def test_bad_config_is_refused_with_the_reason(tmp_path, pairs_file, override, complaint):
    config = {"output_dir": str(tmp_path / "out"), "target_sparsity": 0.5, "dataset_name": str(pairs_file)} | override
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = run_recipe("t5_wmt16.py", tmp_path / "config.yaml")
    assert done.returncode != 0 and complaint in done.stderr


def test_every_shipped_config_parses(monkeypatch):
    from hf_bimp import BIMPSeq2SeqArguments
    from shared.cli import parse
    from shared.translation_data import DataArguments
    from t5_wmt16 import ModelArguments

    configs = [path for path in sorted((RECIPES / "configs").glob("t5_*.yaml")) if "study" not in path.name]
    assert len(configs) >= 4
    for path in configs:
        monkeypatch.setattr(sys, "argv", ["t5_wmt16.py", str(path), "--use_cpu", "--report_to", "none"])
        data, model, args = parse((DataArguments, ModelArguments, BIMPSeq2SeqArguments))
        assert args.target_sparsity == 0.8 and args.predict_with_generate


def test_the_study_prunes_one_dense_model(tmp_path, pairs_file):
    sample = yaml.safe_load((RECIPES / "configs" / "t5_sample.yaml").read_text())
    recipe = sample | {"target_lang": "ro", "tiny_vocab_size": 60, "max_steps": 10, "eval_strategy": "no"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = {
        "recipe": "t5_wmt16",
        "base": "recipe.yaml",
        "model_key": "model_name_or_path",
        "scale": 1,
        "final": "final",
        "dense_seed": 1,
        "seeds": [1, 2],
        "dense": {},
        "grids": {
            "schedules": {
                "vary": {"retrain_schedule": ["allr"]},
                "fixed": {"target_sparsity": 0.5, "num_cycles": 1, "retrain_ratio": 0.2},
            }
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    arguments = [tmp_path / "study.yaml", "--dataset_name", pairs_file, "--output_dir", tmp_path / "out"]
    output_of_recipe("retraining_study.py", *arguments)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "10 steps, 1 seeds" in table and "| allr |" in table
    assert len(list((tmp_path / "out").glob("*/result.json"))) == 3
    pruned = json.loads((tmp_path / "out" / "schedules-allr-2" / "bimp_results.json").read_text())
    assert pruned["prunings"][0]["d2"] == 0.2  # the dense length came from the dense checkpoint
