"""n of m consecutive inputs, and whole filters with what hangs on them, against brute force."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import run_arguments
from hf_bimp import BIMPArguments, Masks
from hf_bimp.pruning.build import make_masks
from hf_bimp.pruning.granularity import check_rule, parse_n_of_m


class Small(nn.Module):
    """Two coupled convolutions (a residual), one apart, and a classifier; the inputs are (2, 3, 6, 6)."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x))
        return self.head(F.relu(x + self.outer(F.relu(self.inner(x)))).mean((2, 3)))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    model = Small()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def example() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@given(
    n_of_m=st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4)]),
    steps=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
    kind=st.sampled_from(["linear", "conv", "transposed", "conv1d"]),
    criterion=st.sampled_from(["magnitude", "random"]),
    ties=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=80)
def test_of_every_m_inputs_the_largest_stay(n_of_m, steps, kind, criterion, ties) -> None:
    n, m = n_of_m
    torch.manual_seed(0)
    layer = {
        "linear": lambda: nn.Linear(16, 5),
        "conv": lambda: nn.Conv2d(8, 3, 3),
        "transposed": lambda: nn.ConvTranspose2d(8, 3, 3),
        "conv1d": lambda: Conv1D(5, 16),
    }[kind]()
    if ties:
        layer.weight.data = torch.randint(-2, 3, layer.weight.shape).float()
    model = nn.Sequential(layer)
    masks, dense = make_masks(model, None, f"{n}:{m}", criterion=criterion)
    assert dense == {}
    inputs = 1 if kind in ("linear", "conv") else 0
    before = np.zeros(layer.weight.shape, bool)
    for sparsity in sorted(step * (1 - n / m) for step in steps):
        magnitudes = layer.weight.detach().abs().numpy().copy()
        masks.prune(sparsity)
        keep = math.ceil(m * (1 - sparsity) - 1e-9)
        pruned = masks.pruned["0.weight"].numpy()
        assert (pruned >= before).all()
        rows = np.moveaxis(magnitudes, inputs, -1).reshape(-1, m)
        rows_before = np.moveaxis(before, inputs, -1).reshape(-1, m)
        rows_pruned = np.moveaxis(pruned, inputs, -1).reshape(-1, m)
        for row, old, new in zip(rows, rows_before, rows_pruned, strict=True):
            assert new.sum() == m - keep
            if criterion == "magnitude":
                order = sorted(range(m), key=lambda i: (not old[i], row[i], i))
                assert set(np.flatnonzero(new)) == set(order[: m - keep])
        before = pruned.copy()
    assert not layer.weight[masks.pruned["0.weight"]].any()


def test_layers_whose_inputs_do_not_divide_stay_dense_and_are_named() -> None:
    masks, dense = make_masks(small(), example, "2:4")
    assert list(masks.weights) == ["head.weight", "inner.weight", "outer.weight"]
    assert dense == {"stem.weight": "its 3 inputs do not divide by 4"}
    with pytest.raises(ValueError, match="stem.weight: its 3 inputs do not divide by 8.*Use 'weight'"):
        make_masks(small(), example, "4:8", prune_modules=["stem"])


def brute_norms(weights: dict[str, torch.Tensor], names: list[str]) -> list[float]:
    size = len(weights[names[0]])
    return [math.sqrt(sum(float(weights[n][i].double().square().sum()) for n in names)) for i in range(size)]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_filters_go_with_their_biases_and_norms_and_with_those_that_they_are_coupled_with(criterion) -> None:
    model = small()
    masks, dense = make_masks(model, example, "filter", criterion=criterion)
    assert list(masks.weights) == ["inner.weight", "outer.weight", "stem.weight"]
    assert set(masks.attached) == {"bn.bias", "bn.weight", "inner.bias", "outer.bias", "stem.bias"}
    assert "outputs" in dense["head.weight"]
    gone: dict[str, set[int]] = {"stem": set(), "inner": set()}
    for sparsity in (0.3, 0.5, 0.75):
        weights = {name: w.detach().clone() for name, w in masks.weights.items()}
        selection = masks.prune(sparsity)
        for root, names in {"stem": ["outer.weight", "stem.weight"], "inner": ["inner.weight"]}.items():
            norms = brute_norms(weights, names)
            order = sorted(range(len(norms)), key=lambda i: (i not in gone[root], norms[i], i))
            count = round(sparsity * len(norms))
            now = {i for i in range(len(norms)) if masks.pruned[f"{root}.weight"][i].all()}
            assert len(now) == count and now >= gone[root]
            if criterion == "magnitude":
                assert now == set(order[:count])
            for name in names:
                assert masks.pruned[name].flatten(1).all(1).nonzero().flatten().tolist() == sorted(now)
                assert masks.pruned[name].flatten(1).any(1).sum() == count  # whole filters only
            gone[root] = now
        for name in ("bn.bias", "bn.weight", "outer.bias", "stem.bias"):
            assert masks.pruned[name].nonzero().flatten().tolist() == sorted(gone["stem"])
        removed = math.sqrt(sum(float(weights[n][masks.pruned[n]].double().square().sum()) for n in weights))
        assert selection.removed_norm == pytest.approx(removed)
    assert masks.sparsity == pytest.approx(0.75, abs=0.05) and masks.num_weights == 216 + 864 + 864
    activation = model.bn(model.stem(example()))
    assert not activation[:, sorted(gone["stem"])].any()


def test_attached_parameters_are_held_at_zero_and_come_back_from_disk(tmp_path) -> None:
    model, other = small(), small()
    masks, loaded = make_masks(model, example, "filter")[0], make_masks(other, example, "filter")[0]
    masks.prune(0.5)
    masks.save(tmp_path / "masks.safetensors")
    loaded.load(tmp_path / "masks.safetensors")
    loaded.mask_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(example()).square().sum().backward()
        masks.mask_gradients()
        optimizer.step()
    for name, mask in masks.pruned.items():
        assert mask.any() and not masks.parameters[name][mask].any() and masks.parameters[name][~mask].any()


def test_keeping_zeros_of_filters_leaves_zero_biases_of_other_filters_free() -> None:
    model = small()
    with torch.no_grad():
        model.inner.bias.zero_()  # as a new model's norms are
        model.inner.weight[3] = 0
    masks, _ = make_masks(model, example, "filter")
    masks.keep_zeros()
    assert masks.pruned["inner.bias"].nonzero().flatten().tolist() == [3]
    masks.prune(0.25)
    assert masks.pruned["inner.bias"].sum() == 3 and masks.pruned["inner.bias"][3]


@pytest.mark.parametrize("granularity", ["weight", "filter", "2:4"])
def test_weights_that_are_no_numbers_are_refused(granularity) -> None:
    model = small()
    masks, _ = make_masks(model, example, granularity)
    model.inner.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        masks.prune(0.5)


def test_a_layer_with_nothing_left_is_found() -> None:
    weights = {"a": nn.Parameter(torch.tensor([[1.0, 2.0]])), "b": nn.Parameter(torch.tensor([[3.0, 4.0, 5.0]]))}
    masks = Masks(weights)
    assert masks.collapsed == []
    masks.prune(0.2)
    assert masks.collapsed == []
    masks.prune(0.4)
    assert masks.collapsed == ["a"]


@pytest.mark.parametrize(
    ("given_rule", "complaint"),
    [
        ({"granularity": "row"}, "none of weight, filter and n:m"),
        ({"granularity": "4:2"}, "0 < n < m"),
        ({"granularity": "0:4"}, "0 < n < m"),
        ({"allocation": "local"}, "allocation='local' is none of"),
        ({"criterion": "gradient"}, "criterion='gradient' is none of"),
        ({"granularity": "filter", "allocation": "erk"}, "Leave allocation out"),
        ({"granularity": "2:4", "target_sparsity": 0.9}, "fixes the sparsity at 0.5"),
        ({"on_collapse": "ignore"}, "none of warn, raise"),
    ],
)
def test_rules_that_cannot_be_are_refused_early(tmp_path, given_rule, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        BIMPArguments(**run_arguments(tmp_path, **({"target_sparsity": 0.5} | given_rule)))


def test_a_pattern_fixes_the_sparsity(tmp_path) -> None:
    assert BIMPArguments(**run_arguments(tmp_path, granularity="2:8")).target_sparsity == 0.75
    assert parse_n_of_m("2:4") == (2, 4) and parse_n_of_m("weight") is None
    check_rule("filter", "uniform", "random")
