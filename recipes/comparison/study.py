"""The YAML file of a comparison: which methods, at which sparsities, with which seeds and grids."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Real
from pathlib import Path

from comparison.recipe import RECIPES
from hf_bimp.methods import METHODS
from shared.cli import read_config


@dataclass
class Entry:
    """A line of the table: a method with fixed settings, and a grid to tune."""

    method: str
    settings: dict = field(default_factory=dict)
    grid: dict[str, list] = field(default_factory=dict)
    sparsities: list[float] | None = None  # by default the study's

    def __post_init__(self):
        if self.method not in METHODS or self.method == "dense":
            known = ", ".join(name for name in METHODS if name != "dense")
            raise ValueError(f"method: {self.method!r} is none of {known}.")
        _check_mapping("settings", self.settings)
        _check_mapping("grid", self.grid)
        for name, values in self.grid.items():
            _check_list(f"grid: {name}", values, "values to try")
        if self.sparsities is not None:
            _check_sparsities("sparsities", self.sparsities)

    @property
    def is_implicit(self) -> bool:
        return METHODS[self.method].traits.finds_sparsity


@dataclass
class Study:
    """What to compare.

    `recipe` is one of RECIPES, `base` its configuration, beside the file, and `overrides` change it. `scale`
    multiplies the metric in the table. Grids are tuned with `tuning_seed`, at `tune_at` for every sparsity, or at each
    one where that is null. Methods that find their own sparsity get the grid point that ends within
    `sparsity_tolerance` of a goal (the paper: 0.25 %).
    """

    recipe: str
    base: str
    sparsities: list[float]
    seeds: list[int]
    methods: dict[str, dict]
    overrides: dict = field(default_factory=dict)
    scale: float = 1.0
    tuning_seed: int = 0
    tune_at: float | None = None
    sparsity_tolerance: float = 0.0025

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: {self.recipe!r} is none of {', '.join(RECIPES)}.")
        _check_sparsities("sparsities", self.sparsities)
        _check_list("seeds", self.seeds, "different whole numbers", lambda seed: type(seed) is int)
        _check_mapping("methods", self.methods)
        _check_mapping("overrides", self.overrides)
        if not self.methods:
            raise ValueError("methods: there is nothing to compare.")
        if self.tune_at is not None:
            _check_sparsities("tune_at", [self.tune_at])

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Raises `ValueError` for a key that is none or is missing, or a value that cannot be."""
        return _made(cls, read_config(path))

    @property
    def entries(self) -> dict[str, Entry]:
        """Each label's; a method's own name is its label, others say `method`."""
        entries = {}
        for label, given in self.methods.items():
            given = {} if given is None else given
            _check_mapping(f"methods: {label}", given)
            try:
                entries[label] = _made(Entry, {"method": label} | given)
            except ValueError as error:
                raise ValueError(f"methods: {label}: {error}") from error
        return entries


def _made(kind: type, content: dict):
    known = [key.name for key in fields(kind)]
    if unknown := sorted(map(str, content.keys() - set(known))):
        raise ValueError(f"no such key: {', '.join(unknown)}. The keys are: {', '.join(known)}.")
    try:
        return kind(**content)
    except TypeError as error:  # one is missing
        raise ValueError(f"{error}. The keys are: {', '.join(known)}.") from error


def _check_mapping(name: str, value) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {value!r} must be a mapping of names to values.")


def _check_list(name: str, values, wanted: str, is_right: Callable[..., bool] = lambda value: True) -> None:
    """A list that is not empty, of values that `is_right` accepts and that are not given twice."""
    is_list = isinstance(values, list) and values and all(is_right(value) for value in values)
    if not is_list or any(value in values[:i] for i, value in enumerate(values)):
        raise ValueError(f"{name}: {values!r} must be a list of {wanted}.")


def _check_sparsities(name: str, values) -> None:
    _check_list(
        name, values, "different numbers strictly between 0 and 1", lambda x: isinstance(x, Real) and 0 < x < 1
    )
