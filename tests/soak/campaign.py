"""`make soak`: kills runs of every method again and again, and compares each with one that nothing disturbed.

python -m soak.campaign --seconds 1800 --seed 0: exits with 1 if any run differed, lost a checkpoint or did not resume.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tqdm import tqdm

from hf_bimp.methods import METHODS
from hf_bimp.storage.run_state import last_complete_checkpoint
from method_table import ours
from soak.killing import Kill, RunFailed, run
from soak.scenarios import draw

MOST_KILLS = 4  # of one run
OPERATIONS = (10, 40, 150)  # kills come soon after a start too, where a resumed run reads and writes


@dataclass
class Trial:
    """One run that was killed `kills` times; `faults` is empty where it ended as the undisturbed one."""

    scenario: dict[str, Any]
    kills: list[Kill] = field(default_factory=list)
    resumes: int = 0
    faults: list[str] = field(default_factory=list)


def trials(seed: int, folder: Path, only_operations: bool = False) -> Iterator[Trial]:
    """Endless trials: every method in turn, each with options drawn anew; equal seeds draw equal scenarios."""
    rng = random.Random(seed)
    methods = sorted(ours)
    rng.shuffle(methods)
    while True:
        for method in methods:
            yield one_trial(draw(method, rng), rng, folder, only_operations)


def one_trial(scenario: dict[str, Any], rng: random.Random, folder: Path, only_operations: bool = False) -> Trial:
    """Runs the scenario undisturbed and disturbed. Folders of trials without a fault are removed."""
    trial, whole, killed = Trial(scenario), folder / "whole", folder / "killed"
    for path in (whole, killed):
        shutil.rmtree(path, ignore_errors=True)
        path.with_suffix(".log").unlink(missing_ok=True)
    try:
        start = time.monotonic()
        run(whole, scenario, resume=False)
        seconds = time.monotonic() - start
        _until_it_ends(trial, killed, rng, seconds, only_operations)
        trial.faults += differences(whole, killed)
    except RunFailed as error:
        trial.faults.append(f"failed: {error}")
    if trial.faults:
        kept = Path(tempfile.mkdtemp(prefix="fault-", dir=folder))
        for path in folder.glob("*"):
            if path.name.startswith(("whole", "killed")):
                path.rename(kept / path.name)
        (kept / "trial.txt").write_text(f"{trial}\n")
    return trial


def _until_it_ends(trial: Trial, folder: Path, rng: random.Random, seconds: float, only_operations: bool) -> None:
    newest, most = -1, rng.randint(1, MOST_KILLS)
    while True:
        kill = None
        if len(trial.kills) < most:
            rank = rng.randrange(trial.scenario.get("processes", 1))
            kill = Kill(seconds=rng.random() ** 2 * seconds, rank=rank)
            if only_operations or rng.random() < 0.5:
                kill = Kill(operation=rng.randint(1, rng.choice(OPERATIONS)))  # the first process writes nearly all
        if run(folder, trial.scenario, resume=newest >= 0, kill=kill):
            return
        trial.kills.append(kill)
        checkpoint = last_complete_checkpoint(str(folder)) if folder.is_dir() else None
        step = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else -1
        if step < newest:
            trial.faults.append(f"lost: checkpoint {newest} was complete, and after {kill} the newest is {step}")
        trial.resumes += step >= 0
        newest = step


def differences(one: Path, other: Path) -> list[str]:
    """How two finished runs differ: weights, masks and state to the bit, what was measured to rounding."""
    found = _of_tensors(one / "model.safetensors", other / "model.safetensors")
    last = [max(folder.glob("checkpoint-*"), key=_step) for folder in (one, other)]
    if last[0].name != last[1].name:
        return [*found, f"the last checkpoints are {last[0].name} and {last[1].name}"]
    for name in ("model.safetensors", "bimp_masks.safetensors", "bimp_method.safetensors"):
        found += _of_tensors(last[0] / name, last[1] / name)
    for name in ("bimp_state.json", "trainer_state.json"):
        found += _of_values(name, *(_plain(json.loads((folder / name).read_text())) for folder in last))
    results = [_plain(json.loads((folder / "bimp_results.json").read_text())) for folder in (one, other)]
    return found + _of_values("bimp_results.json", *results)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _of_tensors(one: Path, other: Path) -> list[str]:
    if one.is_file() != other.is_file():
        return [f"only one run has {one.name}"]
    mine, theirs = (load_file(path) if path.is_file() else {} for path in (one, other))
    if mine.keys() != theirs.keys():
        return [f"{one.name} has other names"]
    # Bytes, for NaN is not equal to itself.
    return [
        f"{one.name}: {name}"
        for name in mine
        if mine[name].dtype != theirs[name].dtype
        or mine[name].numpy(force=True).tobytes() != theirs[name].numpy(force=True).tobytes()
    ]


def _plain(value: Any) -> Any:
    """Without what a clock or a folder's name decides."""
    if isinstance(value, dict):
        return {
            name: Path(item).name if name == "best_model_checkpoint" and item else _plain(item)
            for name, item in value.items()
            if not name.endswith(("_runtime", "_per_second", "throughput", "_dir"))
        }
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _of_values(where: str, one: Any, other: Any) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [fault for name in one for fault in _of_values(f"{where}/{name}", one[name], other[name])]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [fault for at, (mine, theirs) in pairs for fault in _of_values(f"{where}/{at}", mine, theirs)]
    if type(one) is type(other) and (
        one == other or (isinstance(one, float) and one == pytest.approx(other, rel=1e-5))
    ):
        return []
    return [f"{where}: {str(one)[:100]} and {str(other)[:100]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="no trial begins after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where runs are written, and kept if they differ")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    end, done = time.monotonic() + args.seconds, []
    with tqdm(total=round(args.seconds), unit="s") as bar:
        for trial in trials(args.seed, folder):
            done.append(trial)
            bar.n = min(bar.total, round(bar.total - (end - time.monotonic())))
            bar.set_postfix(
                trials=len(done), kills=sum(len(t.kills) for t in done), faults=sum(bool(t.faults) for t in done)
            )
            for fault in trial.faults:
                bar.write(f"{trial.scenario}: {fault}")
            if time.monotonic() > end:
                break
    print(table(done))
    return int(any(trial.faults for trial in done))


def table(done: list[Trial]) -> str:
    """Counts of a campaign, by method and in all."""
    rows = ["method     trials  kills  at files  resumes  faults"]
    for name in [*sorted(ours & METHODS.keys()), "all"]:
        mine = [trial for trial in done if name in ("all", trial.scenario["method"])]
        at_files = sum(kill.operation is not None for trial in mine for kill in trial.kills)
        counts = Counter(
            trials=len(mine),
            kills=sum(len(trial.kills) for trial in mine),
            at_files=at_files,
            resumes=sum(trial.resumes for trial in mine),
            faults=sum(bool(trial.faults) for trial in mine),
        )
        rows.append(
            f"{name:10}{counts['trials']:7}{counts['kills']:7}{at_files:10}{counts['resumes']:9}{counts['faults']:8}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
