"""Weights that are no numbers end a run where that is seen first, with results that say so."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers import At, classification_items, classifier
from hf_bimp.methods import METHODS
from hf_bimp.methods.dense_behind import DenseBehind
from hf_bimp.trainer.divergence import not_finite
from method_table import SHORT, ours
from trainers import make_trainer


def poison(at: int, value: float = float("nan")) -> At:
    """Before optimizer step `at` a weight that the loss does not depend on becomes `value`."""

    def act(model: nn.Module, step: int) -> None:
        if step == at:
            with torch.no_grad():
                model.spare.weight[0, 0] = value

    return At("on_step_begin", act)


def with_spare_layer() -> nn.Module:
    """The loss stays finite, so that nothing but the weights tells."""
    model = classifier()
    model.spare = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("settings", "seen_after", "steps_done"),
    [
        ({"logging_steps": 3}, "step 9 and step 12", 12),
        ({"logging_steps": 1}, "step 10 and step 11", 11),
        ({"logging_strategy": "no", "save_strategy": "steps", "save_steps": 11}, "step 9 and step 11", 11),
        ({"logging_strategy": "no"}, "step 9 and step 12", 12),
    ],
)
def test_a_run_that_diverges_after_its_last_pruning(tmp_path, settings, seen_after, steps_done, value) -> None:
    trainer = make_trainer(tmp_path, with_spare_layer(), callbacks=[poison(10, value)], **settings)
    with pytest.raises(FloatingPointError, match=f"between {seen_after}: .*spare.weight.*no checkpoint yet"):
        trainer.train()
    assert trainer.state.global_step == steps_done
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert results["diverged"] is True and results["sparsity"] is None and len(results["prunings"]) == 2
    assert not (tmp_path / "model.safetensors").exists()


def spoilt_gradient(chosen: Callable[[Tensor], Tensor], value: float) -> At:
    """In the last step, after the last look but one, the gradient of some weights of the first layer is no number."""

    def act(model: nn.Module, step: int) -> None:
        if step == 11:
            weight = model.first.weight
            weight.grad[chosen(weight)] = value

    return At("on_pre_optimizer_step", act)


def ends_with_an_error(tmp_path, method: str, callback: At) -> None:
    settings = {"num_cycles": None} | SHORT.get(method, {}) | {"method": method, "logging_strategy": "no"}
    trainer = make_trainer(tmp_path, callbacks=[callback], optim="sgd", max_grad_norm=0.0, **settings)
    with pytest.raises(FloatingPointError, match="Training diverged between .* and step 12: .*first.weight"):
        trainer.train()
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert results["diverged"] is True and results["sparsity"] is None
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", sorted(ours))
def test_every_method_ends_so_when_the_last_step_spoils_its_weights(tmp_path, method, value) -> None:
    ends_with_an_error(tmp_path, method, spoilt_gradient(lambda weight: weight.abs() == weight.abs().max(), value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", sorted(name for name in ours if issubclass(METHODS[name], DenseBehind)))
def test_dense_weights_behind_zeros_are_watched(tmp_path, method, value) -> None:
    """Most methods have zeros in the place of the smallest, so that the model shows nothing."""
    ends_with_an_error(tmp_path, method, spoilt_gradient(lambda weight: weight.abs() == weight.abs().min(), value))


def test_random_pruning_ends_so_too(tmp_path) -> None:
    trainer = make_trainer(tmp_path, with_spare_layer(), callbacks=[poison(11)], criterion="random")
    with pytest.raises(FloatingPointError, match="step 12: .*spare"):
        trainer.train()


def test_before_a_pruning(tmp_path) -> None:
    trainer = make_trainer(tmp_path, with_spare_layer(), callbacks=[poison(5)], logging_strategy="no")
    with pytest.raises(FloatingPointError, match="between step 0 and step 6"):
        trainer.train()
    assert trainer.results["prunings"] == []


def test_the_last_good_checkpoint_is_named_and_goes_on(tmp_path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "logging_strategy": "no"}
    with pytest.raises(FloatingPointError, match=r"between step 9 and step 12.*The last good checkpoint is .*-8"):
        make_trainer(tmp_path, with_spare_layer(), callbacks=[poison(10)], **saving).train()
    assert not (tmp_path / "checkpoint-12").exists()
    resumed = make_trainer(tmp_path, with_spare_layer(), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.results["diverged"] is False
    assert json.loads((tmp_path / "bimp_results.json").read_text())["sparsity"]["prunable"] > 0.79


def test_after_a_resume_the_checkpoint_is_the_one_resumed_from(tmp_path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 8, "logging_strategy": "no"}
    make_trainer(tmp_path, with_spare_layer(), **saving).train()
    resumed = make_trainer(tmp_path, with_spare_layer(), callbacks=[poison(10)], **saving)
    with pytest.raises(FloatingPointError, match=r"between step 9 and step 12.*checkpoint-8"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_weights_that_were_never_numbers_are_not_watched(tmp_path, caplog) -> None:
    model = with_spare_layer()
    model.unused = nn.Parameter(torch.full((3,), float("nan")))
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert "NaN or infinite weights before any training: unused" in caplog.text
    assert trainer.results["diverged"] is False


def test_a_real_divergence(tmp_path) -> None:
    items = classification_items()
    with pytest.raises(FloatingPointError, match="Lower learning_rate"):
        make_trainer(
            tmp_path, items=items, optim="sgd", learning_rate=1e30, max_grad_norm=0, logging_strategy="no"
        ).train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_are_numbers(dtype) -> None:
    largest = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    spoilt = largest.clone()
    spoilt[7] = float("nan")
    assert not_finite({"a": largest, "empty": torch.zeros(0)}) == []
    assert not_finite({"a": largest, "b": spoilt, "c": torch.zeros(2)}) == ["b"]
