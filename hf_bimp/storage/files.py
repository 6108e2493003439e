"""Writing files whole or not at all."""

import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict) -> None:
    """Writes JSON whole or not at all: a full disk or a kill leaves what was there before.

    Tensors and numbers of NumPy become plain; NaN and infinities, which JSON has not, become null; what JSON cannot
    hold becomes its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(as_json(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def as_json(value: Any) -> Any:
    """`value` of what JSON has: mappings, lists, texts, finite numbers, truth values and None."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, Set):
        return [as_json(item) for item in sorted(value, key=str)]
    return as_json(value.tolist()) if hasattr(value, "tolist") else str(value)
