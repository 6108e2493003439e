"""Checkpoints whose files are missing, cut off or damaged: the newest whole one is taken, and the log says why."""

import json
import shutil
from pathlib import Path

import pytest

from helpers import classifier, snapshot
from hf_bimp.storage import integrity
from hf_bimp.storage.run_state import damage, last_complete_checkpoint
from trainers import assert_same_tensors, make_trainer

RUNS = {"bimp": {"save_total_limit": 3}, "dpf": {"method": "dpf", "num_cycles": None, "num_prunings": 3}}


def trainer_of(name: str, folder: Path):
    return make_trainer(folder, classifier(0.2), save_strategy="steps", save_steps=4, **RUNS[name])


@pytest.fixture(scope="module", params=RUNS)
def finished(request, tmp_path_factory):
    """A run's name, folder and final weights; it may not be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = trainer_of(request.param, folder)
    trainer.train()
    return request.param, folder, snapshot(trainer.model)


def changed(data: bytes, how: str) -> bytes:
    middle = len(data) * 2 // 3
    flipped = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
    return {"empty": b"", "half": data[: len(data) // 2], "flipped": flipped}[how]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoint-8").iterdir() if path.is_file())


@pytest.mark.parametrize("how", ["missing", "empty", "half", "flipped"])
def test_any_damage_to_any_file_is_seen_and_named(finished, tmp_path, how) -> None:
    _, folder, _ = finished
    for original in files(folder):
        copy = tmp_path / original.stem / "checkpoint-8"
        shutil.copytree(folder / "checkpoint-8", copy)
        path = copy / original.name
        path.unlink() if how == "missing" else path.write_bytes(changed(original.read_bytes(), how))
        reason = damage(copy)
        assert reason is not None and (original.name in reason or original.suffix == ".json"), (original, reason)
    assert damage(folder / "checkpoint-8") is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "bimp_masks.safetensors"]
)
def test_the_one_before_goes_on_to_the_same_weights(finished, tmp_path, caplog, name) -> None:
    run, folder, weights = finished
    for step in (4, 8):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-8" / name
    path.write_bytes(changed(path.read_bytes(), "flipped"))
    resumed = trainer_of(run, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-8 was not saved to its end, or damaged since, and is passed over: {name}" in caplog.text
    assert_same_tensors(snapshot(resumed.model), weights)


def test_a_named_folder_is_refused_with_file_and_remedy(finished, tmp_path) -> None:
    run, folder, _ = finished
    shutil.copytree(folder / "checkpoint-8", tmp_path / "checkpoint-8")
    (tmp_path / "checkpoint-8" / "scheduler.pt").unlink()
    trainer = trainer_of(run, tmp_path)
    with pytest.raises(ValueError, match="checkpoint-8 is no complete checkpoint: scheduler.pt is missing.*=True for"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("content", [None, [1, 2], "text", {}, {"num_processes": "x"}, {"num_processes": 10**9}, 7])
def test_a_state_of_another_form_is_passed_over(finished, tmp_path, content) -> None:
    _, folder, _ = finished
    for step in (4, 8):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / "bimp_state.json").write_text(json.dumps(content))
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / integrity.NAME).write_text("[]")
    assert last_complete_checkpoint(str(tmp_path)) is None
