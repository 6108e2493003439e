"""What a run leaves beside the weights: `bimp_state.json` with every save, the masks with every checkpoint."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from ..schedules.dense_history import DenseHistory
from . import integrity
from .files import write_json

STATE_NAME = "bimp_state.json"
MASKS_NAME = "bimp_masks.safetensors"
METHOD_NAME = "bimp_method.safetensors"
STATISTICS_NAME = "bimp_statistics.safetensors"
MOST_PROCESSES = 1_000_000  # more are no number of processes, but damage
FORMAT_VERSION = 3  # 1, without a number: by version 0.1.0; 2 knew no identity; both are read still

logger = logging.get_logger(__name__)


def write_state(
    directory: str,
    settings: dict,
    state: Mapping[str, Any],
    statistics: Mapping[str, Tensor],
    history: DenseHistory | None,
    num_processes: int,
    identity: dict,
) -> None:
    """Writes what a resumed run must share (`settings`, `identity`), numbers of the method's `state`, the history."""
    content = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "identity": identity,
        "progress": {name: value for name, value in state.items() if not torch.is_tensor(value)},
        "num_processes": num_processes,
        "has_tensors": bool(_tensors(state)),
        "has_statistics": bool(statistics),
        "dense_history": None if history is None else asdict(history),
    }
    write_json(Path(directory) / STATE_NAME, content)


def write_tensors(directory: str, state: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> None:
    """Writes the tensors of the method's `state`, and the `statistics` of the criterion; no file for nothing."""
    _write_or_remove(Path(directory) / METHOD_NAME, _tensors(state))
    _write_or_remove(Path(directory) / STATISTICS_NAME, statistics)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def _write_or_remove(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.unlink(missing_ok=True)  # of a run that was here before
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(directory: str, device: torch.device) -> dict[str, Tensor]:
    """Those of the method's state."""
    return _read(Path(directory) / METHOD_NAME, device)


def read_statistics(directory: str, device: torch.device) -> dict[str, Tensor]:
    """What the criterion had gathered."""
    return _read(Path(directory) / STATISTICS_NAME, device)


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in load_file(path).items()} if path.is_file() else {}


def is_checkpoint(directory: str) -> bool:
    """Whether it is one of a run's checkpoints, rather than its final model."""
    return Path(directory).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")


def read_state(checkpoint: str) -> dict:
    """The state of a checkpoint to resume from. Raises `ValueError` where it is none of hf_bimp's."""
    path, masks = Path(checkpoint) / STATE_NAME, Path(checkpoint) / MASKS_NAME
    if not (path.is_file() and masks.is_file()):
        raise ValueError(
            f"{checkpoint} cannot be resumed: it lacks {STATE_NAME} or {MASKS_NAME}. Checkpoints of hf_bimp hold both "
            "unless save_only_model=True. Start afresh in another output_dir."
        )
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("format_version", 1) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {state['format_version']}, and this hf_bimp reads up to {FORMAT_VERSION}. "
            "Upgrade hf_bimp to the version that wrote it."
        )
    return state


def check_same_run(checkpoint: str, saved: dict, settings: dict, identity: dict, num_processes: int) -> None:
    """Raises `ValueError` where a checkpoint belongs to another run, and warns of another number of processes.

    `saved` is the checkpoint's state; `settings` and `identity` are those of the run that goes on from it. Versions
    before 3 of the format tell nothing of the identity.
    """
    before_the_choice = {"granularity": "weight", "allocation": "global", "criterion": "magnitude"}
    there, known = before_the_choice | saved["settings"], saved.get("identity", {})
    plans = _differences(there, settings)
    others = _differences(known, {name: value for name, value in identity.items() if name in known})
    if plans or others:
        raise ValueError(
            f"{checkpoint} was written {'under another plan' if plans else 'by another run'}, so it cannot be resumed "
            f"under this one. {'; '.join(plans + others)}. Resume with the same arguments and data, or choose another "
            "output_dir."
        )
    if saved["num_processes"] != num_processes:
        logger.warning(
            f"{checkpoint} was written by {saved['num_processes']} processes, and {num_processes} go on at the same "
            "batch size in all: they draw other random numbers and see the data in another order."
        )


def _differences(there: dict, now: dict) -> list[str]:
    now = json.loads(json.dumps(now))
    return [f"{name}: {there.get(name)} there, {value} now" for name, value in now.items() if there.get(name) != value]


def find_dense_history(name_or_path: str) -> DenseHistory | None:
    """The dense history beside the weights in a local folder or a Hub repository, if hf_bimp left one there."""
    if not name_or_path:
        return None
    try:
        path = cached_file(
            name_or_path,
            STATE_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:  # a folder that has moved since, or a repository that is gone
        logger.warning(f"No dense history can be read from {name_or_path}: {error}")
        return None
    history = path and json.loads(Path(path).read_text(encoding="utf-8"))["dense_history"]
    return DenseHistory(**history) if history else None


def damage(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being resumed: a file that is missing, cut off or damaged. None where it is whole.

    The trainer's state is written last. Every process lists the files that it has left, with sizes and checksums;
    versions before 3 of the format only have to be there.
    """
    try:
        trainer_state = _mapping(checkpoint / TRAINER_STATE_NAME)
        state = _mapping(checkpoint / STATE_NAME)
        processes, version = state["num_processes"], state.get("format_version", 1)
        if not isinstance(trainer_state["global_step"], int):
            return f"{TRAINER_STATE_NAME} tells of no step"
        if type(processes) is not int or type(version) is not int or not 0 < processes <= MOST_PROCESSES:
            return f"{STATE_NAME} is damaged: num_processes={processes!r}, format_version={version!r}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"{TRAINER_STATE_NAME} or {STATE_NAME} cannot be read ({type(error).__name__}: {error})"
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    names += [METHOD_NAME] if state.get("has_tensors") else []
    names += [STATISTICS_NAME] if state.get("has_statistics") else []
    names += [MASKS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME]  # a folder that was being deleted may lack any of its files
    if absent := [name for name in names if not _is_filled(checkpoint / name)]:
        return f"{absent[0]} is missing or empty"
    if 3 <= version <= FORMAT_VERSION:
        return integrity.damage(checkpoint, processes)  # weights among them, in whatever format
    if not any(_is_filled(checkpoint / name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return f"{SAFE_WEIGHTS_NAME} is missing or empty"
    return None


def _mapping(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {content!r:.40} in place of names and values")
    return content


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def is_complete(checkpoint: Path) -> bool:
    """Whether it can be resumed."""
    return damage(checkpoint) is None


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that is whole; says which ones it passes over, and why."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    folders = [f for f in Path(output_dir).glob(f"{prefix}*") if f.is_dir() and f.name[len(prefix) :].isdigit()]
    for folder in sorted(folders, key=lambda f: int(f.name[len(prefix) :]), reverse=True):
        if (reason := damage(folder)) is None:
            return os.fspath(folder)
        logger.warning(f"{folder} was not saved to its end, or damaged since, and is passed over: {reason}.")
    return None


def forget_completion(directory: str) -> None:
    """Drops the mark of completeness before a checkpoint folder is written anew, in case that is cut off."""
    if is_checkpoint(directory):
        (Path(directory) / TRAINER_STATE_NAME).unlink(missing_ok=True)
