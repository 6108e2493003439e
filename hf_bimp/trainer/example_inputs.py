"""A few training items as the model gets them, of whatever form batches have."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import logging

from ..reproducibility import preserved_random_state, untouched
from ..storage.model_formats import out_of_wrappers

logger = logging.get_logger(__name__)

Result = TypeVar("Result")


def check_readable_twice(data: Dataset | None) -> None:
    """Raises `ValueError` for data whose first items training would go without, once they have been looked at."""
    if isinstance(data, IterableDataset) and iter(data) is data:
        raise ValueError(
            "granularity='filter' traces the model with the first training items, and this data set gives every item "
            "only once. Use one that starts over when iterated again, such as a datasets.IterableDataset."
        )


def first_items(inputs: Any, items: int = 2, batch_size: int | None = None) -> Any:
    """The first items of a batch: a mapping, a tuple or list (which becomes one), or a tensor.

    What has as many rows as the batch has items is cut, lists of one entry an item (boxes, masks) too; all else, such
    as a number or a weight for each class, is left. `batch_size` is by default that of the first tensor.
    """
    size = find_batch_size(inputs) if batch_size is None else batch_size
    if isinstance(inputs, Mapping):
        return {name: first_items(value, items, size) for name, value in inputs.items()}
    if batch_size is not None and isinstance(inputs, list) and len(inputs) == size:
        return inputs[:items]
    if isinstance(inputs, (tuple, list)):
        return tuple(first_items(value, items, size) for value in inputs)
    return inputs[:items] if torch.is_tensor(inputs) and inputs.ndim and len(inputs) == size else inputs


def first_that_works(run: Callable[[Any], Result], batch: Any) -> Result:
    """`run` of two items of a batch, or of all: models that mix items may not take a few. Raises what two raise."""
    try:
        return run(first_items(batch))
    except Exception as error:  # any model's code
        try:
            return run(batch)
        except Exception:
            raise error from None


class _FirstCall(Exception):
    """A module is being called."""


def inputs_of_first_call(model: nn.Module, run: Callable[[nn.Module], Any]) -> Any:
    """What `run(model)` calls the model with, a tuple or a dict; it is stopped there, so that nothing is computed.

    None where it calls something else first: a part of the model, or nothing.
    """
    calls: list[Any] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is model:
            calls.append(_together(module, args, kwargs))
        raise _FirstCall

    hooks = [m.register_forward_pre_hook(stop, prepend=True, with_kwargs=True) for m in model.modules()]
    try:
        run(model)
    except Exception as error:  # any trainer's compute_loss
        if not isinstance(error, _FirstCall):
            logger.info(f"compute_loss did not get as far as the model: {type(error).__name__}: {error}")
    finally:
        for hook in hooks:
            hook.remove()
    return calls[0] if calls else None


@contextlib.contextmanager
def watched_calls(model: nn.Module) -> Iterator[list[Any]]:
    """Gives what the model is called with inside, call by call."""
    calls: list[Any] = []

    def watch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(_together(module, args, kwargs))

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _together(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Arguments as a tuple where none has a name, else by name."""
    if not (args and kwargs):
        return kwargs or args
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def described(inputs: Any) -> str:
    """What a batch holds, with shapes."""
    if torch.is_tensor(inputs):
        return f"{str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {described(value)}" for name, value in inputs.items()) or "nothing"
    if isinstance(inputs, (tuple, list)):
        within = f" of {described(inputs[0])}" if inputs else ""
        return f"{type(inputs).__name__} of length {len(inputs)}{within}"
    return type(inputs).__name__


def fitting_example(model: nn.Module, batch: Any, handed_to_the_model: Callable[[], Any]) -> Any:
    """Two items of `batch`, or all of it, on which the model can run; else those of `handed_to_the_model()`.

    The model is left as it was. Raises `ValueError`, with what the batch holds, where it takes none of these.
    """
    model = out_of_wrappers(model)

    def run(inputs: Any) -> Any:
        with untouched(model), preserved_random_state(), torch.no_grad():
            model.eval()
            model(**inputs) if isinstance(inputs, Mapping) else model(*_as_tuple(inputs))
        return inputs

    try:
        return first_that_works(run, batch)
    except Exception as error:
        handed = handed_to_the_model()
        with contextlib.suppress(Exception):
            if handed is not None:
                return first_that_works(run, handed)
        raise ValueError(
            "granularity='filter' traces the model with the first training items, and the model does not take them: "
            f"{type(error).__name__}: {error}. The batch holds {described(batch)}. Have the data collator return the "
            "model's own arguments as a dict, or use granularity='weight'."
        ) from error


def _as_tuple(inputs: Any) -> tuple:
    return inputs if isinstance(inputs, tuple) else (inputs,)
