"""Values of the wrong kind: each ends at once in one form of message, which names the field and the value."""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from transformers import TrainingArguments

from helpers import run_arguments
from hf_bimp import BIMPArguments
from hf_bimp.methods import METHODS, setting_names
from hf_bimp.schedules.plan import gradual_prunings
from method_table import SHORT, ours

NAN, INF = float("nan"), float("inf")
OTHER = object()
WRONG = {
    float: (NAN, INF, 1e39, "0.5", [0.5], True, OTHER),
    int: (2.5, NAN, "2", [2], True, OTHER),
    bool: ("false", 2, None, OTHER),
    str: (3, ["a"], OTHER),
}


def wrong_for(hint: Any) -> list[Any]:
    """Values that are wrong for every kind that the field allows."""
    kinds = [kind for kind in (hint, *get_args(hint)) if kind in WRONG]
    given = [value for kind in kinds for value in WRONG[kind]]
    return [value for value in given if all(any(value is wrong for wrong in WRONG[kind]) for kind in kinds)]


def cases() -> list[tuple[str, str, Any]]:
    hints = get_type_hints(BIMPArguments)
    own = [field.name for field in fields(BIMPArguments) if field.name not in TrainingArguments.__dataclass_fields__]
    found = []
    for name in own:
        owner = next((method for method in sorted(ours) if name in setting_names(METHODS[method])), "bimp")
        found += [(owner, name, value) for value in wrong_for(hints[name])]
    return found


@pytest.mark.parametrize(("method", "name", "value"), cases())
def test_a_value_of_the_wrong_kind_is_refused_by_name(tmp_path, method, name, value) -> None:
    given = SHORT.get(method, {}) | {"method": method, name: value}
    with pytest.raises(ValueError) as error:
        BIMPArguments(**run_arguments(tmp_path, max_steps=40, **given))
    assert name in str(error.value) and repr(value) in str(error.value)


def test_all_kinds_are_covered() -> None:
    assert {name for _, name, _ in cases()} > {"dense_ratio", "cs_temperature", "dpf_interval", "gmp_hard", "method"}
    assert len(cases()) > 100


@pytest.mark.parametrize("num_prunings", [41, 10**9, 10**18])
def test_more_prunings_than_steps_end_at_once(num_prunings) -> None:
    with pytest.raises(ValueError, match=f"40 optimizer steps .*num_prunings={num_prunings}"):
        gradual_prunings(40, 0.5, num_prunings, None)


def test_as_many_prunings_as_steps_can_have() -> None:
    assert gradual_prunings(40, 0.5, 39, None)[0] == tuple(range(1, 40))
