"""The methods by name, and their settings from a mapping."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from .base import Method

METHODS: dict[str, type[Method]] = {}


def register_method(method: type[Method]) -> type[Method]:
    """A class decorator that makes `method="its name"` work, with `method_config` for its `Config`.

    Register where your module is imported, before the arguments are made. Raises `ValueError` for a name that is
    taken, and `TypeError` for what is no method.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"{method!r} is no subclass of hf_bimp.Method.")
    if not isinstance(vars(method).get("name"), str) or not is_dataclass(method.Config):
        raise TypeError(f"{method.__name__} needs a name of its own, a string, and a Config, a dataclass.")
    taken = METHODS.get(method.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(f"There is a method {method.name!r} already. Register yours under another name.")
    METHODS[method.name] = method
    return method


def method_named(name: str) -> type[Method]:
    """Raises `ValueError` where there is none."""
    if name not in METHODS:
        raise ValueError(
            f"method={name!r} is none of {', '.join(METHODS)}. One of your own is registered with "
            "hf_bimp.register_method, before the arguments are made."
        )
    return METHODS[name]


def setting_names(method: type[Method]) -> tuple[str, ...]:
    """The names of the fields of its `Config`."""
    return tuple(setting.name for setting in fields(method.Config))


def make_config(method: type[Method], given: Mapping[str, Any]) -> Any:
    """The `Config` of `method` with the values of `given`, for what has one, and defaults for the rest.

    Types are checked, and ranges where a field's type is `Annotated[float, check]`: `check(value)` raises `ValueError`
    for what is out of range, and so may the `__post_init__` of the `Config`. Raises `ValueError` that names the field.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"method_config={given!r} must be a mapping of settings, such as {_example(method)}.")
    own = [setting for setting in fields(method.Config) if setting.init]
    known = [setting.name for setting in own]
    if unknown := [str(name) for name in given if name not in known]:
        raise ValueError(
            f"method_config: {', '.join(unknown)} is no setting of method={method.name!r}. It has: "
            f"{', '.join(known) or 'none'}."
        )
    needed = [
        s.name for s in fields(method.Config) if s.init and s.default is MISSING and s.default_factory is MISSING
    ]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"method_config: method={method.name!r} needs {', '.join(missing)}.")
    plain, hints = get_type_hints(method.Config), get_type_hints(method.Config, include_extras=True)
    values = {}
    for name, value in given.items():
        try:
            values[name] = _as_meant(value, plain[name])
            validate_typed_dict(_schema(name, hints[name]), {name: values[name]})
        except (ValueError, StrictDataclassFieldValidationError) as error:
            reason = error.__cause__ or error
            raise ValueError(f"method_config of method={method.name!r}: {name}: {reason}") from error
    return method.Config(**values)


def parse_mapping(text: str) -> dict[str, Any]:
    """`method_config` from the command line. Raises `ValueError` where it is no JSON object."""
    try:
        mapping = json.loads(text)
    except ValueError as error:
        raise ValueError(f"method_config={text!r} is no JSON ({error}), such as '{{\"interval\": 50}}'.") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"method_config={text!r} must be a mapping, such as '{{\"interval\": 50}}'.")
    return mapping


def _as_meant(value: Any, hint: Any) -> Any:
    """`value` as the type `hint` has it: JSON and YAML write 1 for the float 1.0, and know no tuples.

    Anything that does not fit is left for the check, except for a bool, which passes for an integer in Python.
    """
    options = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        if type(value) in options:
            return value
        converted = (_as_meant(value, option) for option in options)
        return next((new for new in converted if new is not value), value)
    if hint in (int, float) and isinstance(value, bool):
        raise ValueError(f"{value!r} must be a number.")
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is list and isinstance(value, list):
        return [_as_meant(item, options[0]) for item in value]
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _as_meant(item, options[1]) for key, item in value.items()}
    if get_origin(hint) is tuple and isinstance(value, list):
        each = options[:1] * len(value) if options[1:] == (...,) else options
        if len(each) != len(value):
            return tuple(value)
        return tuple(_as_meant(*pair) for pair in zip(value, each, strict=True))
    return value


def _schema(name: str, hint: Any) -> Any:
    """A TypedDict of one field, which is what huggingface_hub checks values against."""
    make: Any = TypedDict
    return make("Setting", {name: hint})


def _example(method: type[Method]) -> str:
    first = next(iter(fields(method.Config)), None)
    return "{}" if first is None else f'{{"{first.name}": {first.default!r}}}'
