"""Two pictures of a run: its learning rate, sparsity and metric over the steps, and the sparsity of its layers."""

from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..methods import Method
from .results import is_number

PLOT_NAME = "bimp_run.png"
LAYERS_PLOT_NAME = "bimp_layers.png"
MOST_BARS = 120

logger = logging.get_logger(__name__)


def write_plot(directory: str, results: dict, log: list[dict], method: Method) -> None:
    """Learning rate, sparsity and main metric over the optimizer steps, as one PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(f"No {PLOT_NAME}: matplotlib is missing. Install it with: pip install hf_bimp[plots]")
        return
    done = max((entry["step"] for entry in log), default=0)
    steps = range(0, done, max(done // 2000, 1))
    figure = Figure(figsize=(8, 6), layout="constrained")
    rate, sparsity, metric = figure.subplots(3, 1, sharex=True)
    rate.plot(steps, [method.rate(step) * method.run.learning_rate for step in steps], color="tab:blue")
    rate.set_ylabel("learning rate")
    sparsity.plot(*_sparsity_points(log, method, steps), color="tab:orange")
    sparsity.set(ylabel="sparsity (%)", ylim=(-2, 102))
    name = results["main_metric"]
    if name is not None:
        points = _metric_points(log, name)
        metric.plot(*zip(*points, strict=True), marker=".", color="tab:green") if points else None
        metric.set_ylabel(name)
    metric.set_xlabel("optimizer step")
    for axis in (rate, sparsity, metric):
        axis.grid(alpha=0.3)
    _save(figure, Path(directory) / PLOT_NAME)


def _sparsity_points(log: list[dict], method: Method, steps: range) -> tuple[list[int], list[float]]:
    """Steps and sparsities (%): as planned, or where there is no plan as logged along the way."""
    if not method.traits.finds_sparsity:
        return list(steps), [100 * method.plan.phase(step).sparsity for step in steps]
    logged = [(entry["step"], 100 * entry["sparsity"]) for entry in log if "sparsity" in entry]
    return [step for step, _ in logged], [share for _, share in logged]


def write_layer_plot(directory: str, results: dict) -> None:
    """The sparsity of every layer as horizontal bars, in the order of their names, as one PNG.

    Of more than `MOST_BARS` the densest and the sparsest: text takes a picture's time.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # write_plot says so
    layers, number = results["sparsity"]["per_layer"], len(results["sparsity"]["per_layer"])
    if number > MOST_BARS:
        ranked = sorted(layers, key=lambda name: layers[name])
        shown = {*ranked[: MOST_BARS // 2], *ranked[-(MOST_BARS // 2) :]}
        layers = {name: share for name, share in layers.items() if name in shown}
    figure = Figure(figsize=(8, 1.5 + 0.16 * len(layers)), layout="constrained")
    axis = figure.subplots()
    axis.barh(list(layers), [100 * share for share in layers.values()], color="tab:orange")
    axis.axvline(100 * results["sparsity"]["prunable"], color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="sparsity (%), dashed: of all prunable weights", xlim=(0, 100), ylim=(len(layers) - 0.5, -0.5))
    if number > MOST_BARS:
        axis.set_title(
            f"the {MOST_BARS // 2} densest and the {MOST_BARS // 2} sparsest of {number} layers", fontsize=8
        )
    axis.tick_params(axis="y", labelsize=6)
    axis.grid(alpha=0.3, axis="x")
    _save(figure, Path(directory) / LAYERS_PLOT_NAME)


def _save(figure: Any, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        figure.savefig(part, dpi=120, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _metric_points(log: list[dict], name: str) -> list[tuple[int, float]]:
    keys = (f"eval_{name}", f"before_prune_{name}", f"after_prune_{name}")
    return [(entry["step"], entry[key]) for entry in log for key in keys if is_number(entry.get(key))]
