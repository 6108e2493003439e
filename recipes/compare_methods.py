r"""Compare sparsification methods at one total budget: methods x sparsities x seeds, each tuned on held-out data.

    python recipes/compare_methods.py  # offline: all nine methods on scikit-learn's digits, under 5 minutes
    python recipes/compare_methods.py recipes/configs/compare_cifar10_small.yaml --dataset_name path/to/cifar10 \
        --output_dir out/cifar10 [--num_workers 2] [--storage sqlite:///shared/tuning.db]

Call it again after an interruption: a finished run is not run again, a killed one goes on from its last checkpoint.
Several workers (`--num_workers`, or calls beside each other on one output_dir) share the runs out among themselves;
machines with output_dirs of their own share the tuning through one Optuna `--storage`. Side by side they slow each
other down, so compare throughput only within one call. Writes `runs.jsonl`, `table.md`, `table.csv` and
`comparison.png` after every run.
"""

import argparse
import json
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path
from shutil import rmtree

from filelock import FileLock

from comparison.jobs import ERROR_NAME, Job, combinations, do_run, forget_failures, with_workers, work
from comparison.recipe import load_recipe
from comparison.study import Entry, Study
from comparison.table import row, write_all
from comparison.tuning import Search, choose
from hf_bimp.methods import METHODS, setting_names
from shared.cli import CONFIGS, parse_config, read_config

DEFAULT_CONFIG = CONFIGS / "compare_digits.yaml"
ALL_KNOBS = {name for method in METHODS.values() for name in setting_names(method)}
UNSAVED = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "evaluate_prunings": False,
    "measure_deployment": False,
}  # trials of a grid


class Comparison:
    """The jobs of a study, and the table of what is finished."""

    def __init__(self, study: Study, base: dict, output_dir: Path, storage: str | None):
        self.study, self.base, self.directory = study, base, output_dir
        self.storage = storage or f"sqlite:///{output_dir / 'tuning.db'}"
        self.recipe = load_recipe(study.recipe)
        self.runs: list[tuple[str, Entry, float, int, Job]] = []
        self.searches: dict[tuple[str, float | None], Job] = {}
        for label, entry in study.entries.items():
            self._check(label, entry)
            for goal in entry.sparsities or study.sparsities:
                search = self._search(label, entry, goal)
                for seed in study.seeds:
                    job = Job(
                        output_dir / f"{label}-{goal:g}-{seed}",
                        partial(self._tuned_config, label, entry, goal, seed),
                        self._run,
                        needs=[search] if search else [],
                    )
                    self.runs.append((label, entry, goal, seed, job))

    @property
    def jobs(self) -> list[Job]:
        return [*self.searches.values(), *(job for *_, job in self.runs)]

    def config(self, entry: Entry, goal: float, seed: int, params: dict) -> dict:
        """The recipe's configuration of one run: the base's without what belongs to other methods."""
        own = set(setting_names(METHODS[entry.method]))
        base = {key: value for key, value in self.base.items() if key in own or key not in ALL_KNOBS}
        base.pop("target_sparsity", None)
        sparsity = {} if entry.is_implicit else {"target_sparsity": goal}
        return base | sparsity | entry.settings | params | {"method": entry.method, "seed": seed}

    def params(self, label: str, entry: Entry, goal: float) -> dict:
        """The tuned hyperparameters; those of the only point where there is no search."""
        search = self._search(label, entry, goal)
        if search is None:
            return combinations(entry.grid)[0]
        wanted = goal if entry.is_implicit else None
        return choose(search.result["trials"], wanted, self.study.sparsity_tolerance)["params"]

    def _check(self, label: str, entry: Entry) -> None:
        """Has the arguments refuse what cannot work before anything runs."""
        points, goals = combinations(entry.grid), entry.sparsities or self.study.sparsities
        if len(points) > 1 and self.study.tune_at and self.study.tune_at not in goals:
            goals = [*goals, self.study.tune_at]
        for goal, point in [(goals[0], point) for point in points] + [(goal, points[0]) for goal in goals[1:]]:
            config = self.config(entry, goal, 0, point) | {"output_dir": str(self.directory)}
            try:
                parse_config(self.recipe.ARGUMENTS, config)
            except ValueError as error:
                raise ValueError(f"{label}, {point} at {goal:g}: {error}") from error

    def _search(self, label: str, entry: Entry, goal: float) -> Job | None:
        if len(combinations(entry.grid)) == 1:
            return None
        at = None if entry.is_implicit else self.study.tune_at or goal
        if (label, at) not in self.searches:
            folder = self.directory / (f"tune-{label}" + ("" if at is None else f"-{at:g}"))
            config = self.config(entry, at or goal, self.study.tuning_seed, {}) | UNSAVED
            self.searches[label, at] = Job(folder, lambda: {"settings": config, "grid": entry.grid}, self._tune)
        return self.searches[label, at]

    def _tune(self, folder: Path, config: dict) -> dict:
        settings = config["settings"] | {"output_dir": str(folder)}
        # With other settings, or another grid, it is another study: the storage outlives a change of the file.
        content = sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{folder.name}-{content}"
        return Search(self.recipe, settings, config["grid"], self.recipe.METRIC, name, self.storage).run()

    def _tuned_config(self, label: str, entry: Entry, goal: float, seed: int) -> dict:
        return self.config(entry, goal, seed, self.params(label, entry, goal))

    def _run(self, folder: Path, config: dict) -> dict:
        result = do_run(self.recipe, folder, config)
        for checkpoint in folder.glob("checkpoint-*"):
            rmtree(checkpoint)
        return result

    def write(self) -> None:
        """The files of all that is finished."""
        rows = []
        for label, entry, goal, seed, job in self.runs:
            if job.is_done:
                params = {name: job.saved_config[name] for name in entry.grid}
                rows.append(row(label, entry.method, seed, goal, params, self.recipe.METRIC, job.result))
        if rows:
            study = self.study
            with FileLock(self.directory / "table.lock"):
                write_all(rows, self.directory, self.recipe.METRIC, study.scale, study.sparsity_tolerance)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=DEFAULT_CONFIG, help="YAML: see comparison/study.py")
    parser.add_argument("--dataset_name", help="Hub id or local folder, in place of the config's")
    parser.add_argument("--output_dir", type=Path, default=Path("out/comparison"))
    parser.add_argument("--num_workers", type=int, default=1, help="runs side by side on this machine (1)")
    parser.add_argument("--storage", help="Optuna storage of the tuning; by default a file in output_dir")
    parser.add_argument("--is_extra_worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.num_workers < 1:
        sys.exit(f"--num_workers {args.num_workers}: at least 1.")
    output_dir = args.output_dir.absolute()
    try:
        study = Study.read(args.config)
        base = read_config(args.config.parent / study.base) | study.overrides
        if args.dataset_name:
            base["dataset_name"] = args.dataset_name
        comparison = Comparison(study, base, output_dir, args.storage)
    except (ValueError, OSError) as error:
        sys.exit(f"{args.config}: {error}")
    if stale := [str(job.folder) for job in comparison.jobs if job.is_of_another_study]:
        sys.exit(f"Begun with other settings: {', '.join(stale)}. Delete them, or choose another --output_dir.")
    output_dir.mkdir(parents=True, exist_ok=True)
    others = []
    if not args.is_extra_worker:
        forget_failures(comparison.jobs)
        others = with_workers(args.num_workers, [*sys.argv, "--is_extra_worker"])
    work(comparison.jobs, comparison.write, show_progress=not args.is_extra_worker)
    for other in others:
        other.wait()
    comparison.write()
    if args.is_extra_worker:
        return
    if (output_dir / "table.md").is_file():
        print((output_dir / "table.md").read_text(encoding="utf-8"))
    print(f"Rows, table and plot: {output_dir}")
    failed = [job.folder / ERROR_NAME for job in comparison.jobs if (job.folder / ERROR_NAME).is_file()]
    if failed:
        sys.exit("Failed: " + ", ".join(map(str, failed)) + ". They are tried again at the next call.")


if __name__ == "__main__":
    main()
