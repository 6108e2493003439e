"""Exact global selection: the smallest magnitudes, with the fixed order of ties, against sorting in Python."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import hf_bimp.pruning.ranking
from hf_bimp import Masks
from hf_bimp.pruning.ranking import mark_smallest, prune_smallest, selection_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few different values: ties within and across layers. 2**-24 is subnormal in float16, 1e-40 in float32.
VALUES = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.0078125, -3.0, 1e-40, 2.0**-24, -(2.0**-24), 65504.0, 0.3]
LAYOUTS = ["contiguous", "transposed", "channels_last", "strided"]


def laid_out(values: list[float], dtype: torch.dtype, layout: str) -> torch.nn.Parameter:
    flat = torch.tensor(values, dtype=torch.float32).to(dtype)
    if layout == "transposed":
        tensor = flat.view(len(flat) // 4, 4).t()
    elif layout == "channels_last":
        tensor = flat.view(-1, 2, 2, 1).to(memory_format=torch.channels_last)
    elif layout == "strided":
        tensor = flat.view(-1, 4)[:, ::2]
    else:
        tensor = flat.view(-1, 4)
    return torch.nn.Parameter(tensor)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, torch.nn.Parameter]:
    made = {}
    for name in sorted(["b", "a.10", "a.2", "z"][: draw(st.integers(1, 4))]):
        size = 4 * draw(st.integers(1, 6))
        values = draw(st.lists(st.sampled_from(VALUES), min_size=size, max_size=size))
        made[name] = laid_out(values, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)))
    return made


def entries(weights: dict[str, torch.nn.Parameter]) -> list[tuple[float, str, int]]:
    """(magnitude, parameter name, flat index) of every weight."""
    return [
        (abs(value), name, index)
        for name, weight in weights.items()
        for index, value in enumerate(weight.detach().double().flatten().tolist())
    ]


def flat_mask(masks: Masks) -> list[tuple[str, int]]:
    return [
        (name, index)
        for name, mask in masks.pruned.items()
        for index, is_pruned in enumerate(mask.flatten().tolist())
        if is_pruned
    ]


@given(weights=layers(), steps=st.lists(st.floats(0.05, 0.99), min_size=1, max_size=3), chunk=st.integers(1, 9))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_exactly_the_smallest_in_the_order_of_ties(
    weights: dict[str, torch.nn.Parameter], steps: list[float], chunk: int
) -> None:
    masks, pruned = Masks(weights), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_bimp.pruning.ranking, "CHUNK", chunk)
        for sparsity in sorted(steps):
            before = entries(weights)
            ordered = sorted(before, key=lambda entry: ((entry[1], entry[2]) not in pruned, *entry))
            removed = ordered[: round(sparsity * len(before))]
            pruned = {(name, index) for _, name, index in removed}
            selection = masks.prune(sparsity)
            assert set(flat_mask(masks)) == pruned
            assert masks.num_pruned == len(removed) == round(sparsity * masks.num_weights)
            assert selection.threshold == max((entry[0] for entry in removed), default=0.0)
            magnitudes = np.array([entry[0] for entry in before])
            assert selection.norm == pytest.approx(np.linalg.norm(magnitudes), rel=1e-12)
            assert selection.removed_norm == pytest.approx(np.linalg.norm([e[0] for e in removed]), rel=1e-12)
            for magnitude, name, index in before:
                now = abs(weights[name].detach().double().flatten()[index].item())
                assert now == (0 if (name, index) in pruned else magnitude)


@given(weights=layers(), sparsity=st.floats(0.0, 1.0))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_weights_are_only_read(weights: dict[str, torch.nn.Parameter], sparsity: float) -> None:
    copies = copy.deepcopy(weights)
    pruned = [torch.zeros(weight.shape, dtype=torch.bool) for weight in weights.values()]
    k = round(sparsity * sum(weight.numel() for weight in weights.values()))
    prune_smallest(list(weights.values()), pruned, k)
    assert sum(int(mask.sum()) for mask in pruned) == k
    for name, weight in weights.items():
        assert torch.equal(weight.signbit(), copies[name].signbit()) and torch.equal(weight, copies[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_weights_as_numpy_partitions_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_bimp.pruning.ranking, "CHUNK", 1000)
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(50, 77).to(dtype)) for name in "abc"}
    flat = np.concatenate([w.detach().float().numpy().ravel() for w in weights.values()])
    masks = Masks(weights)
    for sparsity in (0.013, 0.5, 0.97):
        selection = masks.prune(sparsity)
        k = round(sparsity * flat.size)
        order = np.argsort(np.abs(flat), kind="stable")[:k]  # no zero among them: stable is the order of ties
        expected = np.zeros(flat.size, dtype=bool)
        expected[order] = True
        assert np.array_equal(np.concatenate([mask.numpy().ravel() for mask in masks.pruned.values()]), expected)
        assert selection.threshold == np.abs(flat)[order[-1]]


def test_weights_pruned_before_go_ahead_of_other_zeros() -> None:
    weights = {"a": torch.nn.Parameter(torch.tensor([[5.0, 5.0]])), "b": torch.nn.Parameter(torch.ones(1, 2))}
    masks = Masks(weights)
    masks.prune(0.5)
    assert flat_mask(masks) == [("b", 0), ("b", 1)]
    weights["a"].data.zero_()  # earlier in the order of names and as small
    masks.prune(0.75)
    assert flat_mask(masks) == [("a", 0), ("b", 0), ("b", 1)]


def test_channels_last_ties_go_by_the_logical_index() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))
    masks = Masks({"w": weight})
    masks.prune(5 / 24)
    assert flat_mask(masks) == [("w", index) for index in range(5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_pruned_already", [False, True])
def test_weights_that_are_no_numbers_raise_and_change_nothing(
    dtype: torch.dtype, bad: float, is_pruned_already: bool
) -> None:
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(4, 4).to(dtype)) for name in "ab"}
    masks = Masks(weights)
    if is_pruned_already:
        masks.prune(0.25)
    weights["b"].data[weights["b"] == weights["b"].max()] = bad
    before, pruned = copy.deepcopy(weights), copy.deepcopy(masks.pruned)
    with pytest.raises(ValueError, match="NaN or infinite.*Lower learning_rate"):
        masks.prune(0.5)
    assert masks.pruned.keys() == pruned.keys()
    assert all(torch.equal(mask, pruned[name]) for name, mask in masks.pruned.items())
    assert all(torch.equal(w.nan_to_num(), before[n].nan_to_num()) for n, w in weights.items())


def test_a_pruning_of_nothing_prunes_nothing() -> None:
    masks = Masks({"w": torch.nn.Parameter(torch.tensor([[3.0, 0.0, 4.0]]))})
    selection = masks.prune(0.1)
    assert (masks.num_pruned, selection.threshold, selection.removed_norm, selection.norm) == (0, 0.0, 0.0, 5.0)


def test_the_largest_finite_weights_can_be_pruned() -> None:
    largest = torch.finfo(torch.float32).max
    masks = Masks({"w": torch.nn.Parameter(torch.tensor([[largest, -largest, largest, largest]]))})
    assert masks.prune(0.75).threshold == largest and masks.num_pruned == 3


class HostReads(TorchDispatchMode):
    """Counts the operations that would make a program wait for an accelerator."""

    WAITING = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # A boolean mask as an index is a nonzero within.
        by_mask = name == "index" and any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1])
        self.count += name in self.WAITING or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scored", [False, True])
def test_on_accelerators_no_chunk_is_waited_for(monkeypatch, scored) -> None:
    """Ties at the threshold included, and what is marked is the same."""
    monkeypatch.setattr(hf_bimp.pruning.ranking, "CHUNK", 64)
    counts = {}
    for size in (64, 64 * 50):
        weight = torch.randint(-9, 10, (size,), generator=torch.Generator().manual_seed(0)).float()
        scores = [weight.roll(1)] if scored else None
        expected = torch.zeros(size, dtype=torch.bool)
        mark_smallest([weight], [expected], size // 3, scores)
        mask = torch.zeros(size, dtype=torch.bool)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf_bimp.pruning.ranking, "_reads_are_free", lambda tensor: False)
            with HostReads() as reads:
                mark_smallest([weight], [mask], size // 3, scores)
            counts[size] = reads.count
        assert torch.equal(mask, expected)
        with HostReads() as reads:
            selection_of([weight], [mask])
        assert reads.count == 0  # one copy of three sums
    assert counts[64] == counts[64 * 50] > 0


def test_methods_that_rank_at_every_step_ask_for_no_norms(monkeypatch) -> None:
    weights = {"w": torch.nn.Parameter(torch.randn(40))}
    masks = Masks(weights)

    def refuse(*args):
        raise AssertionError("nobody reads these norms")

    monkeypatch.setattr("hf_bimp.pruning.masks.selection_of", refuse)
    assert int(masks.marks(0.5)["w"].sum()) == 20 and not masks.pruned
    masks.renew(0.25, {"w": torch.randn(40)})
    assert masks.num_pruned == 10
