"""A method in a loop of one's own, on two small weights and a quadratic loss, for the tests of its definition."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_bimp import Budget, Masks, Run
from hf_bimp.methods import METHODS, Method
from hf_bimp.pruning.granularity import WeightRule
from hf_bimp.schedules.retraining import DenseRates

SHAPES = {"a": (6, 5), "b": (4, 3, 2)}
SIZE = 54  # of both
RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.1


def weights_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in SHAPES.items()}


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].detach().reshape(-1) for name in SHAPES])


class Quadratic:
    """|A w - b|^2 / 2, with the gradient written down."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(7)
        self.a = torch.randn(20, SIZE, generator=generator, dtype=dtype) / SIZE**0.5
        self.b = torch.randn(20, generator=generator, dtype=dtype)

    def __call__(self, w: Tensor) -> Tensor:
        return (self.a @ w - self.b).square().sum() / 2

    def gradient(self, w: Tensor) -> Tensor:
        return self.a.T @ (self.a @ w - self.b)


def sgd(weights: dict[str, nn.Parameter], decay: float = DECAY) -> torch.optim.SGD:
    return torch.optim.SGD(weights.values(), lr=RATE, momentum=MOMENTUM, weight_decay=decay)


def make(
    name: str,
    weights: dict[str, nn.Parameter],
    steps: int = 20,
    goal: float | None = 0.5,
    finetune_steps: int = 0,
    rates: list[float] | None = None,
    **knobs,
) -> Method:
    method = METHODS[name]
    config = method.Config(**knobs)
    budget = Budget(steps, None if method.traits.finds_sparsity else goal, finetune_ratio=finetune_steps / steps)
    plan, rule = method.make_plan(budget, config), WeightRule(criterion=(method.traits.criteria or ["magnitude"])[0])
    return method(Run(plan, Masks(weights, rule), DenseRates(rates or [1.0] * plan.schedule_steps)), config)


def step(method: Method, optimizer: torch.optim.Optimizer, t: int, loss: Quadratic) -> None:
    """Optimizer step t, as the trainer does it."""
    method.begin_step(t)
    if method.is_due(t):
        method.prune(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = RATE * method.rate(t)
    gradients = loss.gradient(flat(method.masks.weights)).split([w.numel() for w in method.masks.weights.values()])
    for weight, gradient in zip(method.masks.weights.values(), gradients, strict=True):
        weight.grad = gradient.reshape(weight.shape).clone()
    method.edit_gradients()
    method.before_update(optimizer)
    optimizer.step()
    method.after_update()


def train(
    method: Method,
    optimizer: torch.optim.Optimizer,
    loss: Quadratic | None = None,
    look: Callable[[int], None] = lambda t: None,
) -> None:
    """The whole run; `look` is called after every step."""
    for t in range(method.step, method.plan.total_steps):
        step(method, optimizer, t, loss or Quadratic())
        look(t)
    if method.is_due(method.plan.total_steps):
        method.prune(optimizer)


def top(values: Tensor, share: float) -> Tensor:
    """Where the largest `share` of |values| lies; no two are equal here."""
    count = len(values) - round((1 - share) * len(values))
    threshold = values.abs().sort(descending=True).values[count - 1]
    return values.abs() >= threshold
