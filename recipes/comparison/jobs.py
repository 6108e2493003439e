"""Many runs, each done once: folders with a mark of the finished run, claimed by one worker at a time."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from comparison.recipe import Recipe
from hf_bimp.storage.files import write_json
from hf_bimp.storage.run_state import last_complete_checkpoint
from shared.cli import parse_config

CONFIG_NAME = "settings.json"  # models write a config.json of their own
RESULT_NAME = "result.json"  # written last: the mark of a finished run
ERROR_NAME = "error.txt"
POLL_SECONDS = 1.0


def do_run(recipe: Recipe, folder: Path, config: dict) -> dict:
    """The results of a run of `recipe` in `folder`; does it first, or what is left of it, unless it is finished."""
    done = folder / RESULT_NAME
    if not done.is_file():
        write_json(folder / CONFIG_NAME, config)
        resume = {"resume_from_checkpoint": "true"} if last_complete_checkpoint(str(folder)) else {}
        config = config | {"output_dir": str(folder)} | resume
        start = time.perf_counter()
        result = recipe.build_task(*parse_config(recipe.ARGUMENTS, config)).run()
        write_json(done, result | {"seconds": time.perf_counter() - start})
    return json.loads(done.read_text())


def combinations(grid: dict[str, list]) -> list[dict]:
    """Every combination of what a grid varies; one, empty, of an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


@dataclass
class Job:
    """Work that leaves its configuration and its result in a folder, once all of `needs` have theirs."""

    folder: Path
    config: Callable[[], dict]  # asked for when all that it needs is done
    do: Callable[[Path, dict], dict]  # gives the result of that configuration in that folder
    needs: list["Job"] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return (self.folder / RESULT_NAME).is_file()

    @property
    def is_of_another_study(self) -> bool:
        """Whether the folder holds what another configuration has come to, all of it or up to a checkpoint.

        So does what was begun with needs that are of another study themselves, or gone.
        """
        saved = self.folder / CONFIG_NAME
        begun = saved.is_file() and (self.is_done or last_complete_checkpoint(str(self.folder)))
        if not begun:
            return False
        if any(not job.is_done or job.is_of_another_study for job in self.needs):
            return True
        return self.saved_config != json.loads(json.dumps(self.config()))

    @property
    def saved_config(self) -> dict:
        """What it was begun with."""
        return json.loads((self.folder / CONFIG_NAME).read_text())

    @property
    def has_failed(self) -> bool:
        return (self.folder / ERROR_NAME).is_file() or any(job.has_failed for job in self.needs)

    @property
    def is_ready(self) -> bool:
        return not self.is_done and not self.has_failed and all(job.is_done for job in self.needs)

    @property
    def result(self) -> dict:
        return json.loads((self.folder / RESULT_NAME).read_text())

    def try_to_do(self) -> bool:
        """Does the job unless another worker holds it; its lock falls with the process, whatever ends that."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "lock", timeout=0):
                if not self.is_ready:
                    return False
                try:
                    config = self.config()
                    write_json(self.folder / CONFIG_NAME, config)
                    result = self.do(self.folder, config)
                    if not self.is_done:
                        write_json(self.folder / RESULT_NAME, result)
                except Exception as error:  # of one run: the others go on
                    (self.folder / ERROR_NAME).write_text(traceback.format_exc())
                    tqdm.write(f"{self.folder} failed, the others go on. {type(error).__name__}: {error}")
        except Timeout:
            return False
        return True


def forget_failures(jobs: Sequence[Job]) -> None:
    """They are tried again."""
    for job in jobs:
        (job.folder / ERROR_NAME).unlink(missing_ok=True)


def work(jobs: Sequence[Job], after_each: Callable[[], None], show_progress: bool = True) -> None:
    """Does the jobs that no other worker does, until all are done or have failed."""
    with tqdm(total=len(jobs), unit="job", disable=not show_progress) as progress:
        while True:
            finished = sum(job.is_done or job.has_failed for job in jobs)
            progress.update(finished - progress.n)
            if finished == len(jobs):
                return
            # Listed anew after each, as it may have made others ready.
            if next((job for job in jobs if job.is_ready and job.try_to_do()), None) is not None:
                after_each()
            else:
                time.sleep(POLL_SECONDS)


def with_workers(count: int, command: Sequence[str]) -> list[subprocess.Popen]:
    """Starts `count - 1` more workers with `command`, and gives each, this process too, its share of the cores."""
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    if count > 1:
        import torch  # its threads are set by now

        torch.set_num_threads(int(threads))
    return [subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) for _ in range(count - 1)]
