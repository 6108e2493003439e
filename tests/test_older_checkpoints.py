"""Checkpoints that version 0.1.0 wrote go on as they would have under it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import classification_items, classifier, run_arguments
from hf_bimp import BIMPArguments, BIMPTrainer

OLD = Path(__file__).parent / "data" / "checkpoints-0.1.0"
# The arguments that they were written under.
RUNS: dict[str, dict] = {
    "bimp": {
        "target_sparsity": 0.8,
        "num_cycles": 2,
        "dense_ratio": 0.4,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.1,
    },
    "gmp": {"method": "gmp", "target_sparsity": 0.8, "num_prunings": 4, "gmp_schedule": "cyclic"},
    "dpf": {
        "method": "dpf",
        "target_sparsity": 0.8,
        "num_prunings": 3,
        "dpf_interval": 3,
        "finetune_ratio": 0.25,
    },
    "str": {
        "method": "str",
        "str_initial_threshold": -3.0,
        "weight_decay": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
    },
}


def trainer_of(name: str, folder: Path) -> BIMPTrainer:
    args = BIMPArguments(**run_arguments(folder, max_steps=12, save_strategy="steps", save_steps=7, **RUNS[name]))
    return BIMPTrainer(model=classifier(), args=args, train_dataset=classification_items())


@pytest.mark.parametrize("name", RUNS)
def test_they_resume(tmp_path, name) -> None:
    trainer = trainer_of(name, tmp_path)
    trainer.train(resume_from_checkpoint=str(OLD / name / "checkpoint-7"))
    expected, weights = load_file(OLD / name / "final.safetensors"), trainer.model.state_dict()
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():  # written on another processor, so to rounding
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(weights[key] == 0, tensor == 0)
    assert json.loads((tmp_path / "bimp_state.json").read_text())["format_version"] == 3


def test_their_arguments_load() -> None:
    args = torch.load(OLD / "bimp" / "checkpoint-7" / "training_args.bin", weights_only=False)
    assert type(args) is BIMPArguments and args.target_sparsity == 0.8 and args.retrain_schedule == "allr"


def test_ones_of_a_later_version_are_refused(tmp_path) -> None:
    shutil.copytree(OLD / "bimp" / "checkpoint-7", tmp_path / "checkpoint-7")
    path = tmp_path / "checkpoint-7" / "bimp_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 4}))
    with pytest.raises(ValueError, match="format_version 4, and this hf_bimp reads up to 3. Upgrade"):
        trainer_of("bimp", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
