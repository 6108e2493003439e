"""RigL and movement pruning against loops written down from their definitions."""

import math

import pytest
import torch
from torch import nn

from hf_bimp import Masks
from methodical import DECAY, MOMENTUM, RATE, SHAPES, SIZE, Quadratic, flat, make, sgd, step, top, train, weights_of

LOSS = Quadratic()
SIZES = [math.prod(shape) for shape in SHAPES.values()]


def smallest(values: torch.Tensor, count: int) -> set[int]:
    return set(values.argsort(stable=True)[:count].tolist())


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_rigl_swaps_as_its_definition_says(allocation) -> None:
    weights = weights_of()
    method, optimizer = make("rigl", weights, goal=0.6, interval=3, fraction=0.5, end=0.7), sgd(weights)
    method.masks.rule.allocation = allocation
    method.attach(optimizer)
    w = flat(weights)
    alive: torch.Tensor | None = None
    buffer, swaps = None, 0
    for t in range(20):
        if t == 0:
            step(method, optimizer, t, LOSS)
            alive = torch.cat([~method.masks.pruned[name].flatten() for name in SHAPES])
            assert int(alive.sum()) == SIZE - round(0.6 * SIZE)
            w = w * alive
            buffer = (LOSS.gradient(w) + DECAY * w) * alive
            w = w - RATE * buffer
        else:
            gradient = LOSS.gradient(w)
            if t % 3 == 0 and t < 0.7 * 20:
                swaps += 1
                share = 0.5 / 2 * (1 + math.cos(math.pi * t / (0.7 * 20)))
                new, start = alive.clone(), 0
                for size in SIZES:
                    part = slice(start, start + size)
                    here, g = w[part].abs(), gradient[part].abs()
                    left = alive[part].nonzero().flatten()
                    count = int(share * len(left))
                    dropped = {int(left[i]) for i in smallest(here[left], count)}
                    kept = {int(i) for i in left} - dropped
                    others = torch.tensor(sorted(set(range(size)) - kept))
                    grown = {int(others[i]) for i in (-g[others]).argsort(stable=True)[:count]}
                    new[part] = torch.tensor([i in kept | grown for i in range(size)])
                    start += size
                w, buffer = w * new, buffer * new  # what comes back starts from zero, without momentum
                alive = new
            else:
                buffer = (MOMENTUM * buffer + gradient + DECAY * w) * alive
                w = w - RATE * buffer
            step(method, optimizer, t, LOSS)
        assert torch.equal(torch.cat([~method.masks.pruned[name].flatten() for name in SHAPES]), alive)
        torch.testing.assert_close(flat(method.masks.weights), w)
        assert method.masks.num_pruned == round(0.6 * SIZE)
    assert swaps == 4


def test_movement_keeps_what_moves_away_from_zero() -> None:
    weights = weights_of()
    method, optimizer = make("movement", weights, goal=0.5, num_prunings=3), sgd(weights)
    method.attach(optimizer)
    w, buffer, scores = flat(weights), torch.zeros(SIZE), torch.zeros(SIZE)
    alive, frozen, came_back = torch.ones(SIZE, dtype=torch.bool), torch.zeros(SIZE), 0
    for t in range(20):
        if t in (5, 10, 15):
            w = w + frozen
            k = round(method.plan.sparsities[method.cycle] * SIZE)
            before = alive
            alive = torch.ones(SIZE, dtype=torch.bool)
            alive[scores.argsort(stable=True)[:k]] = False
            came_back += int((alive & ~before).sum())
            frozen = w * ~alive if t < 15 else torch.zeros(SIZE)
            w, buffer = w * alive, buffer * alive
        gradient = LOSS.gradient(w)  # at the masked weights
        if t < 15:
            scores = scores - (w + frozen) * gradient
        buffer = (MOMENTUM * buffer + gradient + DECAY * w) * alive
        w = w - RATE * buffer
        step(method, optimizer, t, LOSS)
        torch.testing.assert_close(flat(method.masks.weights), w)
    assert came_back > 0 and int((w == 0).sum()) == round(0.5 * SIZE)


def test_masks_swap() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    masks = Masks({"w": weight})
    masks.prune(0.5)
    drop = torch.tensor([[False, False, True, True]])
    grow = torch.tensor([[True, False, False, True]])
    masks.swap({"w": drop}, {"w": grow})
    assert masks.pruned["w"].tolist() == [[False, True, True, False]]
    assert weight.tolist() == [[0.0, 0.0, 0.0, 4.0]]  # the first grows from zero, the last stays
    masks.swap({}, {"w": grow | drop})
    assert masks.pruned["w"].tolist() == [[False, True, False, False]]
    masks.swap({"w": drop}, {})
    assert masks.pruned["w"].tolist() == [[False, True, True, True]] and masks.num_pruned == 3


def test_masks_swap_before_anything_is_pruned() -> None:
    masks = Masks({"w": nn.Parameter(torch.ones(2)), "v": nn.Parameter(torch.ones(2))})
    masks.swap({"w": torch.tensor([True, False])}, {})
    assert {name: mask.tolist() for name, mask in masks.pruned.items()} == {"w": [True, False], "v": [False, False]}


def test_rigl_ends_with_the_promised_zeros_by_default() -> None:
    """With the paper's interval of 100 steps, longer than this run: a sparse training with a fixed mask."""
    method = make("rigl", weights := weights_of(), goal=0.5)
    optimizer = sgd(weights)
    method.attach(optimizer)
    train(method, optimizer)
    assert int((flat(method.masks.weights) == 0).sum()) == round(0.5 * SIZE)
    assert torch.equal(flat(method.masks.weights) != 0, top(flat(weights_of()), 0.5))
