"""Pruned weights, their gradients and optimizer states stay zero under every allowed optimizer."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from helpers import (
    At,
    matrices,
    sparsity,
    tiny_t5,
    translation_items,
)
from hf_bimp.arguments import TESTED_OPTIMIZERS
from trainers import make_trainer, zeros_of

BY_HAND: dict[str, tuple[type, dict]] = {
    "sgd, nesterov": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam, amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "rmsprop, centered": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "adagrad, warm": (torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1, "weight_decay": 0.1}),
    "adafactor, momentum": (Adafactor, {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "beta1": 0.9}),
}


@pytest.mark.parametrize("optim", [o.value for o in TESTED_OPTIMIZERS] + list(BY_HAND))
def test_pruned_weights_gradients_and_optimizer_state_stay_zero(tmp_path, optim):
    given = {"optimizer_cls_and_kwargs": BY_HAND[optim]} if optim in BY_HAND else {"optim": optim, "weight_decay": 0.1}
    if optim in ("sgd", "rmsprop"):
        given["optim_args"] = "momentum=0.9"
    clip = 0.05
    trainer = make_trainer(tmp_path, tiny_t5(), translation_items(), max_steps=15, max_grad_norm=clip, **given)
    pruned: dict[str, Tensor] = {}
    norms: dict[int, float] = {}
    state_tensors = []

    def before_step(model: nn.Module, step: int) -> None:
        if step in trainer.plan.prune_steps:
            now = zeros_of(model)
            planned = trainer.plan.sparsities[trainer.plan.prune_steps.index(step)]
            total = sum(mask.numel() for mask in now.values())
            assert sum(int(mask.sum()) for mask in now.values()) == round(planned * total)
            assert all(bool(now[name][mask].all()) for name, mask in pruned.items())
            pruned.update(now)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms[step] = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()
        check(model)

    def check(model: nn.Module) -> None:
        weights = matrices(model)
        for name, mask in pruned.items():
            assert not weights[name].detach()[mask].any()
            if weights[name].grad is not None:
                assert not weights[name].grad[mask].any()
            for value in trainer.optimizer.state[weights[name]].values():
                if torch.is_tensor(value) and value.shape == mask.shape:
                    state_tensors.append(value)
                    assert not value[mask].any()

    trainer.add_callback(At("on_pre_optimizer_step", before_step))
    trainer.add_callback(At("on_step_end", lambda model, step: check(model)))
    trainer.train()
    assert sparsity(trainer.model) == pytest.approx(0.8, abs=1e-3)
    # Clipped to exactly this norm, which it would fall short of if pruned weights had counted.
    assert [norms[step] for step in range(15)] == pytest.approx([clip] * 15, rel=1e-3)
    if optim != "adafactor":  # its default keeps sums of rows and columns alone
        assert state_tensors


def test_logged_gradient_norm_ignores_pruned_weights(tmp_path):
    norms = []
    trainer = make_trainer(tmp_path, logging_steps=1, max_grad_norm=1e9)

    def measure(model: nn.Module, step: int) -> None:
        squares = 0.0
        for parameter in model.parameters():
            counted = parameter.grad
            if step >= 6 and parameter.ndim > 1:
                counted = counted[parameter.detach() != 0]
            squares += counted.double().square().sum().item()
        norms.append(math.sqrt(squares))

    trainer.add_callback(At("on_pre_optimizer_step", measure))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)
