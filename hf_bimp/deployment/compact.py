"""The compact form of one sparse tensor: where its values are, the values, and a header; exact to the bit.

docs/compressed-format.md describes the bytes. All checks come before the tensor is allocated.
"""

import json
import math
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

VERSION = 1
MAGIC = b"BIMP"
LEVEL = 3  # of zstd, by default
DTYPES = ("float64", "float32", "float16", "bfloat16", "uint8")
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # of a type of so many bytes
_ALIGNMENT = 8  # bytes; whatever is stored behind a compact tensor is aligned
_LONGEST_HEADER = 1 << 12  # bytes
_ESCAPE = 255  # a gap byte: so many zeros, and no value behind them
_MOST_COMPRESSION = 16  # by zstd: streams that shrink more are stored as they are, so that a small file stays small


@dataclass(frozen=True)
class Stream:
    """`count` positions in `bytes` bytes: a "bitmask", or "gaps" between them, whichever is smaller."""

    encoding: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What a compact tensor says of itself. `bytes` and `crc32` are those of the streams as they are stored."""

    version: int
    dtype: str
    shape: tuple[int, ...]
    values: Stream
    negative_zeros: Stream | None  # zeros with a sign, which have no value stored
    compression: str | None
    bytes: int
    crc32: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def raw_bytes(self) -> int:
        """Of the streams before zstd."""
        signs = self.negative_zeros.bytes if self.negative_zeros else 0
        return self.values.bytes + signs + self.values.count * self.itemsize


def is_compact(dtype: str, shape: Any) -> bool:
    """Whether a tensor of a compressed file (safetensors' names of types) is a compact one.

    A plain one of that kind is never written: `encode` takes it too.
    """
    return dtype == "U8" and len(shape) == 1


def can_be_compact(dtype: str, shape: Any) -> bool:
    """Whether a tensor, of safetensors' types, may be made compact: floats of at least two dimensions.

    One dimension is what a compact tensor has itself, so that no reader can take one for the weight.
    """
    return dtype in ("F64", "F32", "F16", "BF16") and len(shape) > 1


def level_here(level: int | None) -> int | None:
    """`level` of zstd, None where its package is missing."""
    try:
        zstandard()
    except ImportError:
        return None
    return level


def encode(tensor: Tensor, level: int | None = None, even_if_larger: bool = False) -> bytes | None:
    """The compact form of a `tensor` on the CPU; None where it would not be smaller than the plain one.

    `level`: of zstd, whose package is then needed; None for none.
    """
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).numpy()
    is_value = np.not_equal(bits, 0)
    is_negative_zero = np.equal(bits, np.iinfo(bits.dtype).min)
    is_value &= ~is_negative_zero
    count, plain = int(np.count_nonzero(is_value)), bits.nbytes
    if not even_if_larger and count * bits.itemsize + min(count, bits.size // 8) >= plain:
        return None
    values, positions = _positions(is_value)
    signs, signed = _positions(is_negative_zero) if is_negative_zero.any() else (None, b"")
    selected = bits[is_value]
    stored = b"".join((positions, signed, selected.tobytes()))
    compression = None
    if level is not None:
        planes = np.ascontiguousarray(selected.view(np.uint8).reshape(-1, bits.itemsize).T)
        smaller = zstandard().ZstdCompressor(level=level).compress(b"".join((positions, signed, planes.tobytes())))
        if len(smaller) < len(stored) <= _MOST_COMPRESSION * len(smaller):
            compression, stored = "zstd", smaller
    dtype = str(tensor.dtype).removeprefix("torch.")
    header = Header(VERSION, dtype, tuple(tensor.shape), values, signs, compression, len(stored), zlib.crc32(stored))
    text = json.dumps(asdict(header), separators=(",", ":")).encode()
    blob = b"".join((MAGIC, len(text).to_bytes(4, "little"), text, stored))
    blob += bytes(-len(blob) % _ALIGNMENT)
    return blob if even_if_larger or len(blob) < plain else None


def _positions(mask: np.ndarray) -> tuple[Stream, bytes]:
    """The positions at which the boolean `mask` is true.

    Gaps: a byte a position for the number of others before it, and one for those behind the last; 255 of them are an
    escape byte, so that the bytes and positions add up to the size of the mask.
    """
    count, size = int(np.count_nonzero(mask)), -(-mask.size // 8)
    if count < size:
        gaps = np.diff(np.flatnonzero(mask), prepend=-1, append=mask.size) - 1
        escapes = gaps // _ESCAPE
        if (length := len(gaps) + int(escapes.sum())) < size:
            stream = np.full(length, _ESCAPE, np.uint8)
            stream[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
            return Stream("gaps", count, length), stream.tobytes()
    return Stream("bitmask", count, size), np.packbits(mask, bitorder="little").tobytes()


def decode(blob: np.ndarray, where: str) -> Tensor:
    """The tensor whose compact form the bytes `blob` are. `where` names file and tensor in errors.

    Raises `ValueError` where the bytes are not what `encode` returns, before a tensor is allocated, and `ImportError`
    where they need zstandard.
    """
    header, positions, signed, values = read_streams(blob, where)
    integer = np.dtype(f"int{8 * header.itemsize}")
    bits = np.zeros(header.numel, integer)
    bits[positions] = values.view(integer)
    if signed is not None:
        bits[signed] = np.iinfo(integer).min
    return torch.from_numpy(bits).view(getattr(torch, header.dtype)).view(header.shape)


def read_streams(blob: np.ndarray, where: str) -> tuple[Header, np.ndarray, np.ndarray | None, np.ndarray]:
    """What `decode` makes a tensor of, checked: the positions of values and of negative zeros, the bytes of values.

    Raises as `decode` does.
    """
    header, start = read_header(blob, len(blob), where)
    stored = blob[start : start + header.bytes]
    if zlib.crc32(stored.data) != header.crc32:
        raise damaged(where, "its checksum is not the one that was written")
    raw = stored if header.compression is None else _decompressed(stored, header.raw_bytes, where)
    signs = header.negative_zeros
    at = header.values.bytes + (signs.bytes if signs else 0)
    positions = _read_positions(raw[: header.values.bytes], header.values, header.numel, where)
    signed = None if signs is None else _read_positions(raw[header.values.bytes : at], signs, header.numel, where)
    values = raw[at:]
    if header.compression is None:
        return header, positions, signed, values.copy()  # aligned
    planes, values = values.reshape(header.itemsize, -1), np.empty((header.values.count, header.itemsize), np.uint8)
    for i, plane in enumerate(planes):
        values[:, i] = plane
    return header, positions, signed, values.reshape(-1)


def _decompressed(stored: np.ndarray, size: int, where: str) -> np.ndarray:
    package = zstandard(where)
    try:
        told = package.get_frame_parameters(stored).content_size
        if told == size:
            return np.frombuffer(package.ZstdDecompressor().decompress(stored, allow_extra_data=False), np.uint8)
    except package.ZstdError as error:
        raise damaged(where, f"zstd cannot read it: {error}") from error
    raise damaged(where, f"zstd holds {told:,} bytes in place of {size:,}")


def _read_positions(stream: np.ndarray, told: Stream, numel: int, where: str) -> np.ndarray:
    """The positions of a stream, as numbers or as a mask."""
    if told.encoding == "bitmask":
        bits = np.unpackbits(stream, bitorder="little")
        if np.count_nonzero(bits) != told.count or bits[numel:].any():
            raise damaged(where, f"its bitmask does not mark {told.count:,} of {numel:,} elements")
        return bits[:numel].view(bool)
    ends = stream != _ESCAPE
    if (
        np.count_nonzero(ends) != told.count + 1
        or not ends[-1]
        or int(stream.sum(dtype=np.int64)) + told.count != numel
    ):
        raise damaged(where, f"its gaps do not lead through {numel:,} elements with {told.count:,} values")
    steps = stream + ends  # from one position to the next, at most 255
    steps[0] -= 1
    positions = np.cumsum(steps, dtype=np.int64)
    return (positions if told.count + 1 == told.bytes else positions[ends])[:-1]


def read_header(start: np.ndarray, size: int, where: str) -> tuple[Header, int]:
    """The header at the `start` of a compact tensor of `size` bytes, and where its streams begin.

    Raises `ValueError` where it, or what it says of sizes, cannot be.
    """
    length = int.from_bytes(start[4:8].tobytes(), "little")
    if start[:4].tobytes() != MAGIC or not length <= min(_LONGEST_HEADER, size - 8):
        raise damaged(where, "it does not begin as a compact tensor does")
    try:
        content = json.loads(start[8 : 8 + length].tobytes())
        if isinstance(content, dict) and _is_number(content.get("version")) and content["version"] > VERSION:
            raise NewerVersionError(
                f"{where} has version {content['version']} of the compact format, and this hf_bimp reads up to "
                f"{VERSION}. Upgrade hf_bimp."
            )
        values, signs = Stream(**content.pop("values")), content.pop("negative_zeros")
        shape = tuple(content.pop("shape"))
        header = Header(shape=shape, values=values, negative_zeros=signs and Stream(**signs), **content)
        problem = _problem(header, size - 8 - length)
    except NewerVersionError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(where, f"its header cannot be read ({type(error).__name__})") from error
    if problem:
        raise damaged(where, problem)
    return header, 8 + length


def longest_start(size: int) -> int:
    """How many bytes of a compact tensor of `size` bytes hold its header for sure."""
    return min(size, 8 + _LONGEST_HEADER)


def _problem(header: Header, room: int) -> str | None:
    """What cannot be of a header with `room` bytes behind it."""
    streams = [header.values, *([header.negative_zeros] if header.negative_zeros else [])]
    numbers = [header.version, *header.shape, header.bytes, header.crc32]
    numbers += [number for stream in streams for number in (stream.count, stream.bytes)]
    if not all(map(_is_number, numbers)) or header.version < 1:
        return "its header has something else than numbers where sizes must be"
    if header.dtype not in DTYPES or header.compression not in (None, "zstd"):
        return f"its type is {str(header.dtype):.20}, compressed by {str(header.compression):.20}"
    if (header.dtype == "uint8") != (len(header.shape) == 1):
        return f"its type is {header.dtype}, and its shape {list(header.shape)}"
    if not 0 <= room - header.bytes < _ALIGNMENT:
        return f"{room:,} bytes are stored in place of {header.bytes:,}: it was cut off, or its header is wrong"
    most = header.bytes * (1 if header.compression is None else _MOST_COMPRESSION)
    if header.raw_bytes > most or (header.compression is None and header.raw_bytes != header.bytes):
        return f"{header.raw_bytes:,} bytes cannot be in the {header.bytes:,} that are stored"
    numel = header.numel
    for stream in streams:
        if stream.encoding not in ("bitmask", "gaps"):
            return f"its positions are stored as {str(stream.encoding):.20}"
        fits = stream.bytes == -(-numel // 8)
        if stream.encoding == "gaps":
            fits = stream.count < stream.bytes and numel <= _ESCAPE * stream.bytes
        if stream.count > numel or not fits:
            return f"{stream.bytes:,} bytes of positions do not fit the shape {list(header.shape)}".replace(" ,", ",")
    return None


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


class NewerVersionError(ValueError):
    """A file of a later version of the format."""


def damaged(where: str, problem: str) -> ValueError:
    return ValueError(f"{where} is damaged: {problem}. Fetch the file again, or compress the model anew.")


def zstandard(where: str | None = None) -> Any:
    """The package. Raises `ImportError` where it is missing; `where` names the tensor that needs it."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            f"{where or 'level'} needs the package zstandard, as it is written with zstd. Install it with: "
            "pip install zstandard, or pip install 'hf_bimp[deploy]'"
        ) from error
    return zstandard
