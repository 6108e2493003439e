"""Allocations against slow, obvious NumPy versions, over several prunings of random layers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_bimp import Masks
from hf_bimp.pruning.allocation import Layer, layer_counts, max_sparsity
from hf_bimp.pruning.granularity import WeightRule
from hf_bimp.pruning.lamp import lamp_counts

PER_LAYER = ("uniform", "uniform_plus", "erk")
SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=5,
)


def parameters(shapes: list[tuple[int, ...]], seed: int, whole_numbers: bool = False) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    make = (lambda s: torch.randint(-3, 4, s, generator=generator).float()) if whole_numbers else None
    return {
        f"{i}": nn.Parameter(make(s) if make else torch.randn(s, generator=generator)) for i, s in enumerate(shapes)
    }


def ordered(weights: dict[str, np.ndarray], pruned: set, scores: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    """All weights in the order in which they go, layer by layer index by index where scores are equal."""
    entries = [(scores[n].flat[i], (n, i) not in pruned, n, i) for n in weights for i in range(weights[n].size)]
    return [(name, index) for _, _, name, index in sorted(entries)]


def brute_lamp(weight: np.ndarray) -> np.ndarray:
    squares = weight.astype(np.float64) ** 2
    return np.array([u / squares[squares >= u].sum() if u else 0.0 for u in squares.flat])


def brute_quotas(allocation: str, shapes: list, caps: list[int], keep: int, first: int | None, last: int | None):
    """What each layer keeps, as fractions: a scale found by bisection, and caps."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    fixed: dict[int, float] = {}
    if allocation == "uniform_plus":
        if first is not None:
            fixed[first] = caps[first]
        if last is not None and last != first:
            wanted = max(sizes[last] * keep / sum(sizes), -(-sizes[last] // 5))
            fixed[last] = min(wanted, caps[last])
    shares = [sum(shape) if allocation == "erk" else size for shape, size in zip(shapes, sizes, strict=True)]
    low, high = 0.0, float(max(sizes) + 1)
    for _ in range(200):
        scale = (low + high) / 2
        total = sum(fixed.get(i, min(caps[i], scale * shares[i])) for i in range(len(shapes)))
        low, high = (scale, high) if total < keep else (low, scale)
    return [fixed.get(i, min(caps[i], scale * shares[i])) for i in range(len(shapes))]


@given(shapes=SHAPES, seed=st.integers(0, 99), steps=st.lists(st.floats(0, 1), min_size=1, max_size=3))
@pytest.mark.parametrize("whole_numbers", [False, True])
@settings(deadline=None, derandomize=True, max_examples=60)
def test_lamp_is_the_brute_force_order(shapes, seed, steps, whole_numbers) -> None:
    weights, pruned = parameters(shapes, seed, whole_numbers), set()
    masks = Masks(weights, WeightRule("lamp"))
    for sparsity in sorted(steps):
        values = {name: w.detach().numpy().copy() for name, w in weights.items()}
        scores = {name: brute_lamp(value) for name, value in values.items()}
        pruned = set(ordered(values, pruned, scores)[: round(sparsity * masks.num_weights)])
        masks.prune(sparsity)
        assert flat(masks) == pruned


def test_lamp_of_a_quantized_layer_with_a_single_larger_weight() -> None:
    """All in one bucket of a histogram, where sums in floating point could not tell the two values apart."""
    one, next_one = torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    quantized = torch.full((300_000,), float(one))
    quantized[7] = next_one
    other = torch.linspace(0.1, 3, 1000)
    counts = lamp_counts(
        [quantized, other], [torch.zeros(len(w), dtype=torch.bool) for w in (quantized, other)], 300_000
    )
    scores = np.concatenate([np.full(299_999, 1 / (299_999 + float(next_one) ** 2)), [1.0], brute_lamp(other.numpy())])
    taken = np.argsort(scores, kind="stable")[:300_000]
    assert counts == [int((taken < 300_000).sum()), int((taken >= 300_000).sum())]


@given(
    shapes=SHAPES,
    seed=st.integers(0, 99),
    steps=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    allocation=st.sampled_from(PER_LAYER),
    criterion=st.sampled_from(["magnitude", "random"]),
    first=st.integers(0, 4),
    last=st.integers(0, 4),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_layers_get_their_shares(shapes, seed, steps, allocation, criterion, first, last) -> None:
    weights, pruned = parameters(shapes, seed), set()
    masks = Masks(weights, WeightRule(allocation, criterion, seed, f"{first}", f"{last}"))
    layers = [Layer(tuple(s), 0, i == first, i == last) for i, s in enumerate(shapes)]
    for sparsity in sorted(steps):
        k = round(sparsity * masks.num_weights)
        if k > round(max_sparsity(allocation, layers) * masks.num_weights) and k > len(pruned):
            with pytest.raises(
                ValueError, match=f"{math.floor(max_sparsity(allocation, layers) * 1e4) / 1e4} is the max"
            ):
                masks.check_plan([sparsity])
            return
        values = {name: w.detach().numpy().copy() for name, w in weights.items()}
        caps = [value.size - sum(n == name for n, _ in pruned) for name, value in values.items()]
        masks.prune(sparsity)
        assert flat(masks) >= pruned and masks.num_pruned == k
        counts = [sum(n == name for n, _ in flat(masks)) for name in values]
        for i, (name, value) in enumerate(values.items()):
            if criterion == "magnitude":
                own = {name: value}
                chosen = ordered(own, pruned, {name: abs(value)})[: counts[i]]
                assert {entry for entry in flat(masks) if entry[0] == name} == set(chosen)
        apart = [number if number < len(shapes) else None for number in (first, last)]
        quotas = brute_quotas(allocation, shapes, caps, masks.num_weights - k, *apart)
        kept = [value.size - count for value, count in zip(values.values(), counts, strict=True)]
        reachable = abs(sum(quotas) - sum(kept)) < 1e-6  # else UNIFORM+'s last layer had to give way
        if reachable:
            assert all(abs(number - quota) < 1 + 1e-6 for number, quota in zip(kept, quotas, strict=True))
            cut = [quota - number for number, quota in zip(kept, quotas, strict=True)]
            assert max(cut) - min(cut) <= 1 + 1e-6  # the largest remainders were the ones rounded up
        pruned = flat(masks)


def flat(masks: Masks) -> set[tuple[str, int]]:
    return {(name, int(i)) for name, mask in masks.pruned.items() for i in mask.flatten().nonzero()}


@pytest.mark.parametrize("allocation", PER_LAYER)
def test_what_was_pruned_unevenly_before_stays_and_the_others_share_the_rest(allocation) -> None:
    layers = [Layer((10, 10), pruned=95), Layer((10, 10)), Layer((10, 10))]
    counts = layer_counts(allocation, layers, 150)
    assert counts[0] == 95 and sorted(counts[1:]) == [27, 28]


def test_uniform_plus_leaves_the_first_convolution_and_a_fifth_of_the_last_layer() -> None:
    layers = [
        Layer((4, 3, 3, 3), is_first_convolution=True),
        Layer((8, 4, 3, 3)),
        Layer((8, 8, 3, 3)),
        Layer((10, 8), is_last_linear=True),
    ]
    total = 108 + 288 + 576 + 80
    assert layer_counts("uniform_plus", layers, round(0.5 * total)) == [0, 162, 324, 40]
    most = total - 108 - 16
    assert max_sparsity("uniform_plus", layers) == most / total
    assert layer_counts("uniform_plus", layers, most) == [0, 288, 576, 64]
    with pytest.raises(ValueError, match=f"{math.floor(most / total * 1e4) / 1e4} is the maximum"):
        layer_counts("uniform_plus", layers, most + 1)


def resnet50_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(planes, width, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)]
            if block == 0:
                shapes.append((4 * planes, width, 1, 1))
            width = 4 * planes
    return [*shapes, (1000, 2048)]


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95, 0.98])
def test_erk_on_resnet50(sparsity) -> None:
    shapes = resnet50_shapes()
    sizes = [int(np.prod(shape)) for shape in shapes]
    assert sum(sizes) == 25_502_912
    k = round(sparsity * sum(sizes))
    counts = layer_counts("erk", [Layer(shape) for shape in shapes], k)
    densities = [1 - count / size for count, size in zip(counts, sizes, strict=True)]
    assert sum(counts) == k and all(0 <= density <= 1 for density in densities)
    raw = [Fraction(sum(shape), size) for shape, size in zip(shapes, sizes, strict=True)]
    free = [i for i, density in enumerate(densities) if density < 1]
    scales = [densities[i] / float(raw[i]) for i in free]
    # proportional but for rounding, which is the coarser the smaller the layer
    assert max(scales) - min(scales) < 2 * max(1 / float(raw[i]) / sizes[i] for i in free)
    assert all(float(raw[i]) * max(scales) >= 1 - 1e-3 for i in range(len(shapes)) if i not in free)
    if sparsity == 0.8:
        assert densities[1] == 1 and densities[-1] < 0.2  # a small 1x1 convolution and the classifier


def test_global_is_the_default_and_random_forgets_magnitudes() -> None:
    torch.manual_seed(0)
    weights = {"a": nn.Parameter(torch.randn(200, 200)), "b": nn.Parameter(10 * torch.randn(200, 200))}
    masks = Masks(weights, WeightRule(criterion="random", seed=3))
    magnitudes = {name: w.detach().abs().clone() for name, w in weights.items()}
    selection = masks.prune(0.5)
    assert masks.num_pruned == 40_000
    for name, mask in masks.pruned.items():
        assert abs(mask.float().mean() - 0.5) < 0.02  # five standard deviations are 0.0125
        assert abs(magnitudes[name][mask].mean() / magnitudes[name].mean() - 1) < 0.02
    assert selection.threshold == max(float(magnitudes[n][m].max()) for n, m in masks.pruned.items())


@pytest.mark.parametrize("allocation", ["global", "uniform", "lamp"])
def test_random_pruning_repeats_itself_and_builds_on_what_was_pruned(allocation) -> None:
    def run(seed: int) -> list[dict]:
        masks = Masks(parameters([(9, 9), (5, 3, 3)], 1), WeightRule(allocation, "random", seed))
        history = []
        for sparsity in (0.3, 0.6, 0.9):
            masks.prune(sparsity)
            history.append({name: mask.clone() for name, mask in masks.pruned.items()})
        return history

    first, again, other = run(0), run(0), run(1)
    for before, after in zip(first, first[1:], strict=False):
        assert all((after[name] >= before[name]).all() for name in before)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(first, again, strict=True) for n in a)
    assert any(not torch.equal(first[0][n], other[0][n]) for n in first[0])
