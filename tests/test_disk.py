"""Disks that are full or cannot be written: said early, with the folder and the remedy, and nothing saved is lost."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from helpers import classifier, snapshot
from hf_bimp.storage import disk
from trainers import assert_same_tensors, make_trainer

SAVING = {"save_strategy": "steps", "save_steps": 4}
FULL_DEVICE = Path("/dev/full")  # every write to it fails as one to a full disk does

needs_full_device = pytest.mark.skipif(not FULL_DEVICE.exists(), reason="this system has no /dev/full")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Of the run that nothing disturbs."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), classifier(0.2), **SAVING)
    trainer.train()
    return snapshot(trainer.model)


# ---- Full ----


@needs_full_device
@pytest.mark.parametrize("name", ["bimp_state.json.part", "bimp_files.json.part", "optimizer.pt", "rng_state.pth"])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(tmp_path, monkeypatch, weights, name) -> None:
    if name.endswith((".pt", ".pth")):  # torch does not tell why it could not write: what is free is looked at
        real = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: real._replace(free=4096))
    trap = tmp_path / "checkpoint-8" / name
    trap.parent.mkdir()
    trap.symlink_to(FULL_DEVICE)
    trainer = make_trainer(tmp_path, classifier(0.2), **SAVING)
    with pytest.raises(disk.FullDiskError, match="is full.*Nothing that had been saved.*checkpoint-4") as caught:
        trainer.train()
    assert caught.value.errno == errno.ENOSPC and str(tmp_path) in str(caught.value)
    earlier = contents(tmp_path / "checkpoint-4")
    trap.unlink(missing_ok=True)
    resumed = make_trainer(tmp_path, classifier(0.2), **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(snapshot(resumed.model), weights)
    assert contents(tmp_path / "checkpoint-4") == earlier


@needs_full_device
def test_before_the_first_checkpoint_there_is_none_to_name(tmp_path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "bimp_state.json.part").symlink_to(FULL_DEVICE)
    with pytest.raises(OSError, match="no complete checkpoint yet: make room and start again"):
        make_trainer(tmp_path, **SAVING).train()


@needs_full_device
def test_what_only_reports_never_ends_a_run(tmp_path, caplog) -> None:
    for name in ("bimp_results.json.part", "bimp_layers.png.part", "bimp_run.png.part"):
        (tmp_path / name).symlink_to(FULL_DEVICE)
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    assert trainer.results["sparsity"]["prunable"] > 0.79 and (tmp_path / "model.safetensors").is_file()
    assert "No space left" in caplog.text


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_errors_of_full_disks_are_renamed(tmp_path, error, is_full) -> None:
    """Torch's writer fails for other reasons too: here, where there is room."""
    with pytest.raises(disk.FullDiskError if is_full else type(error)) as caught, disk.full_disk_named(tmp_path):
        raise error
    assert (caught.value.__cause__ is error) == is_full


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [24, 40, 64, 76, 88])
def test_real_full_disks(tmp_path, weights, kilobytes) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        settings = SAVING | {"save_steps": 1, "save_total_limit": 1}
        with pytest.raises(disk.FullDiskError, match="is full"):
            make_trainer(place, classifier(0.2), **settings).train()
        subprocess.run(["mount", "-o", "remount,size=16m", str(place)], check=True)
        resumed = make_trainer(place, classifier(0.2), **settings)
        resumed.train(resume_from_checkpoint=any((f / "trainer_state.json").exists() for f in place.glob("check*")))
        assert_same_tensors(snapshot(resumed.model), weights)
    finally:
        subprocess.run(["umount", str(place)], check=True)


# ---- Cannot be written ----


@pytest.mark.parametrize("below", ["", "runs/first"])
def test_a_file_in_the_place_of_the_folder(tmp_path, below) -> None:
    (tmp_path / "taken").write_text("of the user")
    with pytest.raises(ValueError, match="output_dir='.*taken.*file.*Give a folder"):
        make_trainer(tmp_path / "taken" / below)
    assert contents(tmp_path) == {"taken": b"of the user"}


def test_a_folder_that_cannot_be_written_is_noticed_before_training(tmp_path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path)
    steps = []
    monkeypatch.setattr(trainer, "training_step", lambda *args, **kwargs: steps.append(args))
    if os.geteuid() == 0:  # whom permissions do not hold back: a file system that is read-only does
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True)
        if made.returncode:
            pytest.skip("root without the right to mount: nothing can be made read-only")
    else:
        tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="output_dir=.*cannot be written: .*Give a folder that can"):
            trainer.train()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True) if os.geteuid() == 0 else tmp_path.chmod(0o700)
    assert steps == []


# ---- What kills leave ----


def test_files_of_interrupted_saves_are_removed_by_the_next_start(tmp_path, weights, caplog) -> None:
    make_trainer(tmp_path, classifier(0.2), **SAVING).train()
    left = [tmp_path / ".tmpA1b2C3", tmp_path / "checkpoint-8" / ".tmpZ9y8X7", tmp_path / "bimp_state.json.part"]
    kept = [tmp_path / ".tmp", tmp_path / "notes.part", tmp_path / ".tmpA1b2C3.txt", tmp_path / "own" / ".tmpA1b2C3"]
    (tmp_path / "own").mkdir()
    for path in left + kept:
        path.write_bytes(b"12345")
    resumed = make_trainer(tmp_path, classifier(0.2), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_tensors(snapshot(resumed.model), weights)
    assert not any(path.exists() for path in left) and all(path.read_bytes() == b"12345" for path in kept)
    assert ".tmpA1b2C3 (5 bytes) is left from a save that was cut off; removed" in caplog.text
