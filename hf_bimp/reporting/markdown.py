"""Tables and text from outside, as plain Markdown."""

import re
from typing import Any

from .results import is_number


def table(header: list[str], rows: list[list]) -> str:
    lines = [map(escaped, header), ["---"] * len(header), *(map(escaped, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: Any) -> str:
    """What comes from outside (names of metrics, layers, folders), as plain text on one line of Markdown."""
    plain = " ".join(str(text).split())
    return re.sub(r"([\\`\[\]<>|])", r"\\\1", plain)


def shown(value: Any) -> str:
    return f"{float(value):.4g}" if is_number(value) else str(value)
