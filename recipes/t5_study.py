r"""Compare retraining schedules on one dense translation model, and with BIMP in the dense model's own budget.

    python recipes/t5_study.py recipes/configs/t5_multi30k_study.yaml \
        --dataset_name path/to/multi30k --output_dir out/study

One dense T5 is trained, then pruned once for every schedule and seed with a short retraining; last comes a whole BIMP
run. Each run is a folder with a `config.json` for `t5_wmt16.py`. Call it again after an interruption: a finished run
is not run again, a killed one goes on from its last checkpoint. Writes `table.md` beside the runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from hf_bimp.checkpoint import last_complete_checkpoint
from hf_bimp.report import RESULTS_NAME

RECIPE = Path(__file__).with_name("t5_wmt16.py")


def run(directory: Path, config: dict) -> dict:
    """The results of a run; does it first, or what is left of it, unless it is finished."""
    results = directory / RESULTS_NAME
    if not (results.is_file() and "bleu_signature" in json.loads(results.read_text())):  # the recipe's last addition
        directory.mkdir(parents=True, exist_ok=True)
        resume = {"resume_from_checkpoint": "true"} if last_complete_checkpoint(str(directory)) else {}
        path = directory / "config.json"
        path.write_text(json.dumps(config | {"output_dir": str(directory)} | resume, indent=2))
        subprocess.run([sys.executable, str(RECIPE), str(path)], check=True)
    return json.loads(results.read_text())


def retrainings(study: dict, dense: Path, dense_steps: int) -> Iterator[tuple[str, int, dict]]:
    """Schedule, seed and settings of every pruning of the dense model."""
    for seed in study["seeds"]:
        for schedule in study["schedules"]:
            yield (
                schedule,
                seed,
                {
                    "model_name_or_path": str(dense),
                    "max_steps": round(study["retrain_ratio"] * dense_steps),
                    "dense_ratio": 0.0,
                    "num_cycles": 1,
                    "target_sparsity": study["target_sparsity"],
                    "retrain_schedule": schedule,
                    "seed": seed,
                    "save_strategy": "no",
                },
            )


def row(name: str, runs: list[dict]) -> str:
    """A line of the table: BLEU after pruning and after retraining, on validation and test data."""
    pruning = runs[0]["prunings"][-1] if runs[0]["prunings"] else None
    cells = [name, "-" if pruning is None else f"{pruning['retrain_peak']:.2e}"]
    after = [r["prunings"][-1]["after"]["bleu"] for r in runs] if pruning else None
    test = [r["test"]["bleu"] for r in runs] if "test" in runs[0] else None
    columns = (after, [r["final"]["bleu"] for r in runs], test)
    cells += ["-" if column is None else mean_and_deviation(column) for column in columns]
    return "| " + " | ".join([*cells, f"{runs[0]['sparsity']['prunable']:.2%}"]) + " |"


def mean_and_deviation(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="YAML: `recipe` (a config of t5_wmt16.py) and the grid")
    parser.add_argument("--dataset_name", help="Hub id or local folder, if the recipe's config has none")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    study = yaml.safe_load(args.config.read_text())
    base = yaml.safe_load((args.config.parent / study["recipe"]).read_text())
    pruning_keys = ("target_sparsity", "num_cycles", "dense_ratio", "retrain_schedule")
    common = {key: value for key, value in base.items() if key not in pruning_keys}
    if args.dataset_name:
        base["dataset_name"] = common["dataset_name"] = args.dataset_name
    output_dir = args.output_dir.absolute()
    dense = run(output_dir / "dense", common | {"method": "dense", "seed": study["dense_seed"]})
    steps = dense["plan"]["total_steps"]
    runs: dict[str, list[dict]] = {schedule: [] for schedule in study["schedules"]}
    for schedule, seed, settings in retrainings(study, output_dir / "dense", steps):
        runs[schedule].append(run(output_dir / f"{schedule}-{seed}", common | settings))
    bimp_settings = {"seed": study["dense_seed"], "target_sparsity": study["target_sparsity"]}
    bimp = run(output_dir / "bimp", base | bimp_settings)
    header = "| run | peak learning rate | BLEU after pruning | validation BLEU | test BLEU | sparsity |"
    lines = [header, "| --- | --- | --- | --- | --- | --- |", row(f"dense, {steps} steps", [dense])]
    retrain_steps = round(study["retrain_ratio"] * steps)
    lines += [row(f"{schedule.upper()}, {retrain_steps} steps", runs[schedule]) for schedule in runs]
    lines.append(row(f"BIMP, {steps} steps in all", [bimp]))
    table = "\n".join(lines) + "\n"
    (output_dir / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
