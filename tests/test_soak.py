"""A slice of the campaign of `make soak`: 20 kills at file operations, and that it would see a fault."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from soak.campaign import differences, trials
from soak.killing import Kill, RunFailed, run

KILLS = 20


def test_twenty_kills_at_file_operations_change_nothing(tmp_path) -> None:
    done = []
    for trial in trials(seed=1, folder=tmp_path, only_operations=True):
        assert trial.faults == [], trial
        done.append(trial)
        if sum(len(killed.kills) for killed in done) >= KILLS:
            break
    assert sum(trial.resumes for trial in done) > KILLS / 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 14 steps that saves at every second one."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert run(folder, SCENARIO, resume=False)
    return folder


SCENARIO = {"method": "gmp", "model": "batch norm", "target_sparsity": 0.5, "num_prunings": 2, "save_steps": 2}


def one_bit(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["last.bias"][0] = tensors["last.bias"][0].nextafter(tensors["last.bias"][1])
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})


def masks_gone(checkpoint: Path) -> None:
    (checkpoint / "bimp_masks.safetensors").unlink()


def another_loss(checkpoint: Path) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    next(entry for entry in state["log_history"] if "loss" in entry)["loss"] += 0.01
    path.write_text(json.dumps(state))


def another_state(checkpoint: Path) -> None:
    path = checkpoint / "bimp_state.json"
    path.write_text(path.read_text().replace('"cycle": 2', '"cycle": 1'))


def gone(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


@pytest.mark.parametrize("damage", [one_bit, masks_gone, another_loss, another_state, gone])
def test_a_difference_is_found(finished, tmp_path, damage) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    assert differences(finished, other) == []
    damage(other / "checkpoint-14")
    assert len(differences(finished, other)) == 1


def test_a_run_that_fails_is_no_killed_one(tmp_path) -> None:
    with pytest.raises(RunFailed, match="target_sparsity=2"):
        run(tmp_path / "run", SCENARIO | {"target_sparsity": 2}, resume=False, kill=Kill(operation=10**6))
