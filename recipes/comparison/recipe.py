"""What a recipe has to have so that comparisons and studies can run it."""

import importlib
from typing import Any, Protocol

from hf_bimp import BIMPArguments
from shared.outcome import Task

RECIPES = ("image_classification", "semantic_segmentation", "t5_wmt16")


class Recipe(Protocol):
    """A module with the dataclasses of its arguments, BIMPArguments the last of three, and what it is measured by."""

    ARGUMENTS: tuple[type, type, type]
    METRIC: str

    @staticmethod
    def build_task(data_args: Any, model_args: Any, args: BIMPArguments, restarts: bool = False) -> Task:
        """The whole task; with `restarts` every `train()` starts from a new model, as a search wants it."""


def load_recipe(name: str) -> Recipe:
    """One of RECIPES, by its name. Raises `ValueError` for another."""
    if name not in RECIPES:  # nothing else is imported, whatever a file says
        raise ValueError(f"recipe={name!r} is none of {', '.join(RECIPES)}.")
    return importlib.import_module(name)
