r"""Compare ways to prune and retrain a dense model: schedules, allocations, one shot against iterative, over seeds.

    python recipes/retraining_study.py recipes/configs/cifar10_study.yaml --dataset_name path/to/cifar10 \
        --output_dir out/study

For every seed, or once with `dense_seed`, a dense model is trained, and pruned from there in every combination of a
grid. Each run is a folder with its `settings.json`. Call it again after an interruption: a finished run is not run
again, a killed dense training goes on from its last checkpoint. Writes `table.md`, all grids with mean and standard
deviation over the seeds, after every run.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from comparison.jobs import combinations, do_run, mean_and_deviation
from comparison.recipe import load_recipe
from shared.cli import read_config

NEEDED = ("recipe", "base", "seeds", "dense", "grids", "final", "model_key")


def pruning_config(study: dict, grid: dict, choice: dict, dense: dict, dense_dir: Path, seed: int) -> dict:
    """The configuration of one pruning of a dense model; `retrain_ratio` is in lengths of the dense training."""
    model = {study["model_key"]: f"{study['model_prefix']}{dense_dir}"}
    config = study["common"] | grid.get("fixed", {}) | choice | model
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
        mean_and_deviation([study["scale"] * value for value in after], 2),
        mean_and_deviation([study["scale"] * value for value in retrained], 2),
        mean_and_deviation(speedups, 1),
        "/".join(map(str, collapsed)),
    ]


def table(study: dict, results: dict[str, list[tuple[dict, list[dict]]]], dense: list[dict]) -> str:
    metric, unit = study["metric"], " (%)" if study["scale"] == 100 else ""
    score = mean_and_deviation([study["scale"] * r[study["final"]][metric] for r in dense], 2)
    lines = [
        f"Dense: {study['final']} {metric}{unit} {score}, {dense[0]['plan']['total_steps']} steps, {len(dense)} seeds."
    ]
    for name, rows in results.items():
        if not rows:
            continue
        header = [*rows[0][0], "peak rate", f"{metric} after pruning{unit}", f"{study['final']} {metric}{unit}"]
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
    try:
        study = read_config(args.config)
        if missing := [name for name in NEEDED if name not in study]:
            raise ValueError(f"{args.config} lacks {', '.join(missing)}.")
        base = read_config(args.config.parent / study["base"])
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    pruning_keys = ("target_sparsity", "num_cycles", "dense_ratio", "retrain_schedule", "num_train_epochs")
    given = {"dataset_name": args.dataset_name} if args.dataset_name else {}
    study = {"scale": 100, "model_prefix": "", "dense_seed": None} | study
    study["common"] = {k: v for k, v in base.items() if k not in pruning_keys} | study.get("overrides", {}) | given
    recipe = load_recipe(study["recipe"])
    study["metric"] = recipe.METRIC
    output_dir = args.output_dir.absolute()
    dense_config = study["common"] | study["dense"] | {"method": "dense"}
    dense_config |= {"save_strategy": "epoch", "save_total_limit": 1}
    results = {name: [(choice, []) for choice in combinations(grid["vary"])] for name, grid in study["grids"].items()}
    total = len(study["seeds"]) * (1 + sum(map(len, results.values())))
    with tqdm(total=total, unit="run") as progress:
        dense = {}
        for seed in study["seeds"]:
            dense_seed = seed if study["dense_seed"] is None else study["dense_seed"]
            dense_dir = output_dir / f"dense-{dense_seed}"
            dense[dense_seed] = do_run(recipe, dense_dir, dense_config | {"seed": dense_seed})
            progress.update()
            for name, rows in results.items():
                for choice, runs in rows:
                    label = "-".join([name, *map(str, choice.values()), str(seed)])
                    config = pruning_config(study, study["grids"][name], choice, dense[dense_seed], dense_dir, seed)
                    runs.append(do_run(recipe, output_dir / label, config))
                    progress.update()
                    begun = {n: [(c, r) for c, r in rows if r] for n, rows in results.items()}
                    (output_dir / "table.md").write_text(table(study, begun, list(dense.values())))
    print((output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
