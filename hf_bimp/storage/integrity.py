"""Whether a checkpoint is as it was written: a list of its files with sizes and checksums, one from each process."""

import json
import zlib
from pathlib import Path

from .files import write_json

NAME = "bimp_files.json"
_BLOCK = 1 << 22  # bytes read at once


def list_files(directory: Path, process: int, num_processes: int) -> None:
    """Writes what this process has left in `directory`: the first one everything but the random states of others."""
    own = f"rng_state_{process}.pth"
    paths = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("bimp_files")]
    if process:
        paths = [path for path in paths if path.name == own]
    elif num_processes > 1:
        paths = [path for path in paths if not path.match("rng_state_*.pth") or path.name == own]
    files = {path.relative_to(directory).as_posix(): [path.stat().st_size, checksum(path)] for path in sorted(paths)}
    write_json(directory / _list_name(process), {"files": files})


def damage(directory: Path, num_processes: int) -> str | None:
    """What of the files is missing or not as it was written; None where all is whole."""
    for process in range(num_processes):
        try:
            files = json.loads((directory / _list_name(process)).read_text(encoding="utf-8"))["files"]
            for name, (size, expected) in files.items():
                path = directory / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != size:
                    return f"{name} has {path.stat().st_size} bytes in place of {size}"
                if checksum(path) != expected:
                    return f"{name} is damaged: its checksum is not the one that was written"
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return f"{_list_name(process)} cannot be read ({type(error).__name__}: {error})"
    return None


def checksum(path: Path) -> int:
    """CRC-32: against damage, not against intent."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _list_name(process: int) -> str:
    return f"bimp_files_{process}.json" if process else NAME
