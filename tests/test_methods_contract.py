"""What every method promises, one table over all of them: the trainer's invariants hold whichever is chosen."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import T5ForConditionalGeneration

from helpers import At, classification_items, classifier, matrices, snapshot, sparsity, tiny_t5, translation_items
from hf_bimp import BIMPTrainer
from hf_bimp.methods import METHODS
from method_table import GOAL, SPARSE_EARLY
from method_table import SHORT as TABLE
from trainers import assert_same_tensors, make_trainer

STEPS = 12
EXACT = [name for name in TABLE if not METHODS[name].traits.finds_sparsity]
OPTIMIZERS = {
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2},
}


def trainer_of(method: str, output_dir: Path, optimizer: str = "sgd", **changes) -> BIMPTrainer:
    settings = {"num_cycles": None, "target_sparsity": None, "max_steps": STEPS, "logging_steps": 1}
    return make_trainer(output_dir, **settings | TABLE[method] | OPTIMIZERS[optimizer] | changes, method=method)


def losses(trainer: BIMPTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize(("optimizer", "bf16"), [("sgd", True), ("adamw", False)])
def test_ends_as_sparse_as_it_says(tmp_path, method, optimizer, bf16) -> None:
    trainer = trainer_of(method, tmp_path, optimizer, bf16=bf16, eval_dataset=classification_items(9, seed=2))
    trainer.train()
    count = sum(weight.numel() for weight in matrices(trainer.model).values())
    if method in EXACT:
        assert sparsity(trainer.model) == round(GOAL * count) / count
    assert 0.01 < sparsity(trainer.model) < 0.99
    assert trainer.results["sparsity"]["prunable"] == sparsity(trainer.model)
    assert trainer.results["prunings"][-1]["sparsity"] == sparsity(trainer.model)
    assert trainer.results["prunings"][-1]["after"].keys() == {"loss"} == trainer.results["final"].keys()
    assert json.loads((tmp_path / "bimp_results.json").read_text())["method"] == method
    assert (tmp_path / "bimp_run.png").exists()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    zeros = torch.cat([weight[weight == 0] for weight in matrices(trainer.model).values()])
    assert not zeros.signbit().any()  # a sign would take a bit each in a compressed file


@pytest.mark.parametrize(
    ("method", "allocation"), [("gmp", "uniform_plus"), ("dpf", "uniform"), ("dnw", "erk"), ("lc", "lamp")]
)
def test_allocations_are_as_exact_as_those_of_bimp(tmp_path, method, allocation) -> None:
    trainer = trainer_of(method, tmp_path, allocation=allocation)
    trainer.train()
    shares = trainer.results["sparsity"]["per_layer"].values()
    assert sparsity(trainer.model) == pytest.approx(GOAL, abs=3e-3)
    assert (max(shares) - min(shares) < 0.01) == allocation.startswith("uniform")  # no layer is beyond a cap here
    assert trainer.results["allocation"] == allocation


def test_a_hundred_prunings_are_told_in_a_few_rows(tmp_path, capsys) -> None:
    trainer = trainer_of("gmp", tmp_path, max_steps=101, num_prunings=100, save_strategy="no")
    trainer.train()
    assert capsys.readouterr().out.count("\ncycle ") < 12
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.count("75.00%") < 8 and "Gradual magnitude pruning" in card and "| metric | 75.00% sparse |" in card


@pytest.mark.parametrize("method", TABLE)
def test_learns(tmp_path, method) -> None:
    trainer = trainer_of(method, tmp_path, max_steps=60, items=classification_items(64))
    trainer.train()
    assert sum(losses(trainer)[-4:]) < 0.9 * sum(losses(trainer)[:4])


@pytest.mark.parametrize("method", TABLE)
def test_saves_in_mid_training_what_it_computes_with(tmp_path, method) -> None:
    """Under the model's own names: a checkpoint is a plain one at any step."""
    computed: dict[int, dict] = {}

    class Recording(type(classifier())):
        def forward(self, x, labels=None):
            if self.training:
                computed[trainer.state.global_step] = snapshot(self)
            return super().forward(x, labels)

    torch.manual_seed(0)
    trainer = trainer_of(method, tmp_path, model=Recording(), save_strategy="steps", save_steps=1)
    evaluated: dict[int, dict] = {}
    trainer.add_callback(At("on_save", lambda model, step: evaluated.update({step: snapshot(model)})))
    trainer.train()
    boundaries = trainer.plan.prune_steps
    assert set(range(1, STEPS)) - set(boundaries)
    for step in range(1, STEPS):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert_same_tensors(saved, evaluated[step])
        if step not in boundaries:  # the pruning comes after the save
            assert_same_tensors(saved, computed[step])
    model = classifier()
    model.load_state_dict(load_file(tmp_path / f"checkpoint-{STEPS - 1}" / "model.safetensors"))
    assert (sparsity(model) > 0.01) == (method in [*SPARSE_EARLY, "bimp"])


@pytest.mark.parametrize("method", TABLE)
def test_t5_loads_without_the_library(tmp_path, method) -> None:
    trainer = trainer_of(method, tmp_path, "adamw", model=tiny_t5(), items=translation_items(), save_strategy="epoch")
    trainer.train()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        loaded, report = T5ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        assert_same_tensors(dict(loaded.state_dict()), load_all(loaded, folder))
    # What RigL has just grown is zero still.
    assert sparsity(loaded) <= sparsity(trainer.model) or method == "rigl"
    assert_same_tensors(
        T5ForConditionalGeneration.from_pretrained(tmp_path).state_dict(), dict(trainer.model.state_dict())
    )


def load_all(model: nn.Module, folder: Path) -> dict:
    """What the file holds, tied weights under each of their names."""
    saved = load_file(folder / "model.safetensors")
    return {name: saved.get(name, saved.get("shared.weight")) for name in model.state_dict()}


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_changes_nothing(tmp_path, method, optimizer) -> None:
    whole = trainer_of(method, tmp_path, optimizer, items=classification_items(37), max_grad_norm=0.5)
    parts = trainer_of(
        method,
        tmp_path,
        optimizer,
        items=classification_items(37),
        max_grad_norm=0.5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    whole.train(), parts.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-3)


@pytest.mark.parametrize("method", TABLE)
def test_compiled_model_learns_the_same(tmp_path, method) -> None:
    plain = trainer_of(method, tmp_path)
    compiled = trainer_of(method, tmp_path, torch_compile=True, torch_compile_backend="eager")
    plain.train(), compiled.train()
    assert losses(plain) == pytest.approx(losses(compiled), rel=1e-5)  # outputs of two objects
    assert_same_tensors(snapshot(plain.model), snapshot(compiled.model))


@pytest.mark.parametrize("method", TABLE)
def test_second_run_of_the_same_trainer_starts_afresh(tmp_path, method) -> None:
    """With the very optimizer of the first, which must not keep what the method gave it."""
    trainer = trainer_of(method, tmp_path)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, weight_decay=0.1)
    trainer.optimizer = optimizer
    trainer.train()
    groups = len(optimizer.param_groups)
    trainer.train()
    assert len(optimizer.param_groups) == groups
    assert trainer.method.is_complete and trainer.results["sparsity"]["prunable"] == sparsity(trainer.model)


@pytest.mark.parametrize("method", [name for name in TABLE if name != "bimp"])
def test_fine_tuning_keeps_the_zeros_at_the_last_rate(tmp_path, method) -> None:
    trainer = trainer_of(method, tmp_path, max_steps=16, finetune_ratio=0.25)
    zeros, rates = {}, {}

    def look(model: nn.Module, step: int) -> None:
        rates[step] = trainer.optimizer.param_groups[0]["lr"]
        zeros[step] = {name: weight.detach() == 0 for name, weight in matrices(model).items()}

    trainer.add_callback(At("on_step_end", look))
    trainer.train()
    assert len({rates[step] for step in range(12, 17)}) == 1 and rates[12] < rates[1]
    for step in range(14, 17):
        assert_same_tensors(zeros[step], zeros[13])
    assert trainer.results["prunings"][-1]["step"] <= 12
    if method in EXACT:
        assert sparsity(trainer.model) == pytest.approx(GOAL, abs=3e-3)


@pytest.mark.parametrize("method", TABLE)
def test_best_model_is_one_that_is_finished(tmp_path, method) -> None:
    trainer = trainer_of(
        method,
        tmp_path,
        eval_dataset=classification_items(16, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **({} if method == "bimp" else {"finetune_ratio": 0.25}),
    )
    trainer.train()
    assert trainer.state.best_global_step >= trainer.plan.prune_steps[-1]
    assert trainer.results["sparsity"]["prunable"] == sparsity(trainer.model)
    if method in EXACT:
        assert sparsity(trainer.model) == pytest.approx(GOAL, abs=3e-3)
