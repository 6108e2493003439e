"""Writing files whole or not at all."""

import json
from pathlib import Path


def write_json(path: Path, content: dict) -> None:
    """Writes JSON whole or not at all: a full disk or a kill leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
