"""Files of compact tensors: written from a checkpoint tensor by tensor, recognised, and read."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .compact import VERSION, can_be_compact, decode, encode, is_compact, longest_start, read_header, zstandard

KEY = "hf_bimp_compact"  # of the metadata of a safetensors file; its value is the format's version
STORED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class StoredSize:
    """What became of a tensor: bytes as it was and as it is stored, and whether it is compact."""

    dense: int
    stored: int
    is_compact: bool


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights of a checkpoint folder.

    Raises `ValueError` where there are none, or shards are missing.
    """
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{directory} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Give a folder that "
            "save_pretrained or a run of hf_bimp has written, or load the model and give it instead."
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [directory / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {error}). Save anew.") from error
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(
            f"{directory} is not whole: {index.name} names {', '.join(missing[:3])}. Save the model anew."
        )
    return files


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[Any]:
    """The safetensors file, read as it is asked for and not mapped. Raises `ValueError` where it is none."""
    try:
        with safe_open(path, "pt", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}. Fetch or save it again.") from error


def compact_version(path: Path | str) -> str | None:
    """The version of the compact format in which a safetensors file is written; None for a plain one."""
    with opened(path) as file:
        return (file.metadata() or {}).get(KEY)


def write_compressed(
    sources: list[Path], path: Path, dtype: torch.dtype | None, level: int | None
) -> dict[str, StoredSize]:
    """Writes all tensors of the safetensors files `sources` to `path`, floats as `dtype`; what became of each.

    One tensor is in memory at a time. Raises `ValueError` where a value is beyond the range of `dtype`.
    """
    sizes: dict[str, StoredSize] = {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(opened(source)) for source in sources]
        found = {name: (file, file.get_slice(name)) for file in files for name in file.keys()}
        # Wide types first, so that all are aligned: what is compact has its length rounded up.
        names = sorted(found, key=lambda name: (-_itemsize(found[name][1].get_dtype(), dtype), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", KEY: str(VERSION)}}
        longest = {
            n: {"dtype": "F8_E4M3", "shape": found[n][1].get_shape(), "data_offsets": [10**18] * 2} for n in names
        }
        room = -(-len(json.dumps(header | longest)) // 8) * 8
        with path.open("wb") as out:
            out.seek(8 + room)
            at = 0
            for name in logging.tqdm(names, desc="Compressing", leave=False):
                file, slice_ = found[name]
                kind, shape = slice_.get_dtype(), slice_.get_shape()
                tensor = file.get_tensor(name)
                dense = tensor.nbytes
                if dtype is not None and kind in STORED.values():
                    tensor, kind = _cast(tensor, dtype, name), STORED[dtype]
                compact = None
                if can_be_compact(kind, shape) or is_compact(kind, shape):
                    compact = encode(tensor, level, is_compact(kind, shape))
                if compact is not None:
                    kind, shape, content = "U8", [len(compact)], compact
                else:
                    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                length = out.write(content)
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + length]}
                sizes[name] = StoredSize(dense, length, compact is not None)
                at += length
            out.seek(0)
            out.write(room.to_bytes(8, "little"))
            out.write(json.dumps(header).encode().ljust(room))
    check_compressed(path)
    return sizes


def _itemsize(kind: str, dtype: torch.dtype | None) -> int:
    """Bytes of an element of safetensors' type `kind`, once it is cast: by the digits of its name."""
    if dtype is not None and kind in STORED.values():
        return dtype.itemsize
    bits = int("".join(c for c in kind.split("_")[0] if c.isdigit()) or 8)  # BOOL has none
    return bits // 8


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if dtype.itemsize < tensor.dtype.itemsize and not torch.equal(cast.isinf(), tensor.isinf()):
        most = torch.finfo(dtype).max
        raise ValueError(f"{name} has values beyond {most:,.0f}, the largest of {dtype}. Use dtype='bfloat16'.")
    return cast


def check_compressed(path: Path | str) -> None:
    """Raises `ValueError` where a compact tensor of a file is not whole, `ImportError` where it needs zstandard.

    Only headers are read.
    """
    with opened(path) as file:
        for name in file.keys():
            slice_ = file.get_slice(name)
            if is_compact(slice_.get_dtype(), slice_.get_shape()):
                size = slice_.get_shape()[0]
                header, _ = read_header(slice_[: longest_start(size)].numpy(), size, where(path, name))
                if header.compression is not None:
                    zstandard(where(path, name))


def read_compressed(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that `write_compressed` wrote, as they were. Raises `ValueError` where it is damaged."""
    check_compressed(path)
    with opened(path) as file:
        return {name: decoded(file.get_tensor(name), where(path, name)) for name in file.keys()}


def decoded(tensor: Tensor, where: str) -> Tensor:
    """A tensor of a compressed file, decoded if it is a compact one."""
    is_plain = tensor.dtype != torch.uint8 or tensor.ndim != 1
    return tensor if is_plain else decode(np.asarray(tensor), where)


def where(path: Path | str, name: str) -> str:
    return f"{path}: tensor {name!r}"
