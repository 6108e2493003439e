"""How much less a sparse model has to compute: multiply-adds of one inference where zero weights cost nothing."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..pruning.layers import PRUNABLE_MODULES, weight_of
from ..reproducibility import Watch, preserved_random_state, untouched
from ..storage.model_formats import out_of_wrappers


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one forward pass, one for each product of two numbers: half of torch's flops.

    `total`: of the whole pass over the example batch; `per_weight`: by parameter name, those in which an element of
    that weight is a factor. All elements of a linear or convolution weight take part in equally many. `used`: the
    parameters that any operation of the pass has read; `written`: those that one has changed, as moving averages are.
    """

    total: int
    per_weight: dict[str, int]
    used: frozenset[str] = field(default=frozenset(), compare=False)
    written: frozenset[str] = field(default=frozenset(), compare=False)

    def speedup(self, density: Mapping[str, float]) -> float:
        """Dense over sparse multiply-adds, where `density` is the share of nonzero elements by parameter name.

        Weights that `density` leaves out count as dense. 1.0 for a model without multiply-adds, `math.inf` only where
        the zeros leave none at all: attention scores and layers out of reach of pruning remain, whatever is pruned.
        Raises `ValueError` for a name that is not in `per_weight`.
        """
        if unknown := sorted(density.keys() - self.per_weight.keys()):
            raise ValueError(f"No multiply-adds are counted for {unknown[:5]}: not a linear or convolution weight.")
        if self.total == 0:
            return 1.0
        remaining = self.total - sum(self.per_weight[name] * (1 - share) for name, share in density.items())
        return self.total / remaining if remaining else math.inf


def count_multiply_adds(model: nn.Module, example_inputs: Tensor | tuple | Mapping[str, Any]) -> MultiplyAdds:
    """Runs `model` once over `example_inputs`, positional (a tensor, a tuple) or by keyword, as it does at inference.

    The inputs are on the model's device. Matrix products and convolutions count, padding and masked positions of
    attention included; biases, normalisation, activations and embeddings do not, and neither do the kernels that
    torch has no formula for: `nn.LSTM`'s, `nn.Bilinear`'s, flash attention packages. Names are those of the model
    out of its wrappers (DDP, `torch.compile`). A weight shared by several modules, or used several times, gets the
    sum, and one that the pass does not use gets 0. Where a layer's weight is used without calling the layer (the
    `out_proj` of `nn.MultiheadAttention`), its multiply-adds are in `total` alone, that is, they count as dense.
    The pass changes nothing of the model, buffers included.
    """
    model = out_of_wrappers(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # tied ones under the first name
    layers: dict[nn.Module, str] = {
        module: names[id(weight_of(module))]
        for module in model.modules()
        # A reparametrised weight (weight norm) is no parameter of the model.
        if isinstance(module, PRUNABLE_MODULES) and weight_of(module) is not None
    }
    # Fused operations of torch that its counter knows no formula for: only their shapes matter, whatever their sums.
    inner_products = dict.fromkeys(
        [torch.ops.aten.mv, torch.ops.aten.dot, torch.ops.aten._grouped_mm], _flops_of_inner_products
    )
    counter = FlopCounterMode(display=False, custom_mapping=inner_products)
    args, kwargs = _call_arguments(example_inputs)
    with _inference(model) as watch, counter, _attributed(counter, layers) as flops:
        model(*args, **kwargs)
    per_weight = {name: flops[name] // 2 for name in sorted(flops)}
    used, written = (frozenset(names[i] for i in found if i in names) for found in (watch.used, watch.written))
    return MultiplyAdds(counter.get_total_flops() // 2, per_weight, used, written)


def theoretical_speedup(model: nn.Module, example_inputs: Tensor | tuple | Mapping[str, Any]) -> float:
    """Dense over sparse multiply-adds of `model` as it is: every zero of its linear and convolution weights is free.

    `example_inputs` as in `count_multiply_adds`, whose exceptions hold here too.
    """
    counts = count_multiply_adds(model, example_inputs)
    weights = dict(out_of_wrappers(model).named_parameters())
    # A weight without elements is used in no multiply-add, so that its density does not matter.
    return counts.speedup({n: int(weights[n].count_nonzero()) / max(weights[n].numel(), 1) for n in counts.per_weight})


def _call_arguments(example_inputs: Tensor | tuple | Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}


def _flops_of_inner_products(left: torch.Size, *args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * left[-1]


@contextlib.contextmanager
def _attributed(counter: FlopCounterMode, layers: Mapping[nn.Module, str]) -> Iterator[dict[str, int]]:
    """The flops counted inside the calls of `layers`, by the weight name that is given for each.

    The counter's own table tells modules by class and attribute names, which two modules can share.
    """
    flops = dict.fromkeys(layers.values(), 0)
    running: list[str] = []  # a layer may call another within its own call: what is inside is the inner one's
    counted = 0

    def credit() -> None:
        nonlocal counted
        now = counter.get_total_flops()
        if running:
            flops[running[-1]] += now - counted
        counted = now

    def enter(layer: nn.Module, inputs: tuple) -> None:
        credit()
        running.append(layers[layer])

    def leave(layer: nn.Module, inputs: tuple, output: Any) -> None:
        credit()
        running.pop()

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            # Innermost, so that what other hooks compute is not the layer's.
            hooks.callback(layer.register_forward_pre_hook(enter).remove)
            hooks.callback(layer.register_forward_hook(leave, prepend=True).remove)
        yield flops


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[Watch]:
    """Evaluation mode without gradients, out of kernels that count as nothing; all is left as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()  # nn.TransformerEncoder in one kernel
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with untouched(model) as watch, preserved_random_state(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.eval()
            for parameter in trained:  # torch's counter fails where a parameter itself is a module's input
                parameter.requires_grad_(False)
            yield watch
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for parameter in trained:
            parameter.requires_grad_(True)
