"""Writing files whole or not at all."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Set
from pathlib import Path
from typing import Any


def write_json(path: Path, content: dict) -> None:
    """Writes JSON whole or not at all: a full disk or a kill leaves what was there before.

    Tensors and numbers of NumPy become plain; NaN and infinities, which JSON has not, become null; what JSON cannot
    hold becomes its text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(as_json(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def moved_at_once(directory: Path, last: Collection[str], gone: Collection[str] = ()) -> Iterator[Path]:
    """A folder on the same disk, whose files go to `directory` if nothing fails, in place of older ones.

    Files named in `last` say that the others are whole: they are removed first, with those in `gone`, and come last.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    folder = Path(tempfile.mkdtemp(prefix=".part-", dir=existing))
    try:
        yield folder
        directory.mkdir(parents=True, exist_ok=True)
        for name in (*last, *gone):
            (directory / name).unlink(missing_ok=True)
        files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda file: str(file) in last):
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).replace(directory / file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def as_json(value: Any, has_nan: bool = False) -> Any:
    """`value` of what JSON has: mappings, lists, texts, numbers, truth values and None.

    NaN and infinities become None unless it `has_nan`, as what Trainer writes has.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if has_nan or math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_json(item, has_nan) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item, has_nan) for item in value]
    if isinstance(value, Set):
        return [as_json(item, has_nan) for item in sorted(value, key=str)]
    return as_json(value.tolist(), has_nan) if hasattr(value, "tolist") else str(value)
