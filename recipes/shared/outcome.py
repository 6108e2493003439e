"""What every recipe does with its trainer: train, test, write the results, print them, and a model card or a push."""

from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import Dataset

from hf_bimp import BIMPTrainer
from hf_bimp.reporting.results import write_results


@dataclass
class Task:
    """What a recipe builds: a trainer, the data to test on in the end, and what describes it."""

    trainer: BIMPTrainer
    test: Dataset | None
    metric: str
    card: dict = field(default_factory=dict)

    def run(self) -> dict:
        """One whole run; what `bimp_results.json` holds in the end."""
        results = train_and_test(self.trainer, self.test)
        report(self.trainer, self.metric, self.card)
        return results


def train_and_test(trainer: BIMPTrainer, test: Dataset | None) -> dict:
    """The results of the whole run, with the metrics on `test` if there is such a split."""
    given = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(given).lower(), given))
    if test is not None:
        metrics = trainer.evaluate(test, metric_key_prefix="test")
        trainer.results["test"] = {name.removeprefix("test_"): value for name, value in metrics.items()}
    return trainer.results


def report(trainer: BIMPTrainer, metric: str, card: dict) -> None:
    """Writes and prints the results, and pushes the model if `push_to_hub` says so; `card` describes it."""
    directory = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        write_results(directory, trainer.results)
        print(summary(trainer.results, metric, directory.absolute()), flush=True)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


def summary(results: dict, metric: str, directory: Path) -> str:
    """The run as a table: metric and sparsity when dense, after each pruning and retraining, and in the end."""
    rows = [("dense", results["dense"], results["plan"]["initial_sparsity"])] if results["dense"] else []
    for pruning in results["prunings"]:
        if not pruning["after"]:
            continue  # pruning-stable methods have many, and measure the last one
        rows.append((f"pruning {pruning['cycle']}", pruning["after"], pruning["sparsity"]))
        if results["dense"]:
            rows.append((f"retraining {pruning['cycle']}", pruning["retrained"], pruning["sparsity"]))
    rows.append(("final (validation)", results["final"], results["sparsity"]["prunable"]))
    if "test" in results:
        rows.append(("final (test)", results["test"], results["sparsity"]["prunable"]))
    lines = [f"{'':20}{metric:>10}{'sparsity':>10}"]
    lines += [f"{name:20}{m.get(metric, float('nan')):10.4g}{sparsity:10.2%}" for name, m, sparsity in rows]
    lines.append(f"{results['sparsity']['all_parameters']:.2%} of all parameters are zero.")
    if results["theoretical_speedup"] is not None:
        lines.append(f"Theoretical speedup {results['theoretical_speedup']:.2f}, where zeros cost nothing.")
    if results["collapsed_layers"]:
        lines.append(f"Layer collapse: nothing is left of {', '.join(results['collapsed_layers'])}.")
    return "\n".join([*lines, f"Model, results and pictures: {directory}"])
