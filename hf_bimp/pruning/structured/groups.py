"""Groups of filters and of attention heads that can be removed so that a model shrinks, each checked to be so."""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .filters import FilterGroup, Rows
from .heads import head_groups
from .surgery import TOLERANCE, cpu_copy, cpu_inputs, deep_copy, output_difference, remove_channels, zero_channels
from .tracing import RESIDUAL_STREAM, Inputs, call, shared_weights, trace_groups

__all__ = ["FilterGroup", "Rows", "find_filter_groups"]

logger = logging.get_logger(__name__)


def find_filter_groups(
    model: nn.Module, example_inputs: Inputs, prunable: Collection[str]
) -> tuple[list[FilterGroup], dict[str, str]]:
    """Groups of filters (output channels) that residual or concatenating paths couple, in a fixed order.

    Behind them come groups whose channels are attention heads, with all that a head has in the four projections.
    Also returns, for each weight of `prunable` in no group, why it stays dense. `example_inputs` is a tensor, a tuple
    of positional or a dict of keyword arguments; a batch of one or two is enough. The work is done on a copy of the
    model, on the CPU in float32; the model and the random state are left alone.

    Every group has been tested: taking some of its channels out leaves the outputs as zeroing them does. Of models
    that torch-pruning cannot trace only attention heads and the hidden units of feed-forward blocks are pruned, which
    is logged.
    """
    with torch.random.fork_rng(devices=[]):
        traced, inputs = cpu_copy(model), cpu_inputs(example_inputs)
        _without_cache(traced)
        call(traced, inputs)  # inputs that do not fit are no reason to fall back
        shared = shared_weights(traced)
        try:
            groups, dense = trace_groups(traced, inputs, prunable, shared)
            heads, stay = head_groups(traced, prunable, shared, _weights_of(groups))
            groups = _without_projections(groups, heads)
            sound = _sound_groups(traced, inputs, groups, heads)
            lost = groups and _weights_of(groups).isdisjoint(_weights_of(sound))
            problem = "taking channels out changes the outputs" if lost else ""
        except Exception as error:  # torch-pruning raises all kinds on what it does not know
            problem = f"{type(error).__name__}: {error}"
        if problem:
            logger.warning(
                f"{type(model).__name__} cannot be traced whole ({problem}). Of its filters only attention heads and "
                "the hidden units of feed-forward blocks are pruned; all other weights stay dense."
            )
            groups = _feed_forward_groups(traced, prunable, shared)
            heads, stay = head_groups(traced, prunable, shared, _weights_of(groups))
            dense = dict.fromkeys(
                sorted(prunable), "only attention heads and hidden units of feed-forward blocks can be found here"
            )
            dense |= {rows.name: RESIDUAL_STREAM for group in groups for rows in group.readers}
            sound = _sound_groups(traced, inputs, groups, heads)
    dense |= stay
    failed, kept = _weights_of(groups + heads), _weights_of(sound)
    changes = "taking out its filters changes the outputs even where they are zero"
    dense = dict.fromkeys(sorted(failed - kept), changes) | dense
    return sound, {name: reason for name, reason in sorted(dense.items()) if name not in kept}


def _without_cache(model: nn.Module) -> None:
    """Lets the model keep no keys and values for a next token: torch-pruning cannot follow them in GPT-2."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "use_cache", False):
            module.config.use_cache = False


def _weights_of(groups: list[FilterGroup]) -> set[str]:
    return {rows.name for group in groups for rows in group.weights}


def _without_projections(groups: list[FilterGroup], heads: list[FilterGroup]) -> list[FilterGroup]:
    """The groups that take no rows of queries, keys and values, which only go by whole heads."""
    projections = {rows.name for group in heads for one in group.attentions for rows in one.projections}
    return [group for group in groups if projections.isdisjoint(_weights_of([group]))]


def _feed_forward_groups(model: nn.Module, prunable: Collection[str], shared: Collection[int]) -> list[FilterGroup]:
    """The hidden units of every feed-forward block, traced alone; blocks that cannot be are passed over."""
    groups: list[FilterGroup] = []
    for name, module in model.named_modules():
        if not (width := _feed_forward_width(module)):
            continue
        inputs = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
        prefix = f"{name}." if name else ""
        own = {parameter.removeprefix(prefix) for parameter in prunable if parameter.startswith(prefix)}
        try:
            found, _ = trace_groups(module, inputs, own, shared)
        except Exception as error:  # takes other inputs, or is none of what torch-pruning knows
            logger.info(f"{name} is not traced: {type(error).__name__}: {error}")
            continue
        groups += [_prefixed(group, prefix) for group in _sound_groups(module, inputs, found)]
    return groups


def _feed_forward_width(module: nn.Module) -> int | None:
    """The input width of a block whose own linear layers are one or two d -> h, and a last one h -> d."""
    shapes = [
        (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
        for layer in module.children()
        if isinstance(layer, (nn.Linear, Conv1D))
    ]
    if len(shapes) not in (2, 3):
        return None
    width, hidden = shapes[0]
    return width if shapes == [(width, hidden)] * (len(shapes) - 1) + [(hidden, width)] else None


def _prefixed(group: FilterGroup, prefix: str) -> FilterGroup:
    def renamed(rows: tuple[Rows, ...]) -> tuple[Rows, ...]:
        return tuple(Rows(prefix + r.name, r.dim, r.index) for r in rows)

    return FilterGroup(group.size, renamed(group.weights), renamed(group.attached), renamed(group.readers))


def _sound_groups(model: nn.Module, inputs: Inputs, *kinds: list[FilterGroup]) -> list[FilterGroup]:
    """The groups whose channels can be removed where they are zero. Found by halving, as nearly always all are.

    Groups of one kind are likely to fail together.
    """
    groups = [group for kind in kinds for group in kind]
    if not groups:
        return []
    filled = _filled(model)

    def sound(groups: list[FilterGroup]) -> list[FilterGroup]:
        if _is_removable(filled, inputs, groups):
            return groups
        half = len(groups) // 2
        return sound(groups[:half]) + sound(groups[half:]) if half else []

    if _is_removable(filled, inputs, groups):
        return groups
    found = [group for kind in kinds for group in sound(kind)]
    return found if _is_removable(filled, inputs, found) else []


def _is_removable(model: nn.Module, inputs: Inputs, groups: list[FilterGroup]) -> bool:
    """Whether the model puts out the same with a few channels of every group zeroed as with them removed."""
    generator = torch.Generator().manual_seed(0)
    choices = [(group, torch.randperm(group.size, generator=generator)[: 1 + group.size // 4]) for group in groups]
    zeroed = deep_copy(model)
    zero_channels(zeroed, choices)
    smaller = deep_copy(zeroed)
    try:
        remove_channels(smaller, choices)
        return output_difference(zeroed, smaller, inputs) <= TOLERANCE
    except Exception as error:  # the models' code and torch-pruning's, on shapes that do not fit
        logger.info(f"{len(groups)} groups of filters are not removable together: {type(error).__name__}: {error}")
        return False


@torch.no_grad()
def _filled(model: nn.Module) -> nn.Module:
    """A copy with random parameters throughout: zeros, as after initialisation or pruning, would hide mistakes."""
    model = deep_copy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, (parameter.numel() / parameter.shape[0]) ** -0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model
