"""Types and ranges of settings: what a field's hint allows, said in one form. `Annotated[float, between(0, 1)]`."""

from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, TypedDict, Union, get_args, get_origin

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError

LARGEST = 3.4e38  # that a 32-bit float has room for

_NAMES: dict[Any, str] = {
    float: f"a finite number, up to {LARGEST:g}",
    int: "a whole number",
    bool: "true or false",
    str: "a text",
    type(None): "left out",
}


def at_least(low: float) -> Callable[[float | None], None]:
    """Or None, where the field's type has that."""

    def check(value: float | None) -> None:
        if value is not None and not value >= low:
            raise ValueError(f"{value} must be at least {low}.")

    return check


def between(low: float, high: float) -> Callable[[float | None], None]:
    """Strictly; or None, where the field's type has that."""

    def check(value: float | None) -> None:
        if value is not None and not low < value < high:
            raise ValueError(f"{value} must lie strictly between {low} and {high}.")

    return check


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as a field of type `hint` has it: a whole number will do for a float, a list for a tuple.

    Raises `ValueError` that names field, value and what is allowed, also where a number is not finite in 32
    bits, or a check in an `Annotated` hint refuses the value.
    """
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    make: Any = TypedDict
    taken = _as_meant(value, plain)
    try:
        if not _is_finite(taken):
            raise ValueError
        validate_typed_dict(make("Setting", {"value": plain}), {"value": taken})
    except (ValueError, TypeError, StrictDataclassFieldValidationError) as error:
        hint_for_text = " A text is no number: in YAML write 1.0e-3, and no quotes." if _is_text(value, plain) else ""
        raise ValueError(f"{name}={value!r} must be {described(plain)}.{hint_for_text}") from error
    for check in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        try:
            check(taken)
        except ValueError as error:
            raise ValueError(f"{name}={value!r}: {error}") from error
    return taken


def described(hint: Any) -> str:
    """What a type allows, in words."""
    options, origin = get_args(hint), get_origin(hint)
    if origin in (Union, UnionType):
        words = [described(option) for option in options if option is not type(None)]
        return " or ".join(words + ["left out"] * (type(None) in options))
    if origin in (list, tuple):
        return f"a list, each item of it {described(options[0])}" if options else "a list"
    if origin is dict:
        return "a mapping of names to values"
    return _NAMES.get(hint, str(hint))


def _is_text(value: Any, hint: Any) -> bool:
    """Whether a number was wanted and a text came."""
    numbers = {hint, *get_args(hint)} & {int, float}
    return bool(numbers) and isinstance(value, str)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or abs(value) <= LARGEST


def _as_meant(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` has it: JSON and YAML write 1 for the float 1.0, and know no tuples.

    Anything that does not fit is left for the check, except for a bool, which passes for an integer in Python.
    """
    options, origin = get_args(hint), get_origin(hint)
    if origin in (Union, UnionType):
        if type(value) in options:
            return value
        converted = (_as_meant(value, option) for option in options)
        return next((new for new in converted if new is not value), value)
    if hint in (int, float) and isinstance(value, bool):
        return _Unfit()
    if hint is float and type(value) is int:
        return float(value)
    if origin is list and isinstance(value, list):
        return [_as_meant(item, options[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: _as_meant(item, options[1]) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        each = options[:1] * len(value) if options[1:] == (...,) else options
        if len(each) != len(value):
            return tuple(value)
        return tuple(_as_meant(*pair) for pair in zip(value, each, strict=True))
    return value


class _Unfit:
    """Fits no type."""
