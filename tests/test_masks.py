"""Hard zeros: a pruned weight, its gradient and its optimizer state stay exactly zero; masks survive a round trip."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Adafactor

from hf_bimp import Masks

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.5, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, lr=0.01, relative_step=False, beta1=0.9, weight_decay=0.1),
    "adafactor_scaled": lambda p: Adafactor(
        p, lr=0.01, relative_step=False, beta1=0.9, scale_parameter=True, clip_threshold=0.5
    ),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 8), nn.GELU(), nn.Linear(8, 2))


def masks_of(model: nn.Module) -> Masks:
    return Masks({name: p for name, p in sorted(model.named_parameters()) if p.ndim > 1})


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(mask, second[name]) for name, mask in first.items())


def per_weight_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, torch.Tensor]:
    state = optimizer.state.get(weight, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == weight.shape}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_gradients_and_state_stay_zero(kind: str) -> None:
    model = network()
    masks, optimizer, seen = masks_of(model), OPTIMIZERS[kind](model.parameters()), set()
    generator = torch.Generator().manual_seed(1)
    for step in range(24):
        if step in (6, 12):  # with momenta of dense steps, and again with masks there already
            masks.prune(0.5 if step == 6 else 0.8)
            masks.mask_optimizer_state(optimizer)
        optimizer.zero_grad()
        model(torch.randn(16, 4, 8, generator=generator)).square().mean().backward()
        masks.mask_gradients()
        for name, mask in masks.pruned.items():
            assert not masks.weights[name].grad[mask].any()
            assert masks.weights[name].grad[~mask].any()
        before = {name: weight.detach().clone() for name, weight in masks.weights.items()}
        optimizer.step()
        masks.mask_weights()
        for name, mask in masks.pruned.items():
            weight = masks.weights[name].detach()
            assert not weight[mask].any() and weight.isfinite().all()
            assert (weight != before[name])[~mask].float().mean() > 0.5  # the others learn on
            for key, value in per_weight_state(optimizer, masks.weights[name]).items():
                seen.add(key)
                assert not value[mask].any(), key
                assert value[~mask].any(), key
    expected = {
        "sgd": set(),
        "adam": {"exp_avg", "exp_avg_sq"},
        "adamw": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        "adamw_fused": {"exp_avg", "exp_avg_sq"},
        "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
        "adagrad": {"sum"},
        "adafactor": {"exp_avg"},
        "adafactor_scaled": {"exp_avg"},
    }
    assert seen == expected.get(kind, {"momentum_buffer"})
    assert masks.num_pruned == round(0.8 * masks.num_weights)


def test_frozen_weights_without_gradient_or_state_can_be_pruned() -> None:
    model = network()
    model[3].weight.requires_grad_(False)
    masks, optimizer = masks_of(model), torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, 8)).sum().backward()
    masks.prune(0.5)
    masks.mask_optimizer_state(optimizer)
    masks.mask_gradients()
    optimizer.step()
    assert model[3].weight.grad is None and not model[3].weight[masks.pruned["3.weight"]].any()


def test_the_clipped_norm_ignores_pruned_weights() -> None:
    model = network()
    masks = masks_of(model)
    masks.prune(0.9)
    model(torch.ones(2, 4, 8)).sum().backward()
    masked = [p.grad.clone().masked_fill_(masks.pruned.get(n, torch.tensor(False)), 0) for n, p in gradients(model)]
    whole = torch.cat([p.grad.flatten() for _, p in gradients(model)]).norm()
    masks.mask_gradients()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in masked]).norm())
    assert norm < whole


def gradients(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.grad is not None]


def test_nothing_happens_before_the_first_pruning() -> None:
    model = network()
    masks, before = masks_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.ones(2, 4, 8)).sum().backward()
    masks.mask_weights(), masks.mask_gradients()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (masks.num_pruned, masks.sparsity, masks.pruned) == (0, 0.0, {})


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 1.0])
def test_masks_come_back_from_disk(tmp_path: Path, sparsity: float) -> None:
    model, other = network(), network()
    masks, loaded = masks_of(model), masks_of(other)
    masks.prune(sparsity)
    masks.save(tmp_path / "masks.safetensors")
    loaded.load(tmp_path / "masks.safetensors")
    assert same(loaded.pruned, masks.pruned) and loaded.sparsity == masks.sparsity
    assert loaded.checksum() == masks.checksum()
    assert (tmp_path / "masks.safetensors").stat().st_size < masks.num_weights / 8 + 1000  # a bit each
    loaded.mask_weights()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items())
    if sparsity < 1:  # they can be pruned on
        assert loaded.prune(0.9) == masks.prune(0.9) and same(loaded.pruned, masks.pruned)


def test_empty_masks_come_back_from_disk(tmp_path: Path) -> None:
    masks, pruned = masks_of(network()), masks_of(network())
    masks.save(tmp_path / "masks.safetensors")
    pruned.prune(0.5)
    pruned.load(tmp_path / "masks.safetensors")
    assert pruned.pruned == {} and pruned.sparsity == 0


def test_masks_of_channels_last_weights_come_back_from_disk(tmp_path: Path) -> None:
    def conv() -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)

    masks, loaded = masks_of(conv()), masks_of(conv())
    masks.prune(0.6)
    masks.save(tmp_path / "masks.safetensors")
    loaded.load(tmp_path / "masks.safetensors")
    assert same(loaded.pruned, masks.pruned)
    loaded.prune(0.8), masks.prune(0.8)
    assert same(loaded.pruned, masks.pruned)


def test_masks_of_weights_with_other_names_are_refused(tmp_path: Path) -> None:
    masks = Masks({"a": nn.Parameter(torch.ones(4, 4)), "b": nn.Parameter(torch.ones(4, 4))})
    masks.prune(0.5)
    masks.save(tmp_path / "masks.safetensors")
    other = Masks({"a": nn.Parameter(torch.ones(4, 4)), "c": nn.Parameter(torch.ones(4, 4))})
    with pytest.raises(ValueError, match=r"masks for other weights.*\['b', 'c'\]"):
        other.load(tmp_path / "masks.safetensors")
    assert other.pruned == {}


def test_masks_of_weights_with_other_sizes_are_refused(tmp_path: Path) -> None:
    masks = Masks({"a": nn.Parameter(torch.ones(4, 4))})
    masks.prune(0.5)
    masks.save(tmp_path / "masks.safetensors")
    with pytest.raises(ValueError, match="masks for other weights"):
        Masks({"a": nn.Parameter(torch.ones(8, 8))}).load(tmp_path / "masks.safetensors")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_zeros_that_are_there_can_be_kept_and_added_to(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3).to(memory_format=layout)
    model.weight.data[:3] = 0
    model.weight.data[0, 0] = -0.0
    masks = masks_of(model)
    masks.keep_zeros()
    assert masks.sparsity == 0.5 and masks.pruned["weight"][:3].all() and not masks.pruned["weight"][3:].any()
    masks.checksum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for sparsity in (0.5, 0.75):
        optimizer.zero_grad()
        model(torch.ones(1, 4, 5, 5)).square().sum().backward()
        masks.mask_gradients(), optimizer.step(), masks.mask_weights()
        assert (model.weight == 0).float().mean() == sparsity == masks.sparsity
        masks.prune(0.75)
        assert masks.pruned["weight"][:3].all()


def test_keeping_the_zeros_of_a_dense_model_prunes_nothing() -> None:
    masks = masks_of(network())
    masks.keep_zeros()
    assert masks.sparsity == 0


def test_the_checksum_tells_masks_apart() -> None:
    masks, sums = masks_of(network()), set()
    for sparsity in (0.1, 0.2, 0.3):
        masks.prune(sparsity)
        sums.add(masks.checksum())
        again = masks_of(network())
        again.pruned = {name: mask.clone() for name, mask in masks.pruned.items()}
        assert again.checksum() == masks.checksum()
    mask = masks.pruned["3.weight"].view(-1)
    moved = torch.roll(mask, 1)  # as many, elsewhere
    assert not torch.equal(moved, mask)
    mask.copy_(moved)
    assert len(sums | {masks.checksum()}) == 4
