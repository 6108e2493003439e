"""The methods by name, and their settings from a mapping."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from .base import Method
from .settings import checked

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
    hints = get_type_hints(method.Config, include_extras=True)
    values = {
        name: checked(f"method_config of method={method.name!r}: {name}", v, hints[name]) for name, v in given.items()
    }
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


def _example(method: type[Method]) -> str:
    first = next(iter(fields(method.Config)), None)
    return "{}" if first is None else f'{{"{first.name}": {first.default!r}}}'
