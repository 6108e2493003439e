"""A run goes on from its own checkpoints alone: another seed, data, batch, optimizer or precision is refused."""

import json

import pytest
import torch
from datasets import Dataset

from helpers import classification_items, classifier
from hf_bimp.storage import integrity
from trainers import assert_same_tensors, make_trainer

SAVING = {"save_strategy": "steps", "save_steps": 8}


def written(folder, **changes) -> None:
    make_trainer(folder, **(SAVING | changes)).train()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 7}, "seed: 42 there, 7 now"),
        ({"data_seed": 7}, "data_seed: None there, 7 now"),
        ({"items": classification_items(40)}, "training items: 32 there, 40 now"),
        ({"per_device_train_batch_size": 4}, "batch size .*: 8 there, 4 now"),
        ({"gradient_accumulation_steps": 2}, "batch size .*: 8 there, 16 now"),
        ({"optim": "sgd"}, r"optimizer: AdamW\(.*there, SGD\(.*now"),
        ({"adam_beta2": 0.9}, r"optimizer: .*0\.999.*there, .*0\.9\)"),
        ({"bf16": True}, "precision: no there, bf16 now"),
        ({"weight_decay": 0.1}, r"weight_decay: \[0.0\] there, \[0.0, 0.1\] now"),
    ],
)
def test_each_difference_is_named_with_both_values(tmp_path, changes, complaint) -> None:
    written(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"written by another run.*{complaint}"):
        make_trainer(tmp_path, **(SAVING | changes)).train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_all_differences_come_at_once(tmp_path) -> None:
    written(tmp_path)
    with pytest.raises(ValueError, match="seed: 42 there, 1 now; .*weight_decay"):
        make_trainer(tmp_path, seed=1, weight_decay=0.1, **SAVING).train(resume_from_checkpoint=True)


def rows(shift: float = 0.0) -> Dataset:
    items = classification_items()
    return Dataset.from_dict({"x": [(item["x"] + shift).tolist() for item in items], "labels": [0, 1, 2, 3] * 8})


def test_the_fingerprint_of_the_data_where_it_has_one(tmp_path) -> None:
    written(tmp_path, items=rows())
    assert json.loads((tmp_path / "bimp_state.json").read_text())["identity"]["data fingerprint"]
    with pytest.raises(ValueError, match="data fingerprint"):
        make_trainer(tmp_path, items=rows(0.5), **SAVING).train(resume_from_checkpoint=True)
    make_trainer(tmp_path, items=rows(), **SAVING).train(resume_from_checkpoint=True)


def test_a_batch_made_up_otherwise_goes_on(tmp_path) -> None:
    written(tmp_path)
    resumed = make_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.state.global_step == 12


def test_another_number_of_processes_is_a_warning(tmp_path, caplog) -> None:
    written(tmp_path)
    state = tmp_path / "checkpoint-8" / "bimp_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"num_processes": 2}))
    for rank in (0, 1):  # each of the two would have left its own
        (tmp_path / "checkpoint-8" / f"rng_state_{rank}.pth").write_bytes(
            (tmp_path / "checkpoint-8" / "rng_state.pth").read_bytes()
        )
    for rank in (0, 1):
        integrity.list_files(tmp_path / "checkpoint-8", rank, 2)
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "written by 2 processes, and 1 go on" in caplog.text


def test_the_same_run_goes_on_to_the_same_weights(tmp_path) -> None:
    whole = make_trainer(tmp_path / "whole", model=classifier(), **SAVING)
    whole.train()
    again = make_trainer(tmp_path / "again", model=classifier(seed=5), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same_tensors(whole.model.state_dict(), again.model.state_dict())
    assert torch.equal(whole.model.first.weight, again.model.first.weight)
