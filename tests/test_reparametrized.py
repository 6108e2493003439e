"""CS, STR and DST: used weights, penalties and gradients, against their formulas and finite differences."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_bimp import Budget, Masks, Run, find_prunable
from hf_bimp.methods import METHODS
from hf_bimp.pruning.layers import layer_infos
from hf_bimp.schedules.retraining import DenseRates
from methodical import DECAY, RATE, SHAPES, SIZE, Quadratic, flat, make, sgd, step, train, weights_of

DOUBLE = torch.float64
STEPS = 20


def attached(name: str, optimizer=sgd, dtype: torch.dtype = DOUBLE, **knobs):
    weights = weights_of(dtype=dtype)
    method, chosen = make(name, weights, steps=STEPS, **knobs), optimizer(weights)
    method.attach(chosen)
    method.begin_step(0)
    return method, chosen


def cs_used(w: torch.Tensor, m: torch.Tensor, t: int, s0: float) -> torch.Tensor:
    gate = 1 / (1 + torch.exp(-(300 ** (t / STEPS)) * m))
    return w * gate * (1 + torch.exp(torch.tensor(-s0, dtype=w.dtype)))


def extras(method) -> torch.Tensor:
    return flat(method.extras)


def edited_gradients(method, loss: Quadratic) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    gradient = loss.gradient(flat(method.masks.weights)).split([w.numel() for w in method.masks.weights.values()])
    for weight, part in zip(method.masks.weights.values(), gradient, strict=True):
        weight.grad = part.reshape(weight.shape).clone()
    method.edit_gradients()
    to_dense = flat({name: weight.grad for name, weight in method.masks.weights.items()})
    return to_dense, {name: extra.grad for name, extra in method.extras.items()}


def finite_differences(function, at: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    steps = epsilon * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(function(at + e) - function(at - e)) / (2 * epsilon) for e in steps])


def test_cs_gradients_are_those_of_loss_and_penalty():
    method, optimizer = attached("cs", cs_initial_mask=0.05, cs_penalty=0.3)
    loss = Quadratic(DOUBLE)
    for t in range(5):
        step(method, optimizer, t, loss)
    method.begin_step(5)
    w, m = flat(method.behind), extras(method)
    assert m.std() > 0  # they have learned something

    def total(w: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return loss(cs_used(w, m, 5, 0.05)) + 0.3 * (1 / (1 + torch.exp(-(300 ** (5 / STEPS)) * m))).sum()

    torch.testing.assert_close(flat(method.masks.weights), cs_used(w, m, 5, 0.05), rtol=1e-6, atol=1e-7)
    to_w, to_m = edited_gradients(method, loss)
    torch.testing.assert_close(to_w, finite_differences(lambda x: total(x, m), w), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat(to_m), finite_differences(lambda x: total(w, x), m), rtol=1e-5, atol=1e-6)


def test_cs_starts_from_the_weights_and_ends_with_open_gates_scaled():
    method, optimizer = attached("cs", cs_initial_mask=-0.02)
    start = flat(weights_of(dtype=DOUBLE))
    torch.testing.assert_close(flat(method.masks.weights), start, rtol=1e-6, atol=1e-7)
    last = {}
    train(
        method,
        optimizer,
        Quadratic(DOUBLE),
        look=lambda t: last.update(w=flat(method.behind), m=extras(method), sparsity=method.sparsity),
    )
    expected = torch.where(last["m"] > 0, last["w"] * (1 + torch.exp(torch.tensor(0.02))), 0.0)
    torch.testing.assert_close(flat(method.masks.weights), expected, rtol=1e-6, atol=1e-7)
    zeros = (expected == 0).double().mean().item()
    assert 0 < zeros < 1 and method.sparsity == last["sparsity"] == pytest.approx(zeros)


def test_gates_and_thresholds_of_outputs_have_no_weight_decay_but_str_has_it():
    for name, decay in (("cs", 0.0), ("dst", 0.0), ("str", DECAY)):
        method, optimizer = attached(name)
        mine = {id(extra) for extra in method.extras.values()}
        groups = [group for group in optimizer.param_groups if mine & {id(p) for p in group["params"]}]
        assert [group["weight_decay"] for group in groups] == [decay]
        method.detach(optimizer)
        assert len(optimizer.param_groups) == 1


def str_used(w: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.where(w.abs() > theta.sigmoid(), w - w.sign() * theta.sigmoid(), 0.0)


def test_str_gradients_are_those_of_the_soft_threshold():
    method, _ = attached("str", str_initial_threshold=-1.0)
    loss, sizes = Quadratic(DOUBLE), [30, 24]
    w = flat(method.behind)

    def total(w: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        spread = torch.cat([t.expand(size) for t, size in zip(theta, sizes, strict=True)])
        return loss(str_used(w, spread))

    theta = torch.tensor([-1.0, -1.0], dtype=DOUBLE)
    torch.testing.assert_close(flat(method.masks.weights), torch.cat([str_used(x, theta[0]) for x in w.split(sizes)]))
    assert 0 < (flat(method.masks.weights) == 0).sum() < SIZE
    to_w, to_theta = edited_gradients(method, loss)
    torch.testing.assert_close(to_w, finite_differences(lambda x: total(x, theta), w), rtol=1e-6, atol=1e-7)
    expected = finite_differences(lambda x: total(w, x), theta)
    torch.testing.assert_close(torch.stack([to_theta[name] for name in SHAPES]), expected, rtol=1e-6, atol=1e-7)


def test_decay_raises_the_threshold_of_str():
    """Where nothing is learned: theta goes to 0, so sigmoid(theta) grows."""
    weights = weights_of()
    method = make("str", weights, steps=STEPS, str_initial_threshold=-3.0)
    optimizer = torch.optim.SGD(weights.values(), lr=RATE, weight_decay=DECAY)
    method.attach(optimizer)
    method.begin_step(0)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    method.edit_gradients()
    method.before_update(optimizer)
    optimizer.step()
    assert [extra.item() for extra in method.extras.values()] == pytest.approx([-3.0 * (1 - RATE * DECAY)] * 2)


def long_tailed(x: torch.Tensor) -> torch.Tensor:
    size = x.abs()
    return torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0).to(x.dtype))


def test_dst_gradients_follow_the_long_tailed_estimator():
    method, _ = attached("dst", dst_penalty=0.3)
    loss = Quadratic(DOUBLE)
    with torch.no_grad():
        for extra in method.extras.values():
            extra.add_(torch.linspace(0.1, 0.9, extra.numel(), dtype=DOUBLE).reshape(extra.shape))
        method.show()
    gradient = dict(zip(SHAPES, loss.gradient(flat(method.masks.weights)).split([30, 24]), strict=True))
    used = {name: weight.detach().clone() for name, weight in method.masks.weights.items()}
    _, to_t = edited_gradients(method, loss)
    for name, shape in SHAPES.items():
        w, t, g = method.behind[name], method.extras[name].detach(), gradient[name].reshape(shape)
        assert t.shape == (shape[0], *[1] * (len(shape) - 1))
        kept = (w.abs() > t).to(DOUBLE)
        assert torch.equal(used[name], w * kept) and 0 < kept.sum() < kept.numel()
        slope = long_tailed(w.abs() - t)
        torch.testing.assert_close(method.masks.weights[name].grad, g * kept + g * w * slope * w.sign())
        others = tuple(range(1, len(shape)))
        expected = (-g * w * slope).sum(others, keepdim=True) - 0.3 * torch.exp(-t)
        torch.testing.assert_close(to_t[name], expected)


def test_the_estimator_of_dst_at_the_ends_of_its_pieces():
    method, _ = attached("dst")
    dense, threshold = torch.tensor([1.0, 1.4, 1.5, 2.0, 2.25], dtype=DOUBLE), torch.ones(5, dtype=DOUBLE)
    threshold.requires_grad_()
    method.used(dense, threshold).sum().backward()
    # |w| - t is 0, 0.4, 0.5, 1 and 1.25; the gradient to t is -w times the estimator.
    torch.testing.assert_close(-threshold.grad / dense, torch.tensor([2.0, 0.4, 0.4, 0.4, 0.0], dtype=DOUBLE))


def test_a_weight_at_its_threshold_is_masked():
    method, _ = attached("dst")
    dense = torch.tensor([0.5, -0.5, 0.6, 0.0])
    assert method.used(dense, torch.tensor(0.5)).tolist() == [0.0, 0.0, pytest.approx(0.6), 0.0]


def test_a_layer_of_dst_that_keeps_next_to_nothing_starts_over():
    weights = {"few": nn.Parameter(torch.rand(10, 20) + 0.1), "many": nn.Parameter(torch.rand(10, 20) + 0.1)}
    method, optimizer = make("dst", weights), sgd(weights)
    method.attach(optimizer)
    with torch.no_grad():
        method.extras["few"].fill_(weights["few"].flatten().sort().values[-2].item())  # one of 200 is above
        method.extras["many"].fill_(weights["many"].flatten().sort().values[-3].item())  # 1 %
        threshold = method.extras["many"].clone()
        method.renew()
    assert (method.extras["few"] == 0).all() and torch.equal(method.extras["many"], threshold)


def test_thresholds_of_dst_count_the_outputs_of_every_kind_of_layer():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = nn.Linear(5, 3), nn.Conv2d(4, 6, 3)
            self.up, self.gpt = nn.ConvTranspose2d(4, 7, 3), Conv1D(9, 5)

    model = Layers()
    masks, dst = Masks(find_prunable(model).weights), METHODS["dst"]
    config = dst.Config(dst_penalty=0.1)
    method = dst(Run(dst.make_plan(Budget(4), config), masks, DenseRates([1.0] * 4), layer_infos(model)), config)
    method.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    shapes = {name: tuple(extra.shape) for name, extra in method.extras.items()}
    assert shapes["linear.weight"] == (3, 1) and shapes["conv.weight"] == (6, 1, 1, 1)
    assert shapes["up.weight"] == (1, 7, 1, 1) and shapes["gpt.weight"] == (1, 9)
