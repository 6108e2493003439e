"""The results of a comparison: rows as JSON lines, the table as Markdown and CSV, and a plot."""

import json
from pathlib import Path

import pandas as pd

from comparison.jobs import mean_and_deviation

MARKS = ("**{}** ¹", "{} ²", "{} ³")
OFF_GOAL = " †"


def row(label: str, method: str, seed: int, goal: float, params: dict, metric: str, result: dict) -> dict:
    """What is kept of one run; `metric` is that of the test data, or of the validation data where there is none."""
    results = {"test": {}} | result
    return {
        "label": label,
        "method": method,
        "seed": seed,
        "goal": goal,
        "params": params,
        "validation": results["final"][metric],
        "score": results["test"].get(metric, results["final"][metric]),
        "sparsity": results["sparsity"]["prunable"],
        "theoretical_speedup": results["theoretical_speedup"],
        "throughput": results["throughput"]["training_samples_per_second"],
        "pruning_stability": results["pruning_stability"].get(metric),
        "seconds": results["seconds"],
    }


def write_rows(rows: list[dict], path: Path) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)


def groups(rows: list[dict]) -> dict[tuple[str, float], pd.DataFrame]:
    """The rows of every label and goal, in the order in which they come."""
    frame = pd.DataFrame(rows)
    return {key: group for key, group in frame.groupby(["label", "goal"], sort=False)}


def is_off_goal(group: pd.DataFrame, tolerance: float) -> bool:
    """Whether the runs ended, in the mean, farther from their goal than `tolerance`."""
    return abs(group["sparsity"].mean() - group["goal"].iloc[0]) > tolerance


def ranks(rows: list[dict], tolerance: float) -> dict[tuple[str, float], int]:
    """0, 1 and 2 for the three best mean scores at each goal, among those that reach it; equal ones share a rank."""
    scores: dict[float, dict] = {}
    for (label, goal), group in groups(rows).items():
        if not is_off_goal(group, tolerance):
            scores.setdefault(goal, {})[label] = group["score"].mean()
    places = {
        (label, goal): sum(other > score for other in at_goal.values())
        for goal, at_goal in scores.items()
        for label, score in at_goal.items()
    }
    return {key: place for key, place in places.items() if place < len(MARKS)}


def _cells(group: pd.DataFrame, rank: int | None, off_goal: bool, scale: float) -> list[str]:
    score = mean_and_deviation(list(group["score"] * scale), 2)
    speedup = (
        "-" if group["theoretical_speedup"].isna().any() else mean_and_deviation(list(group["theoretical_speedup"]), 1)
    )
    sparsity = mean_and_deviation(list(group["sparsity"] * 100), 2) + (OFF_GOAL if off_goal else "")
    return [score if rank is None else MARKS[rank].format(score), speedup, sparsity]


def table(rows: list[dict], metric: str, scale: float, tolerance: float) -> pd.DataFrame:
    """A line a method, and three columns a goal, as in Table 2 of the paper."""
    grouped, places = groups(rows), ranks(rows, tolerance)
    goals = sorted({goal for _, goal in grouped})
    lines = {}
    for label in dict.fromkeys(label for label, _ in grouped):
        rates = [r["throughput"] for r in rows if r["label"] == label and r["throughput"] is not None]
        line = {"method": label, "throughput (samples/s)": mean_and_deviation(rates, 0) if rates else "-"}
        for goal in goals:
            group = grouped.get((label, goal))
            cells = ["-"] * 3
            if group is not None:
                cells = _cells(group, places.get((label, goal)), is_off_goal(group, tolerance), scale)
            names = (metric, "theoretical speedup", "sparsity (%)")
            line |= {f"{100 * goal:g} %: {name}": cell for name, cell in zip(names, cells, strict=True)}
        lines[label] = line
    return pd.DataFrame(lines.values())


def numbers(rows: list[dict], scale: float, tolerance: float) -> pd.DataFrame:
    """The table as numbers: a line for each method at each goal, with means and standard deviations."""
    places = ranks(rows, tolerance)
    lines = []
    for (label, goal), group in groups(rows).items():
        line = {"method": label, "goal": goal, "seeds": len(group)}
        for name, factor in (("score", scale), ("theoretical_speedup", 1), ("sparsity", 1), ("throughput", 1)):
            values = factor * group[name].astype(float)
            line |= {name: values.mean(), f"{name}_deviation": values.std()}
        place = places.get((label, goal))
        lines.append(
            line | {"is_off_goal": is_off_goal(group, tolerance), "rank": None if place is None else place + 1}
        )
    return pd.DataFrame(lines)


def markdown(frame: pd.DataFrame, seeds: int, tolerance: float) -> str:
    body = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    lines = ["| " + " | ".join(line) + " |" for line in body]
    note = "One seed." if seeds == 1 else f"Mean and standard deviation over up to {seeds} seeds."
    note += " ¹ ² ³: the three best at each goal."
    if any(OFF_GOAL in cell for cell in frame.to_numpy().ravel()):
        note += f"{OFF_GOAL}: not within {100 * tolerance:g} % of the goal, and not ranked."
    return "\n".join([*lines, "", note]) + "\n"


def write_plot(rows: list[dict], metric: str, scale: float, path: Path) -> None:
    """The metric over the sparsity that was reached, a line a method, with standard deviations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    frame = pd.DataFrame(rows)
    for label, runs in frame.groupby("label", sort=False):
        by_goal = runs.groupby("goal")[["sparsity", "score"]]
        means, deviations = by_goal.mean().sort_values("sparsity"), by_goal.std().fillna(0)
        errors = deviations.loc[means.index]
        axis.errorbar(
            100 * means["sparsity"],
            scale * means["score"],
            xerr=100 * errors["sparsity"],
            yerr=scale * errors["score"],
            marker="o",
            capsize=3,
            label=label,
        )
    axis.set(xlabel="sparsity (%)", ylabel=metric)
    axis.grid(alpha=0.3)
    axis.legend()
    part = path.with_name("part-" + path.name)
    figure.savefig(part, dpi=120)
    part.replace(path)


def write_all(rows: list[dict], directory: Path, metric: str, scale: float, tolerance: float) -> None:
    """runs.jsonl, table.md, table.csv and comparison.png of the runs so far."""
    write_rows(rows, directory / "runs.jsonl")
    frame = table(rows, metric, scale, tolerance)
    seeds = len({row["seed"] for row in rows})
    for name, text in (
        ("table.md", markdown(frame, seeds, tolerance)),
        ("table.csv", numbers(rows, scale, tolerance).to_csv(index=False)),
    ):
        part = directory / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(directory / name)
    write_plot(rows, metric, scale, directory / "comparison.png")
