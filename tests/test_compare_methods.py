"""The comparison of methods: nothing is run twice, a kill or a failure costs one run, and the table says what ran."""

import json
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

import compare_methods
from comparison.jobs import Job, work
from comparison.table import markdown, numbers, ranks, table
from comparison.tuning import choose
from processes import PATIENCE, RECIPES, output_of_recipe, started, wait_until
from shared.cli import read_config


def write_study(folder: Path, **changes) -> list[str]:
    """A small study of digits; the arguments to run it with."""
    base = yaml.safe_load((RECIPES / "configs" / "digits_resnet20.yaml").read_text())
    base |= {"image_size": 8, "max_train_samples": 60, "max_test_samples": 20, "max_steps": 4, "use_cpu": True}
    base |= {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 16}
    study = {
        "recipe": "image_classification",
        "base": "base.yaml",
        "scale": 100,
        "sparsities": [0.5],
        "seeds": [1, 2],
        "methods": {"dnw": None},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "study.yaml").write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return [str(folder / "study.yaml"), "--output_dir", str(folder / "out")]


def run_here(monkeypatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *arguments])
    compare_methods.main()


def times_of(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in (folder / "out").glob("*/result.json")}


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]


def test_tuned_methods_end_in_a_table_and_are_not_run_again(tmp_path, monkeypatch, capsys) -> None:
    methods = {
        "bimp": {"grid": {"num_cycles": [1, 2]}},
        "hard gmp": {"method": "gmp", "settings": {"num_prunings": 2, "gmp_hard": True}},
        "str": {"grid": {"str_initial_threshold": [-100.0, -2.5]}},
    }
    arguments = write_study(tmp_path, methods=methods, sparsity_tolerance=0.3)
    run_here(monkeypatch, arguments)
    assert "| hard gmp |" in capsys.readouterr().out
    rows = rows_of(tmp_path)
    assert [(row["label"], row["seed"]) for row in rows] == [(label, seed) for label in methods for seed in (1, 2)]
    for row in rows:
        results = json.loads((tmp_path / "out" / f"{row['label']}-0.5-{row['seed']}" / "result.json").read_text())
        assert row["score"] == results["test"]["accuracy"] and row["validation"] == results["final"]["accuracy"]
        assert row["sparsity"] == results["sparsity"]["prunable"]
        assert row["theoretical_speedup"] == results["theoretical_speedup"] >= 1
    assert rows[0]["sparsity"] == pytest.approx(0.5, abs=1e-4) and rows[2]["method"] == "gmp"
    assert rows[4]["params"] == {"str_initial_threshold": -2.5}  # with -100 nothing is pruned
    trials = json.loads((tmp_path / "out" / "tune-bimp-0.5" / "result.json").read_text())["trials"]
    best = max(trials, key=lambda trial: trial["value"])
    assert len(trials) == 2 and rows[0]["params"] == best["params"]
    scores = [100 * row["score"] for row in rows[2:4]]
    cell = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
    assert cell in (tmp_path / "out" / "table.md").read_text()
    assert len(pd.read_csv(tmp_path / "out" / "table.csv")) == 3
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000

    before = times_of(tmp_path)
    assert len(before) == 8
    run_here(monkeypatch, arguments)
    assert times_of(tmp_path) == before
    with pytest.raises(SystemExit, match="hard gmp-0.5-1, .*hard gmp-0.5-2. Delete them"):
        changed = methods | {"hard gmp": {"method": "gmp", "settings": {"num_prunings": 1}}}
        run_here(monkeypatch, write_study(tmp_path, methods=changed, sparsity_tolerance=0.3))
    write_study(tmp_path, methods=methods, sparsity_tolerance=0.3)
    (tmp_path / "out" / "str-0.5-2" / "result.json").unlink()
    run_here(monkeypatch, arguments)
    after = times_of(tmp_path)
    assert {path.parent.name for path in before if after[path] != before[path]} == {"str-0.5-2"}


def test_a_failing_run_is_named_and_the_others_finish(tmp_path, monkeypatch, capsys) -> None:
    methods = {"dpf": {"settings": {"num_prunings": 100}}, "dnw": None}  # 4 steps have no room for 100
    arguments = write_study(tmp_path, methods=methods, seeds=[1])
    with pytest.raises(SystemExit, match="dpf-0.5-1"):
        run_here(monkeypatch, arguments)
    assert "dpf-0.5-1 failed, the others go on. ValueError: 4 optimizer steps" in capsys.readouterr().out
    assert "no room for 100 prunings" in (tmp_path / "out" / "dpf-0.5-1" / "error.txt").read_text()
    assert [row["label"] for row in rows_of(tmp_path)] == ["dnw"]
    arguments = write_study(tmp_path, methods={"dpf": {"settings": {"num_prunings": 2}}, "dnw": None}, seeds=[1])
    run_here(monkeypatch, arguments)
    assert [row["label"] for row in rows_of(tmp_path)] == ["dpf", "dnw"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"methods": {"obd": None}}, "'obd' is none of bimp, .*gmp"),
        ({"methods": {"lc": {"grid": {"num_cycles": [1, 2]}}}}, "num_cycles=1 is an argument of bimp"),
        ({"methods": {"lc": {"settings": {"weight_decay": 0.0}}}}, "works by weight decay"),
        ({"methods": {"lc": {"setings": {}}}}, "methods: lc: no such key: setings. The keys are: method, settings"),
        ({"methods": ["lc"]}, r"methods: \['lc'\] must be a mapping"),
        ({"methods": {"lc": 3}}, "methods: lc: 3 must be a mapping"),
        ({"methods": {"lc": []}}, r"methods: lc: \[\] must be a mapping"),
        ({"methods": {}}, "nothing to compare"),
        ({"methods": {"gmp": {"grid": {"num_prunings": 20}}}}, "grid: num_prunings: 20 must be a list"),
        ({"methods": {"gmp": {"grid": {"num_prunings": []}}}}, "must be a list of values to try"),
        ({"methods": {"gmp": {"sparsities": [1.5]}}}, "methods: gmp: sparsities.* strictly between 0 and 1"),
        ({"sparsities": 0.5}, "strictly between 0 and 1"),
        ({"sparsities": [0.5, 0.5]}, "strictly between 0 and 1"),
        ({"tune_at": 95}, "tune_at"),
        ({"methods": {"bimp": {"settings": {"granularity": "2:4"}}}, "sparsities": [0.5, 0.75]}, "at 0.75: .*0.75"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"recipe": "t5"}, "'t5' is none of image_classification"),
        ({"seed": [1]}, "The keys are: recipe, base"),
        ({"base": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_a_bad_study_is_refused_before_anything_runs(tmp_path, monkeypatch, changes, complaint) -> None:
    with pytest.raises(SystemExit, match=complaint):
        run_here(monkeypatch, write_study(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "- a list", "recipe: ["])
def test_a_file_that_is_no_study_is_refused(tmp_path, monkeypatch, content) -> None:
    arguments = write_study(tmp_path)
    (tmp_path / "study.yaml").write_text(content)
    with pytest.raises(SystemExit, match=r"study.yaml (must hold names and values|cannot be read)"):
        run_here(monkeypatch, arguments)


def test_small_numbers_of_a_config_are_numbers(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1e-4\nb: -2.5E+3\nc: 1e4x\nd: [5e-1, 0.1]\ne: 1.0e-4\nf: 12\n")
    expected = {"a": 1e-4, "b": -2500.0, "c": "1e4x", "d": [0.5, 0.1], "e": 1e-4, "f": 12}
    content = read_config(tmp_path / "a.yaml")
    assert content == expected and type(content["f"]) is int


def test_a_killed_comparison_goes_on(tmp_path) -> None:
    """With two workers then, who share what is left."""
    methods = {"dnw": None, "gmp": {"grid": {"num_prunings": [1, 2]}}}
    arguments = write_study(tmp_path, methods=methods, seeds=[1, 2, 3])
    with started(sys.executable, RECIPES / "compare_methods.py", *arguments, log=tmp_path / "log") as first:
        wait_until(lambda: times_of(tmp_path), first, tmp_path / "log")
        first.kill()
    before = times_of(tmp_path)
    output_of_recipe("compare_methods.py", *arguments, "--num_workers", "2")
    after = times_of(tmp_path)
    assert len(after) == 7 and all(after[path] == before[path] for path in before)
    assert [row["label"] for row in rows_of(tmp_path)] == ["dnw"] * 3 + ["gmp"] * 3


def test_workers_do_every_job_once_and_wait_for_what_it_needs(tmp_path) -> None:
    def do(folder: Path, config: dict) -> dict:
        with (folder / "done").open("a") as file:
            file.write("once\n")
        time.sleep(0.02)
        return {}

    def needing(folder: Path, config: dict) -> dict:
        assert all(job.is_done for job in jobs[:6])
        return do(folder, config)

    jobs = [Job(tmp_path / str(i), dict, do) for i in range(6)]
    jobs += [Job(tmp_path / str(i), dict, needing, needs=jobs[:6]) for i in range(6, 9)]
    workers = [threading.Thread(target=work, args=(jobs, lambda: None, False)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert [(job.folder / "done").read_text() for job in jobs] == ["once\n"] * 9


def test_what_needs_a_failed_job_fails_with_it(tmp_path) -> None:
    def fail(folder: Path, config: dict) -> dict:
        raise ValueError("out of luck")

    first = Job(tmp_path / "first", dict, fail)
    second = Job(tmp_path / "second", dict, lambda folder, config: {}, needs=[first])
    work([first, second], lambda: None, False)
    assert second.has_failed and not second.is_done
    assert "out of luck" in (tmp_path / "first" / "error.txt").read_text()


def test_the_point_within_tolerance_wins_over_a_better_one_far_off() -> None:
    trials = [
        {"params": "dense", "value": 0.99, "sparsity": 0.2},
        {"params": "near", "value": 0.80, "sparsity": 0.949},
        {"params": "better", "value": 0.85, "sparsity": 0.952},
        {"params": "close", "value": 0.84, "sparsity": 0.956},
    ]
    assert choose(trials, None, 0.0025)["params"] == "dense"
    assert choose(trials, 0.95, 0.0025)["params"] == "better"
    assert choose(trials, 0.957, 0.0005)["params"] == "close"


def frame_value(cell: str) -> float:
    return float(cell.strip("*").split()[0])


def score_rows(scores: dict[str, list[float]], sparsity: dict[str, float]) -> list[dict]:
    return [
        {
            "label": label,
            "seed": seed,
            "goal": 0.9,
            "score": score,
            "sparsity": sparsity.get(label, 0.9),
            "theoretical_speedup": 4.0 + seed,
            "throughput": 100.0 * (seed + 1),
        }
        for label, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_the_three_best_within_tolerance_are_marked() -> None:
    scores = {"a": [0.5, 0.7], "b": [0.9, 0.9], "c": [0.8, 0.6], "d": [0.99, 0.99], "e": [0.1, 0.2], "f": [0.9, 0.9]}
    rows = score_rows(scores, {"d": 0.91})
    assert ranks(rows, 0.0025) == {("b", 0.9): 0, ("f", 0.9): 0, ("c", 0.9): 2}
    frame = table(rows, "accuracy", 100, 0.0025)
    assert list(frame["method"]) == list("abcdef")
    assert frame["90 %: accuracy"][1] == "**90.00 ± 0.00** ¹" and frame["90 %: accuracy"][2] == "70.00 ± 14.14 ³"
    assert frame["90 %: sparsity (%)"][3] == "91.00 ± 0.00 †" and "†: not within 0.25 %" in markdown(frame, 2, 0.0025)
    assert frame["90 %: theoretical speedup"][0] == "4.5 ± 0.7"
    assert frame["throughput (samples/s)"][0] == "150 ± 71"
    plain = numbers(rows, 100, 0.0025)
    assert list(plain["score"][:3]) == pytest.approx([frame_value(cell) for cell in frame["90 %: accuracy"][:3]])
    assert plain["score_deviation"][2] == pytest.approx(14.142, abs=1e-3) and plain["rank"][1] == 1
    assert list(plain["is_off_goal"]) == ["†" in cell for cell in frame["90 %: sparsity (%)"]]


def test_every_shipped_comparison_can_be_planned(tmp_path) -> None:
    configs = sorted((RECIPES / "configs").glob("compare_*.yaml"))
    assert len(configs) >= 5
    for path in configs:
        study = compare_methods.Study.read(path)
        base = yaml.safe_load((path.parent / study.base).read_text()) | study.overrides | {"use_cpu": True}
        comparison = compare_methods.Comparison(study, base, tmp_path, None)
        assert len(comparison.runs) >= len(study.seeds) * len(study.methods)


def test_runs_of_an_older_search_are_refused_with_it(tmp_path, monkeypatch) -> None:
    run_here(monkeypatch, write_study(tmp_path, methods={"gmp": {"grid": {"num_prunings": [1, 2]}}}, seeds=[1]))
    arguments = write_study(tmp_path, methods={"gmp": {"grid": {"num_prunings": [1, 2, 3]}}}, seeds=[1])
    with pytest.raises(SystemExit, match="tune-gmp-0.5, .*gmp-0.5-1. Delete them"):
        run_here(monkeypatch, arguments)
    shutil.rmtree(tmp_path / "out" / "tune-gmp-0.5")
    with pytest.raises(SystemExit, match="with other settings: [^,]*out/gmp-0.5-1. Delete them"):
        run_here(monkeypatch, arguments)


def test_a_grid_that_changes_is_searched_anew(tmp_path, monkeypatch) -> None:
    """In the same storage; Optuna itself takes no other values of a parameter in one study."""
    for values in ([1, 2], [1, 2, 3]):
        methods = {"gmp": {"grid": {"num_prunings": values}}}
        arguments = write_study(tmp_path, methods=methods, seeds=[1])
        folder = f"out-{len(values)}"
        arguments[-1] = str(tmp_path / folder)
        run_here(monkeypatch, [*arguments, "--storage", f"sqlite:///{tmp_path / 'shared.db'}"])
        trials = json.loads((tmp_path / folder / "tune-gmp-0.5" / "result.json").read_text())["trials"]
        assert [trial["params"]["num_prunings"] for trial in trials] == values
