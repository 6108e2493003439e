"""The compact form of a tensor: exact to the bit, as small as it says, and refused where it is damaged."""

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_bimp.deployment.compact import MAGIC, Stream, decode, encode, read_header

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def decoded(blob: bytes) -> Tensor:
    return decode(np.frombuffer(blob, np.uint8), "file: tensor 'w'")


def header_of(blob: bytes) -> dict:
    return json.loads(blob[8 : 8 + int.from_bytes(blob[4:8], "little")])


def sparse(share: float, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers of which `share` are positive zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight.masked_fill_(torch.rand(shape, generator=generator) < share, 0)


def with_header(blob: bytes, streams: bytes | None = None, **changes: object) -> bytes:
    """The compact tensor with another header, whose sums are right where it is not they that are changed."""
    header = header_of(blob)
    start = 8 + int.from_bytes(blob[4:8], "little")
    if streams is None:
        streams = blob[start : start + header["bytes"]]
    text = json.dumps(header | {"bytes": len(streams), "crc32": zlib.crc32(streams)} | changes).encode()
    new = MAGIC + len(text).to_bytes(4, "little") + text + streams
    return new + bytes(-len(new) % 8)


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    share=st.sampled_from([0.0, 0.3, 0.8, 0.9, 0.99, 1.0]),
    dtype=st.sampled_from(FLOATS),
    level=st.sampled_from([None, 1, 3]),
    special=st.lists(st.tuples(st.integers(0, 10**6), st.integers(-(2**63), 2**63 - 1)), max_size=20),
)
def test_any_bits_come_back(rows, columns, share, dtype, level, special) -> None:
    """NaNs with payloads, infinities, denormals and negative zeros among them."""
    weight = sparse(share, rows, columns, dtype=dtype)
    flat = bits(weight)
    for place, pattern in special:
        if flat.numel():
            width = 8 * weight.element_size()
            flat[place % flat.numel()] = (pattern + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
    blob = encode(flat.view(dtype).view(rows, columns), level, even_if_larger=True)
    back = decoded(blob)
    assert back.shape == (rows, columns) and back.dtype == dtype and back.is_contiguous()
    assert torch.equal(bits(back), flat) and len(blob) % 8 == 0


@pytest.mark.parametrize(
    ("places", "size"),
    [([0], 10_000), ([9_999], 10_000), ([254], 10_000), ([255], 10_000), ([256], 10_000), ([509, 510, 765], 10_000)],
)
def test_gaps_at_the_escape_byte(places, size) -> None:
    weight = torch.zeros(size // 100, 100)
    weight.view(-1)[places] = torch.arange(1.0, 1 + len(places))
    blob = encode(weight)
    assert header_of(blob)["values"]["encoding"] == "gaps"
    assert torch.equal(decoded(blob), weight)


def test_the_smaller_of_bitmask_and_gaps_is_stored() -> None:
    for share, encoding in ((0.5, "bitmask"), (0.85, "bitmask"), (0.89, "gaps"), (0.99, "gaps")):
        weight = sparse(share, 200, 200)
        header = header_of(encode(weight))
        count = int((weight != 0).sum())
        assert header["values"]["encoding"] == encoding
        assert header["bytes"] - 4 * count == header["values"]["bytes"] <= 200 * 200 / 8
    clustered = torch.zeros(256, 256)  # gaps would need two bytes for most values
    clustered[:, ::16] = 1
    assert header_of(encode(clustered))["values"]["encoding"] == "gaps"
    assert torch.equal(decoded(encode(clustered)), clustered)


def test_sizes_at_90_percent() -> None:
    weight = sparse(0.9, 768, 768)
    assert len(encode(weight)) <= 0.127 * weight.nbytes
    assert len(encode(weight, 3)) <= 0.11 * weight.nbytes
    signed = weight * 1
    signed[weight == 0] *= torch.where(torch.arange(int((weight == 0).sum())) % 2 == 0, 1.0, -1.0)
    assert len(encode(signed)) <= 0.16 * weight.nbytes  # a bit a weight for the signs of zeros
    assert torch.equal(bits(decoded(encode(signed))), bits(signed)) and bool(signed[weight == 0].signbit().any())


def test_what_would_not_be_smaller_stays_plain() -> None:
    assert encode(torch.randn(64, 64), 3) is None
    assert encode(torch.zeros(3, 4)) is None
    assert encode(torch.empty(0, 4)) is None


def test_not_contiguous_tensors() -> None:
    weight = sparse(0.9, 60, 80).t()
    assert torch.equal(decoded(encode(weight)), weight)


def test_shapes_beyond_32_bits_are_numbers_as_others() -> None:
    """All-zero, so that what is stored is small: 2**33 elements are counted, not made."""
    escapes, rest = divmod(2**33, 255)
    stream = b"\xff" * escapes + bytes([rest])
    header = {"shape": [2**17, 2**16], "values": {"encoding": "gaps", "count": 0, "bytes": len(stream)}}
    read, _ = read_header(
        np.frombuffer(with_header(encode(torch.zeros(99, 99)), stream, **header)[:4096], np.uint8),
        len(with_header(encode(torch.zeros(99, 99)), stream, **header)),
        "w",
    )
    assert read.numel == 2**33 and read.values == Stream("gaps", 0, len(stream))


BASE = encode(sparse(0.9, 100, 100))
ZSTD = encode(sparse(0.9, 100, 100), 3)
MASK = encode(sparse(0.5, 100, 100))
ZEROS = encode(torch.zeros(100, 100))


def gaps(**changes: object) -> dict:
    return {"values": header_of(BASE)["values"] | changes}


HOSTILE = {
    "nothing": b"",
    "no magic": b"XXXX" + BASE[4:],
    "header beyond the end": MAGIC + (2**31).to_bytes(4, "little") + BASE[8:],
    "no JSON": MAGIC + (8).to_bytes(4, "little") + b"\xff" * 8,
    "deep JSON": MAGIC + (50_000).to_bytes(4, "little") + b"[" * 50_000,
    "a list": MAGIC + (2).to_bytes(4, "little") + b"[]",
    "cut off": BASE[: len(BASE) // 2],
    "longer": BASE + bytes(64),
    "flipped": BASE[:-40] + bytes([BASE[-40] ^ 1]) + BASE[-39:],
    "huge shape": with_header(BASE, shape=[2**40, 2**20]),
    "larger shape": with_header(BASE, shape=[100, 101]),
    "smaller shape": with_header(BASE, shape=[100, 99]),
    "negative shape": with_header(BASE, shape=[-100, -100]),
    "shape of floats": with_header(BASE, shape=[100.0, 100.0]),
    "shape of texts": with_header(BASE, shape="100"),
    "count over bytes": with_header(BASE, **gaps(count=10_000)),
    "count under bytes": with_header(BASE, **gaps(count=header_of(BASE)["values"]["count"] - 1)),
    "huge count": with_header(BASE, **gaps(count=2**62)),
    "true for a count": with_header(BASE, **gaps(count=True)),
    "huge stream": with_header(BASE, **gaps(bytes=2**62)),
    "other encoding": with_header(BASE, **gaps(encoding="runs")),
    "other type": with_header(BASE, dtype="complex64"),
    "code for a type": with_header(BASE, dtype="hub.load"),
    "whole numbers of two dimensions": with_header(ZEROS, dtype="uint8"),
    "floats of one dimension": with_header(ZEROS, shape=[10_000]),
    "other compression": with_header(BASE, compression="lzma"),
    "raw as zstd": with_header(BASE, compression="zstd"),
    "zstd as raw": with_header(ZSTD, compression=None),
    "zstd cut off": with_header(ZSTD, ZSTD[8 + len(json.dumps(header_of(ZSTD), separators=(",", ":"))) :][:900]),
    "missing field": with_header(BASE, values=None),
    "unknown field": with_header(BASE, more=1),
    "version 0": with_header(BASE, version=0),
    "gaps past the end": with_header(
        BASE, b"\xfe" * header_of(BASE)["values"]["bytes"] + bytes(4 * header_of(BASE)["values"]["count"])
    ),
    "gaps end in an escape": with_header(
        BASE, b"\xff" * header_of(BASE)["values"]["bytes"] + bytes(4 * header_of(BASE)["values"]["count"])
    ),
    "mask of other counts": with_header(MASK, bytes(header_of(MASK)["bytes"])),
}


@pytest.mark.parametrize("blob", HOSTILE.values(), ids=HOSTILE.keys())
def test_damage_is_one_error_and_no_memory(blob: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^file: tensor 'w' is damaged: .*(Fetch|compress)"):
            decoded(blob)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_by_their_sizes() -> None:
    """A frame of zstd that says to hold a gigabyte, within a header that says so too."""
    import zstandard

    frame = zstandard.ZstdCompressor().compress(bytes(10**9 // 10))
    stream = {"encoding": "bitmask", "count": 0, "bytes": 10**9 // 10}
    bomb = with_header(ZSTD, frame, shape=[8, 10**9 // 10], values=stream)
    with pytest.raises(ValueError, match="100,000,000 bytes cannot be in the"):
        decoded(bomb)
    noise = np.random.default_rng(0).bytes(10**6)
    small = with_header(ZSTD, zstandard.ZstdCompressor().compress(noise))
    with pytest.raises(ValueError, match="zstd holds 1,000,000 bytes in place of"):
        decoded(small)


def test_later_versions_ask_for_an_upgrade() -> None:
    with pytest.raises(ValueError, match="version 2 of the compact format.*Upgrade hf_bimp"):
        decoded(with_header(BASE, version=2, more="of it"))


@given(st.integers(0, 8 * len(ZSTD) - 1))
def test_any_flipped_bit_is_seen_or_changes_nothing(place: int) -> None:
    flipped = bytearray(ZSTD)
    flipped[place // 8] ^= 1 << place % 8
    try:
        back = decoded(bytes(flipped))
    except ValueError as error:
        assert "is damaged" in str(error) or "Upgrade" in str(error)
    else:  # in the padding, or between equal readings of the header
        assert torch.equal(bits(back.contiguous()), bits(sparse(0.9, 100, 100).to(back.dtype)))


def test_the_reader_in_the_docs_reads_it() -> None:
    text = (Path(__file__).parents[1] / "docs" / "compressed-format.md").read_text()
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    for weight in (sparse(0.9, 40, 60), sparse(0.5, 40, 60), -sparse(0.9, 40, 60), -sparse(0.99, 90, 60).double()):
        for level in (None, 3):
            found, dtype, shape = names["dense"](np.frombuffer(encode(weight, level), np.uint8))
            assert dtype == str(weight.dtype).removeprefix("torch.") and shape == list(weight.shape)
            assert found.tobytes() == weight.numpy().tobytes()
