"""A run that is killed, at any step or while saving, and resumed ends in the very weights of one that was not."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import At, classification_items, classifier, run_arguments, sparsity, tiny_t5, translation_items
from hf_bimp import BIMPArguments, BIMPTrainer
from method_table import PRUNING_STABLE, SHORT
from processes import PATIENCE
from trainers import assert_same_tensors, make_trainer

# Children come from a server that has the libraries imported and no threads yet, so that starting one takes no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_bimp.trainer", "matplotlib.figure"])

STEPS = 14  # in epochs of 4 or, with accumulation, of 3 steps: prunings and kills come in the middle of epochs
BOUNDARIES = (6, 10)


class NoisyPoints(torch.utils.data.Dataset):
    """Random augmentation: each item draws anew."""

    def __init__(self):
        self.items = classification_items()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        return {"x": item["x"] + 0.1 * torch.randn(len(item["x"])), "labels": item["labels"]}


class Network(torch.nn.Module):
    """Convolutions, whose kernels differ most."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 20, 7, 2), torch.nn.BatchNorm2d(20), torch.nn.ReLU(), torch.nn.Conv2d(20, 30, 3)
        self.layers = torch.nn.Sequential(*layer, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        self.last = torch.nn.Linear(30, 4)

    def forward(self, x, labels):
        logits = self.last(self.layers(x))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "accuracy"}
SCENARIOS: dict[str, dict] = {
    "fp32": {},
    "t5, dropout": {"model": "t5", "dropout": 0.1, "optim": "adafactor", "lr_scheduler_type": "cosine"},
    "accumulation": {"items": 37, "gradient_accumulation_steps": 2, "dropout": 0.2, "warmup_steps": 2},
    "bf16": {"model": "t5", "bf16": True, "retrain_schedule": "slr"},
    "bf16, accumulation": {"bf16": True, "gradient_accumulation_steps": 2, "items": 37, "dropout": 0.2},
    "evaluation": {**EVALUATED, "evaluate": True, "dropout": 0.2, "retrain_schedule": "acc_allr"},
    "momentum, clr": {"optim": "sgd", "optim_args": "momentum=0.9", "retrain_schedule": "clr", "weight_decay": 0.1},
    "given model": {
        "dense_ratio": 0.0,
        "dense_steps": 30,
        "retrain_schedule": "lrw",
        "num_cycles": 3,
        "max_steps": 15,
    },
}


SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}
# Each method's kinds of state beside the weights: values that wait, momentum, thresholds; some with fine-tuning.
METHODS: dict[str, dict] = {name: SHORT[name] for name in PRUNING_STABLE} | {
    "gmp": SHORT["gmp"] | {"gmp_schedule": "cyclic"},
    "gmp, hard": SHORT["gmp"] | {"gmp_hard": True, "optim": "sgd"},
    "gsm": SHORT["gsm"] | SGD,
    "dpf": SHORT["dpf"] | {"dpf_interval": 3, "finetune_ratio": 0.25},
    "dnw": SHORT["dnw"] | SGD,
    "cs": SHORT["cs"] | {"cs_initial_mask": 0.02},
    "str": SHORT["str"] | {"finetune_ratio": 0.25},
    "dst": SHORT["dst"] | SGD,
    "movement": SHORT["movement"] | {"finetune_ratio": 0.25},
    "rigl": SHORT["rigl"] | SGD,
}


def build(output_dir: Path | str, **scenario) -> BIMPTrainer:
    torch.set_num_threads(1)
    dropout, name = scenario.pop("dropout", 0.0), scenario.pop("model", "classifier")
    count, evaluate = scenario.pop("items", 32), scenario.pop("evaluate", False)
    noisy = scenario.pop("noisy", False)
    defaults = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
    }
    if "method" not in scenario:
        defaults |= {"target_sparsity": 0.8, "num_cycles": 2, "dense_ratio": BOUNDARIES[0] / STEPS}
    if scenario.get("save_strategy") == "epoch":
        defaults.pop("save_steps")
    items = classification_items(count) if name == "classifier" else translation_items(count)
    held_out = {"eval_dataset": classification_items(11, seed=2), "compute_metrics": accuracy} if evaluate else {}
    return BIMPTrainer(
        model=classifier(dropout) if name == "classifier" else tiny_t5(dropout),
        args=BIMPArguments(**run_arguments(output_dir, **(defaults | scenario))),
        train_dataset=NoisyPoints() if noisy else items,
        **held_out,
    )


def kill_at(trainer: BIMPTrainer, event: str, step: int) -> None:
    trainer.add_callback(At(event, lambda model, now: now == step and os.kill(os.getpid(), signal.SIGKILL)))


def child(output_dir: str, scenario: dict, resume: bool | str, event: str | None, step: int | None) -> None:
    trainer = build(output_dir, **scenario)
    if event == "half a save":  # the weights are there and the rest is not
        save = trainer._save_optimizer_and_scheduler
        trainer._save_optimizer_and_scheduler = lambda folder: (
            os.kill(os.getpid(), signal.SIGKILL) if trainer.state.global_step == step else save(folder)
        )
    elif event is not None:
        kill_at(trainer, event, step)
    trainer.train(resume_from_checkpoint=resume)


def run(
    output_dir: Path, scenario: dict, resume: bool | str = False, event: str | None = None, step: int | None = None
) -> None:
    """One process of training, which dies of SIGKILL at `event` of `step` if they are given."""
    process = PROCESSES.Process(target=child, args=(str(output_dir), scenario, resume, event, step))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == (0 if event is None else -signal.SIGKILL)


def prunings(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "bimp_results.json").read_text())["prunings"]


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for mine, theirs in zip(prunings(one), prunings(other), strict=True):
        for when in ("before", "after", "retrained"):  # outputs, of other processes: to rounding
            assert mine.pop(when) == pytest.approx(theirs.pop(when), rel=1e-5)
        assert mine == theirs
    rates = [json.loads((max_checkpoint(d) / "trainer_state.json").read_text())["log_history"] for d in (one, other)]
    assert [[e["step"], e.get("prune_retrain_peak")] for e in rates[0] if "prune_cycle" in e] == [
        [e["step"], e.get("prune_retrain_peak")] for e in rates[1] if "prune_cycle" in e
    ]


def max_checkpoint(output_dir: Path) -> Path:
    return max(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, SCENARIOS["fp32"])
    assert [p["step"] for p in prunings(folder)] == list(BOUNDARIES)
    return folder


@pytest.mark.parametrize("step", [3, BOUNDARIES[0] - 1, BOUNDARIES[0], BOUNDARIES[0] + 1, 8, 10, 13])
def test_killed_right_after_a_checkpoint(tmp_path, whole_run, step):
    run(tmp_path, SCENARIOS["fp32"], event="on_save", step=step)
    assert max_checkpoint(tmp_path).name == f"checkpoint-{step}"
    run(tmp_path, SCENARIOS["fp32"], resume=True)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("step", [3, BOUNDARIES[0], BOUNDARIES[0] + 1, 9])
def test_killed_between_checkpoints(tmp_path, whole_run, step):
    scenario = SCENARIOS["fp32"] | {"save_steps": 2}
    run(tmp_path, scenario, event="on_pre_optimizer_step", step=step)
    assert max_checkpoint(tmp_path).name == f"checkpoint-{step - step % 2}"
    run(tmp_path, scenario, resume=True)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "fp32"])
def test_killed_again_and_again(tmp_path, name):
    whole, scenario = tmp_path / "whole", SCENARIOS[name]
    run(whole, scenario)
    resume = False
    first, second = [p["step"] for p in prunings(whole)][-2:]
    for step in sorted({2, first - 1, first, first + 1, second, second + 1}):
        run(tmp_path / "killed", scenario, resume=resume, event="on_save", step=step)
        resume = True
    run(tmp_path / "killed", scenario, resume=True)
    assert_same_run(whole, tmp_path / "killed")


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_killed_twice(tmp_path, name):
    """In the middle, and in the last steps: for some that is after their end, in fine-tuning."""
    scenario = {"method": name.split(",")[0], "gradient_accumulation_steps": 2, "items": 37, "dropout": 0.2}
    scenario |= METHODS[name]
    run(tmp_path / "whole", scenario)
    run(tmp_path / "killed", scenario, event="on_save", step=5)
    run(tmp_path / "killed", scenario, resume=True, event="on_pre_optimizer_step", step=13)
    run(tmp_path / "killed", scenario, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_random_augmentation_is_exact_from_the_end_of_an_epoch(tmp_path):
    scenario = {"noisy": True, "save_strategy": "epoch", "dropout": 0.2}
    run(tmp_path / "whole", scenario)
    run(tmp_path / "killed", scenario, event="on_pre_optimizer_step", step=9)
    assert max_checkpoint(tmp_path / "killed").name == "checkpoint-8"
    run(tmp_path / "killed", scenario, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_killed_after_the_last_checkpoint(tmp_path, whole_run):
    """All steps are done, and the final model is not saved yet."""
    run(tmp_path, SCENARIOS["fp32"], event="on_save", step=STEPS)
    assert not (tmp_path / "model.safetensors").exists()
    trainer = build(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert_same_run(tmp_path, whole_run)


def test_killed_after_the_last_checkpoint_of_a_schedule_that_does_not_end_at_zero(tmp_path):
    scenario = {"retrain_schedule": "ft"}
    run(tmp_path / "whole", scenario)
    run(tmp_path / "killed", scenario, event="on_save", step=STEPS)
    run(tmp_path / "killed", scenario, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_finished_dense_run_can_be_resumed(tmp_path):
    scenario = {"method": "dense"}
    run(tmp_path, scenario)
    before = (tmp_path / "model.safetensors").read_bytes()
    run(tmp_path, scenario, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_resuming_in_mid_epoch_says_what_it_cannot_promise(tmp_path, caplog):
    run(tmp_path, {}, event="on_save", step=7)
    build(tmp_path).train(resume_from_checkpoint=True)
    assert "middle of an epoch" in caplog.text
    caplog.clear()
    build(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert "middle of an epoch" not in caplog.text


def test_how_the_model_was_made_does_not_matter(tmp_path):
    """Kernels depend on addresses on some processors, and those of weights in a file are any."""

    def misaligned(model: torch.nn.Module) -> torch.nn.Module:
        for tensor in [*model.parameters(), *model.buffers()]:
            room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
            tensor.data = room.copy_(tensor.detach())
        return model

    def trainer_of(model: torch.nn.Module, folder: str) -> BIMPTrainer:
        changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        generator = torch.Generator().manual_seed(1)
        items = [{"x": torch.randn(3, 32, 32, generator=generator), "labels": i % 4} for i in range(16)]
        args = BIMPArguments(**run_arguments(tmp_path / folder, target_sparsity=0.8, num_cycles=2, **changes))
        return BIMPTrainer(model=model, args=args, train_dataset=items)

    whole = trainer_of(misaligned(Network()), "whole")
    whole.train()
    assert all(p.data_ptr() % 64 == 0 for p in whole.model.parameters())
    resumed = trainer_of(Network(), "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_tensors(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))


# ---- Killed while saving ----


@pytest.mark.parametrize("step", [5, BOUNDARIES[0], 9])
def test_killed_while_saving(tmp_path, whole_run, caplog, step):
    run(tmp_path, SCENARIOS["fp32"], event="half a save", step=step)
    assert (tmp_path / f"checkpoint-{step}" / "model.safetensors").exists()
    trainer = build(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-{step} was not saved to its end" in caplog.text
    assert_same_run(tmp_path, whole_run)


def test_truncated_trainer_state(tmp_path, whole_run, caplog):
    run(tmp_path, SCENARIOS["fp32"], event="on_save", step=8)
    state = tmp_path / "checkpoint-8" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    build(tmp_path).train(resume_from_checkpoint=True)
    assert "checkpoint-8 was not saved to its end" in caplog.text
    assert "checkpoint-7 was" not in caplog.text
    assert_same_run(tmp_path, whole_run)


def test_checkpoint_that_is_overwritten_and_cut_off_is_not_complete(tmp_path, whole_run, caplog):
    run(tmp_path, SCENARIOS["fp32"], event="on_save", step=8)
    start = str(tmp_path / "checkpoint-6")
    run(tmp_path, SCENARIOS["fp32"], resume=start, event="half a save", step=8)
    build(tmp_path).train(resume_from_checkpoint=True)
    assert "checkpoint-8 was not saved to its end" in caplog.text
    assert "checkpoint-7 was" not in caplog.text
    assert_same_run(tmp_path, whole_run)


def test_no_complete_checkpoint_is_an_error_that_leaves_everything(tmp_path):
    run(tmp_path, {}, event="half a save", step=1)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        build(tmp_path).train(resume_from_checkpoint=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# ---- Formats ----


def test_state_is_json_and_masks_are_safetensors(whole_run):
    checkpoint = whole_run / f"checkpoint-{STEPS}"
    ours = sorted(path.name for path in checkpoint.glob("bimp_*"))
    assert ours == ["bimp_files.json", "bimp_masks.safetensors", "bimp_state.json"]
    state = json.loads((checkpoint / "bimp_state.json").read_text())
    assert state["settings"]["plan"]["prune_steps"] == list(BOUNDARIES)
    assert load_file(checkpoint / "bimp_masks.safetensors").keys() == {"first.weight", "last.weight"}
    torch.load(checkpoint / "scheduler.pt", weights_only=True)
    plain = {"config.json", "model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.name for path in checkpoint.iterdir()} <= plain | {"trainer_state.json", *ours}


def test_resumed_model_is_as_sparse_as_planned(whole_run):
    model = classifier()
    model.load_state_dict(load_file(whole_run / "model.safetensors"))
    assert sparsity(model) == pytest.approx(0.8, abs=3e-3)


@pytest.mark.parametrize("stopped_at", [5, 7], ids=["end of an epoch", "within one"])
def test_persistent_workers_take_no_random_number_of_the_training(tmp_path, monkeypatch, caplog, stopped_at) -> None:
    """They are seeded when they start, which a resumed run does at another time."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # workers end at once afterwards

    def run(folder: Path, resume: Path | None = None):
        workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
        saving = {"save_strategy": "steps", "save_steps": stopped_at, "max_steps": 12}
        trainer = make_trainer(folder, classifier(0.3), classification_items(37), **workers, **saving)
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return trainer.model.state_dict()

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{stopped_at}")
    assert_same_tensors(whole, resumed)
    assert "as workers start anew" in caplog.text
