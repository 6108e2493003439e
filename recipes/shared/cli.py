"""The command line of every recipe: an optional YAML or JSON file, then arguments that override it."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

CONFIGS = Path(__file__).parents[1] / "configs"


def parse(dataclass_types: tuple[type, ...], default_config: str | None = None) -> tuple[Any, ...]:
    """Instances of the dataclasses, from `[config.yaml] [--any_argument ...]`.

    Without a config file `configs/<default_config>` holds. Raises `SystemExit` where a key of the file is no argument.
    """
    arguments = sys.argv[1:]
    path = CONFIGS / default_config if default_config else None
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        path = Path(arguments.pop(0))
    parser = HfArgumentParser(dataclass_types)
    if path is not None:
        if not path.is_file():
            sys.exit(f"{path}: no such config file; the project's own are in {CONFIGS}")
        try:
            config = read_config(path)
        except ValueError as error:
            parser.error(str(error))
        known = {action.dest for action in parser._actions}
        if unknown := config.keys() - known:
            parser.error(f"{path}: no such argument: {', '.join(sorted(unknown))}")
        for action in parser._actions:  # what the file gives is no longer required on the command line
            action.required = action.required and action.dest not in config
        parser.set_defaults(**config)
    parsed = parser.parse_args_into_dataclasses(arguments)
    try:
        check_choices(parsed)  # argparse does not look at what a file gives
    except ValueError as error:
        parser.error(f"{path}: {error}" if path else str(error))
    return parsed


def check_choices(parsed: tuple[Any, ...]) -> None:
    """Raises `ValueError` for an argument that is none of its choices."""
    for arguments in parsed:
        for field in fields(arguments):
            choices, value = field.metadata.get("choices"), getattr(arguments, field.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"{field.name}={value!r} is none of {', '.join(map(str, choices))}.")


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as the number that it is in YAML 1.2; PyYAML takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_config(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of names and values. Raises `ValueError` where it is something else."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values, one `name: value` a line, not {str(content):.40}.")
    if odd := [name for name in content if not isinstance(name, str)]:
        raise ValueError(f"{path}: {odd[0]!r} is no name. Quote it, if it is meant as one.")
    return content


def parse_config(dataclass_types: tuple[type, ...], config: dict[str, Any]) -> tuple[Any, ...]:
    """Instances of the dataclasses from a dict, for recipes that call other recipes."""
    parsed = HfArgumentParser(dataclass_types).parse_dict(config)
    check_choices(parsed)
    return parsed
