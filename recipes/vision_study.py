r"""Compare ways to prune one dense vision model: schedules, allocations, one shot against iterative, over seeds.

    python recipes/vision_study.py recipes/configs/cifar10_study.yaml --dataset_name path/to/cifar10 \
        --output_dir out/study

For every seed a dense model is trained, and pruned from there in every combination of a grid. Each run is a folder
with its `config.json`. Call it again after an interruption: a finished run is not run again, a killed dense training
goes on from its last checkpoint.
Writes `table.md`, all grids with mean and standard deviation over the seeds, after every run.
"""

import argparse
import importlib
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import yaml
from cli import parse_config
from tqdm import tqdm

from hf_bimp.checkpoint import last_complete_checkpoint
from hf_bimp.report import RESULTS_NAME


def run(recipe, directory: Path, config: dict) -> dict:
    """The results of a run; does it first, or what is left of it, unless it is finished."""
    done = directory / "study_results.json"
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        resume = {"resume_from_checkpoint": "true"} if last_complete_checkpoint(str(directory)) else {}
        config = config | {"output_dir": str(directory)} | resume
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        recipe.run(*parse_config(recipe.ARGUMENTS, config))
        (directory / RESULTS_NAME).rename(done)  # the mark that the recipe came to its end
    return json.loads(done.read_text())


def combinations(grid: dict) -> Iterator[dict]:
    """Every combination of what a grid varies."""
    for values in itertools.product(*grid["vary"].values()):
        yield dict(zip(grid["vary"], values, strict=True))


def pruning_config(study: dict, grid: dict, choice: dict, dense: dict, dense_dir: Path, seed: int) -> dict:
    """The configuration of one pruning of a dense model; `retrain_ratio` is in lengths of the dense training."""
    config = study["common"] | grid.get("fixed", {}) | choice | {study["model_key"]: f"local-dir:{dense_dir}"}
    steps = dense["plan"]["total_steps"]
    ratio = config.pop("retrain_ratio")
    budget = {"dense_ratio": 0.0, "dense_steps": steps, "max_steps": round(ratio * steps)}
    return config | budget | {"seed": seed, "save_strategy": "no"}


def cells(study: dict, choice: dict, runs: list[dict]) -> list[str]:
    metric = study["metric"]
    after = [r["prunings"][-1]["after"][metric] for r in runs]
    retrained = [r[study["final"]][metric] for r in runs]
    speedups = [r["theoretical_speedup"] for r in runs]
    collapsed = [len(r["collapsed_layers"]) for r in runs]
    peaks = [r["prunings"][-1]["retrain_peak"] for r in runs]
    return [
        *(str(value) for value in choice.values()),
        mean_and_deviation(peaks, 4),
        mean_and_deviation([100 * value for value in after], 2),
        mean_and_deviation([100 * value for value in retrained], 2),
        mean_and_deviation(speedups, 1),
        "/".join(map(str, collapsed)),
    ]


def mean_and_deviation(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(study: dict, results: dict[str, list[tuple[dict, list[dict]]]], dense: list[dict]) -> str:
    metric = study["metric"]
    score = mean_and_deviation([100 * r[study["final"]][metric] for r in dense], 2)
    lines = [
        f"Dense: {score} % {study['final']} {metric}, {dense[0]['plan']['total_steps']} steps, {len(dense)} seeds."
    ]
    for name, rows in results.items():
        if not rows:
            continue
        header = [*rows[0][0], "peak rate", f"{metric} after pruning (%)", f"{study['final']} {metric} (%)"]
        header += ["theoretical speedup", "collapsed layers by seed"]
        body = [header, ["---"] * len(header), *(cells(study, choice, runs) for choice, runs in rows)]
        lines += ["", f"### {name}", "", *("| " + " | ".join(line) + " |" for line in body)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML: recipe, its base config, the dense run and the grids")
    parser.add_argument("--dataset_name", help="Hub id or local folder, in place of the config's")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    study = yaml.safe_load(args.config.read_text())
    base = yaml.safe_load((args.config.parent / study["base"]).read_text())
    pruning_keys = ("target_sparsity", "num_cycles", "dense_ratio", "retrain_schedule", "num_train_epochs")
    given = {"dataset_name": args.dataset_name} if args.dataset_name else {}
    study["common"] = {k: v for k, v in base.items() if k not in pruning_keys} | study.get("overrides", {}) | given
    recipe = importlib.import_module(study["recipe"])
    output_dir = args.output_dir.absolute()
    dense_config = study["common"] | study["dense"] | {"method": "dense"}
    dense_config |= {"save_strategy": "epoch", "save_total_limit": 1}
    results = {name: [(choice, []) for choice in combinations(grid)] for name, grid in study["grids"].items()}
    total = len(study["seeds"]) * (1 + sum(map(len, results.values())))
    with tqdm(total=total, unit="run") as progress:
        dense = []
        for seed in study["seeds"]:
            dense_dir = output_dir / f"dense-{seed}"
            dense.append(run(recipe, dense_dir, dense_config | {"seed": seed}))
            progress.update()
            for name, rows in results.items():
                for choice, runs in rows:
                    label = "-".join([name, *map(str, choice.values()), str(seed)])
                    config = pruning_config(study, study["grids"][name], choice, dense[-1], dense_dir, seed)
                    runs.append(run(recipe, output_dir / label, config))
                    progress.update()
                    begun = {n: [(c, r) for c, r in rows if r] for n, rows in results.items()}
                    (output_dir / "table.md").write_text(table(study, begun, dense))
    print((output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
