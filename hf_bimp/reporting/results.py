"""What a run did, read off its log: the plan table and `bimp_results.json`."""

import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..methods import Method
from ..pruning.layers import PRUNABLE_MODULES, weight_of
from ..pruning.masks import Masks
from ..storage.files import write_json

RESULTS_NAME = "bimp_results.json"
MOST_ROWS = 12  # of a printed plan
NOT_METRICS = ("epoch", "_runtime", "_per_second", "_time")  # how such entries of a log end


def final_metrics(log_history: list[dict], step: int) -> dict[str, float]:
    """The last evaluation at `step`, without the `eval_` prefix; empty where there was none."""
    recent = takewhile(lambda entry: entry["step"] >= step, reversed(log_history))  # a long run asks often
    found = [entry for entry in recent if entry["step"] == step and any(k.startswith("eval_") for k in entry)]
    return {k: v for entry in reversed(found) for k, v in metrics_under(entry, "eval_").items()}


def metrics_under(entry: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The metrics of `entry` whose names begin with `prefix`, without it; times and counts are none."""
    return {
        k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix) and not k.endswith(NOT_METRICS)
    }


def plan_table(method: Method, stays_dense: Mapping[str, str]) -> str:
    """The plan as text: a row a phase with its steps, its sparsity and the largest learning rate.

    `stays_dense` names the weight matrices that are not pruned, each with the reason (or "").
    """
    plan, rows = method.plan, [("phase", "steps", "sparsity", "peak learning rate")]
    for phase in plan.phases:
        name = f"cycle {phase.cycle}"
        if phase.cycle == 0:
            name = "dense" if plan.initial_sparsity == 0 else "zeros kept"
        steps = f"{phase.start}-{phase.start + phase.steps - 1} ({phase.steps})"
        sparsity = "as it comes" if method.traits.finds_sparsity else f"{phase.sparsity:.2%}"
        rows.append((name, steps, sparsity, method.describe_peak(phase)))
    if len(rows) > MOST_ROWS:
        rows[4:-3] = [("...", "", "", "")]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    weights = f"{method.masks.num_weights:,} prunable weights in {len(method.masks.weights)} tensors"
    lines = [f"Plan: {method.summary}; {weights}", *lines]
    if not method.traits.has_dense_phase and plan.schedule_steps < plan.total_steps:
        rate = method.rate(plan.total_steps - 1) * method.run.learning_rate
        lines.append(f"From step {plan.schedule_steps} on fine-tuning (FT) at the learning rate {rate:.3g}.")
    frozen = sum(not weight.requires_grad for weight in method.masks.weights.values())
    if frozen and plan.num_cycles:
        lines.append(
            f"{frozen} of these tensors are frozen: pruned, but never retrained. skip_modules leaves them out."
        )
    if stays_dense:
        named = [f"{name} ({reason})" if reason else name for name, reason in stays_dense.items()]
        shown = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        lines.append(f"Weight matrices that stay dense (embeddings aside): {shown}")
    return "\n".join(lines)


def collect_results(
    method: Method,
    settings: Mapping[str, Any],
    model: nn.Module,
    log_history: list[dict],
    final: dict[str, float],
    theoretical_speedup: float | None,
    samples_per_second: float | None,
    args: TrainingArguments,
    stays_dense: Mapping[str, str],
    diverged: bool,
) -> dict[str, Any]:
    """Everything worth keeping of a run, as JSON.

    `settings` are those that a resumed run must share, `final` the metrics of the final model, `samples_per_second`
    those of all processes, `stays_dense` the reasons of the weight matrices that are not pruned. Of weights that have
    `diverged` to NaN there is no sparsity.
    """
    prunings = _prunings(log_history)
    return {
        "method": method.name,
        "diverged": diverged,
        "plan": method.plan.to_dict(),
        "summary": method.summary,
        "paper": method.paper,
        "retrain_schedule": settings.get("retrain_schedule"),
        "knobs": settings.get("knobs"),
        "dense_schedule": settings["dense_schedule"],
        "dense": _dense_metrics(method, prunings, final),
        "prunings": prunings,
        "final": final,
        "pruning_stability": _stability(prunings[-1]) if prunings else {},
        "sparsity": None if diverged else sparsities(model, method.masks),
        "stays_dense": dict(stays_dense),
        "theoretical_speedup": theoretical_speedup,
        "collapsed_layers": method.masks.collapsed,
        "allocation": settings["allocation"],
        "criterion": settings["criterion"],
        "granularity": settings["granularity"],
        "throughput": {"training_samples_per_second": samples_per_second},
        "seed": args.seed,
        "num_processes": args.world_size,
        "versions": {name: _version(name) for name in ("hf_bimp", "torch", "transformers", "accelerate")},
        "main_metric": main_metric(args.metric_for_best_model, final),
    }


def _version(package: str) -> str:
    """A source tree on the path has no version, which must not fail a run at its end."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _dense_metrics(method: Method, prunings: list[dict], final: dict) -> dict[str, float]:
    """Those of the dense model that was pruned; pruning-stable methods have none, nor models that came sparse."""
    if not method.traits.has_dense_phase or method.plan.initial_sparsity > 0:
        return {}
    return prunings[0]["before"] if prunings else final


def _prunings(log: list[dict]) -> list[dict]:
    """Each with the metrics just before it, just after it, and after its retraining, which ends where the next is."""
    by_step: dict[int, list[dict]] = {}
    for entry in log:
        by_step.setdefault(entry["step"], []).append(entry)
    entries = [entry for entry in log if "prune_cycle" in entry]
    ends = [entry["step"] for entry in entries[1:]] + [max(by_step, default=0)]
    return [_pruning(entry, by_step[end]) for entry, end in zip(entries, ends, strict=False)]


def _pruning(entry: dict, at_its_end: list[dict]) -> dict:
    others = [metrics_under(other, "before_prune_") for other in at_its_end if other is not entry]
    before_next = [metrics for metrics in others if metrics]
    return {
        "step": entry["step"],
        **{k.removeprefix("prune_"): v for k, v in entry.items() if k.startswith("prune_")},
        "before": metrics_under(entry, "before_prune_"),
        "after": metrics_under(entry, "after_prune_"),
        "retrained": before_next[0] if before_next else final_metrics(at_its_end, at_its_end[0]["step"]),
    }


def _stability(pruning: dict) -> dict[str, float]:
    """1 - (t_pre - t_post) / t_pre (Bartoldson et al., 2020) of every metric that is a score, not a loss."""
    before, after = pruning["before"], pruning["after"]
    return {
        k: 1 - (before[k] - after[k]) / before[k]
        for k in before
        if not k.endswith("loss") and is_number(before[k]) and before[k] and is_number(after.get(k))
    }


def is_number(value: Any) -> bool:
    """Whether a metric can be compared: NaN, lists, texts and truth values cannot."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and -sys.float_info.max <= value <= sys.float_info.max


def sparsities(model: nn.Module, masks: Masks) -> dict[str, Any]:
    """Counted zeros, not planned ones: of the prunable weights, of all parameters, and of each prunable tensor.

    With what they are shares of: `num_prunable`, and `num_in_layers`, all weights of linear and convolution layers
    but those tied to embeddings.
    """
    zeros = {name: int((weight == 0).sum()) for name, weight in masks.weights.items()}
    parameters = list(model.parameters())
    layers = (weight_of(module) for module in model.modules() if isinstance(module, PRUNABLE_MODULES))
    embeddings = {id(weight_of(module)) for module in model.modules() if isinstance(module, nn.Embedding)}
    in_layers = {id(w): w.numel() for w in layers if w is not None and id(w) not in embeddings}  # tied ones once
    return {
        "prunable": sum(zeros.values()) / masks.num_weights,
        "all_parameters": sum(int((p == 0).sum()) for p in parameters) / sum(p.numel() for p in parameters),
        "per_layer": {name: zeros[name] / weight.numel() for name, weight in masks.weights.items()},
        "num_prunable": masks.num_weights,
        "num_in_layers": sum(in_layers.values()),
    }


def measures(results: dict) -> dict[str, float]:
    """What the log says of a finished run, as numbers that trackers can plot."""
    throughput = dict(results["throughput"])
    speed = throughput.pop("inference", {})
    single = {
        "theoretical_speedup": results["theoretical_speedup"],
        "measured_speedup": speed.get("speedup"),
        "size_compressed": results.get("deployment", {}).get("size", {}).get("compressed_bytes"),
        "sparsity": results["sparsity"]["prunable"],
        "collapsed_layers": len(results["collapsed_layers"]),
        **throughput,
    }
    stability = {f"pruning_stability_{name}": value for name, value in results["pruning_stability"].items()}
    layers = {f"layer_sparsity/{name}": value for name, value in results["sparsity"]["per_layer"].items()}
    return {name: value for name, value in (single | stability | layers).items() if value is not None}


def main_metric(chosen: str | None, metrics: dict[str, float]) -> str | None:
    """The metric to show: the one that chooses the best model, else the first that is not a loss, else the loss."""
    if chosen is not None:
        return chosen.removeprefix("eval_")
    numbers = [name for name, value in metrics.items() if is_number(value)]
    return next((name for name in numbers if not name.endswith("loss")), next(iter(numbers), None))


def write_results(directory: str, results: dict) -> None:
    write_json(Path(directory) / RESULTS_NAME, results)


def read_results(directory: Path) -> dict[str, Any] | None:
    """What a run wrote to `directory`; None where there is no such file. Raises `ValueError` where it is damaged."""
    path = directory / RESULTS_NAME
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Move it away or restore it.") from error
    if not isinstance(results, dict) or not isinstance(results.get("deployment", {}), dict):
        raise ValueError(f"{path} holds no results of a run. Move it away or restore it.")
    return results
