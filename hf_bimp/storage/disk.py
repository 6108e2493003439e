"""The disk that a run writes to: checked before training, cleaned of interrupted saves, and named where it is full."""

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .run_state import last_complete_checkpoint

# Of safetensors, which renames it once it is whole, and of ours (files.py).
TEMPORARY = re.compile(r"\.tmp\w{6}|bimp_\w+\.(json|png)\.part")
FULL = (errno.ENOSPC, errno.EDQUOT)
LITTLE = 1 << 24  # bytes; torch.save does not say why it could not write, and with less than this it is no riddle

logger = logging.get_logger(__name__)


def check_folder(directory: str | Path, to_write: bool = False) -> None:
    """Raises `ValueError` where `directory` is no folder and cannot become one, or nothing can be written there.

    With `to_write` it is made, and a file is written to it and removed; without, nothing changes on the disk.
    """
    path, existing = Path(directory).absolute(), _existing(directory)
    if not existing.is_dir():
        what = "a file" if existing == path else f"below the file {existing}"
        raise ValueError(f"output_dir={str(directory)!r} is {what}. Give a folder, or the name of a new one.")
    try:
        if to_write:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
    except OSError as error:
        if error.errno in FULL:
            raise OSError(error.errno, f"The disk of {directory} is full. Make room before training.") from error
        raise ValueError(
            f"output_dir={str(directory)!r} cannot be written: {error.strerror}. Give a folder that can, or change "
            "its permissions."
        ) from error


def remove_leftovers(output_dir: str | Path) -> None:
    """Removes the files of saves that a kill has cut off; they are as large as the model, and nothing reads them."""
    folder = Path(output_dir)
    for place in (folder, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        for path in place.iterdir() if place.is_dir() else ():
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                logger.warning(
                    f"{path} ({path.stat().st_size:,} bytes) is left from a save that was cut off; removed."
                )
                path.unlink(missing_ok=True)


@contextmanager
def full_disk_named(directory: str | Path) -> Iterator[None]:
    """An error of a full disk says so, whatever library it comes from, and what can be resumed from."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FullDiskError) or not _is_of_full_disk(error, directory):
            raise
        newest = last_complete_checkpoint(str(directory))
        go_on = "There is no complete checkpoint yet: make room and start again."
        if newest is not None:
            go_on = f"Make room and call train(resume_from_checkpoint=True): it goes on from {newest}."
        free = shutil.disk_usage(_existing(directory)).free
        raise FullDiskError(
            errno.ENOSPC,
            f"The disk of {getattr(error, 'filename', None) or directory} is full ({free:,} bytes are free), so "
            f"that saving was cut off. Nothing that had been saved before was touched. {go_on} save_total_limit "
            "keeps fewer checkpoints",
        ) from error


class FullDiskError(OSError):
    """A save found no room on the disk."""


def _is_of_full_disk(error: Exception, directory: str | Path) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    text = str(error)
    if "os error 28" in text or "No space left" in text:  # safetensors
        return True
    is_of_torch = isinstance(error, RuntimeError) and ("inline_container" in text or "iostream" in text)
    return is_of_torch and shutil.disk_usage(_existing(directory)).free < LITTLE


def _existing(directory: str | Path) -> Path:
    path = Path(directory).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())
