"""What cannot work is refused with the reason, before anything is lost."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from helpers import (
    At,
    classification_items,
    classifier,
    run_arguments,
    snapshot,
    tiny_t5,
    translation_items,
)
from trainers import assert_same_tensors, make_trainer


def test_nan_weights_stop_the_run_at_the_pruning(tmp_path):
    def poison(model: nn.Module, step: int) -> None:
        if step == 5:
            with torch.no_grad():
                model.first.weight[0, 0] = float("nan")

    trainer = make_trainer(tmp_path, callbacks=[At("on_step_begin", poison)])
    with pytest.raises(FloatingPointError, match="NaN"):
        trainer.train()
    assert trainer.state.global_step == 6


class Lookup(nn.Module):
    """Nothing to prune."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.table(labels).sum()}


def test_models_without_prunable_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no prunable weight"):
        make_trainer(tmp_path, Lookup())


@pytest.mark.parametrize("argument", ["prune_modules", "skip_modules"])
def test_patterns_that_match_nothing_are_refused(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{argument}.*'nowhere'.*first"):
        make_trainer(tmp_path, **{argument: ["nowhere"]})


def test_skipping_everything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no prunable weight"):
        make_trainer(tmp_path, skip_modules=["."])


@pytest.mark.parametrize("changes", [{"num_cycles": 7}, {"dense_ratio": 0.95}, {"dense_ratio": 0.01}])
def test_phases_without_a_step_are_refused_before_training(tmp_path, changes):
    model = classifier()
    before = snapshot(model)
    trainer = make_trainer(tmp_path / "out", model, **changes)
    with pytest.raises(ValueError, match="at least 1"):
        trainer.train()
    assert_same_tensors(snapshot(model), before)
    assert not list((tmp_path / "out").glob("*"))


def test_scheduler_passed_by_hand_is_refused(tmp_path):
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        make_trainer(tmp_path, model, optimizers=(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)))


class OwnOptimizer(torch.optim.SGD):
    """Anyone's optimizer."""


def test_untested_optimizers_are_refused_by_name(tmp_path):
    model = classifier()
    with pytest.raises(ValueError, match="OwnOptimizer"):
        make_trainer(tmp_path, model, optimizers=(OwnOptimizer(model.parameters(), lr=1e-2), None))
    with pytest.raises(ValueError, match="OwnOptimizer"):
        make_trainer(tmp_path, model, optimizer_cls_and_kwargs=(OwnOptimizer, {"lr": 1e-2}))
    with pytest.raises(ValueError, match="relative_step"):
        make_trainer(tmp_path, model, optimizers=(Adafactor(model.parameters()), None))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # from within peft
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own use of transformers
def test_peft_models_are_refused(tmp_path):
    import peft

    model = peft.get_peft_model(tiny_t5(), peft.LoraConfig(target_modules=["q"], r=2))
    with pytest.raises(ValueError, match="PEFT"):
        make_trainer(tmp_path, model, translation_items())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {"target_sparsity": 0.9},
        {"num_cycles": 1},
        {"max_steps": 16},
        {"dense_ratio": 0.25},
        {"retrain_schedule": "llr"},
        {"learning_rate": 3e-3},
        {"warmup_steps": 2},
        {"skip_modules": ["last"]},
        {"retrain_warmup_ratio": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_resuming_under_another_plan_is_refused_and_loses_nothing(tmp_path, finished_run, changes):
    before = files_of(finished_run)
    trainer = make_trainer(finished_run, save_strategy="steps", save_steps=4, **changes)
    with pytest.raises(ValueError, match=f"(?s)another plan.*{'|'.join(['plan', *changes, 'dense_schedule'])}"):
        trainer.train(resume_from_checkpoint=True)
    assert files_of(finished_run) == before


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, save_strategy="steps", save_steps=4).train()
    return folder


def test_resuming_from_a_checkpoint_of_plain_trainer_is_refused(tmp_path):
    plain = Trainer(
        model=classifier(),
        args=TrainingArguments(**run_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)),
        train_dataset=classification_items(),
    )
    plain.train()
    with pytest.raises(ValueError, match="checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resuming_from_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
