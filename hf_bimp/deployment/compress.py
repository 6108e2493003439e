"""`hf_bimp.compress`: a checkpoint folder whose zeros take no room."""

import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..pruning.structured.shrink import save_shrunk
from ..storage.files import moved_at_once
from ..storage.model_formats import build, out_of_wrappers, savable_state, write_config
from .checks import check_compress
from .compact import LEVEL, level_here
from .compressed_files import StoredSize, weight_files, write_compressed
from .compressed_folder import copy_rest

EMBEDDINGS = re.compile(r"(^|\.)(\w*embed\w*|shared|wte|wpe|relative_attention_bias)(\.weight)?$")  # names of tensors

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CompressionReport:
    """What `compress` wrote to `directory`; sizes in bytes of weights.

    `dense_bytes`: as they were given. `compressed_bytes`: of the file. `embedding_bytes`: of dense embeddings in it.
    `tensors` of which `compact_tensors` are stored without their zeros. `compression`: "zstd", or None.
    """

    directory: str
    dense_bytes: int
    compressed_bytes: int
    embedding_bytes: int
    tensors: int
    compact_tensors: int
    compression: str | None

    @property
    def ratio(self) -> float:
        """The file's share of the dense size."""
        return self.compressed_bytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def embedding_share(self) -> float:
        """The share of the dense size that dense embeddings keep: the ratio cannot be smaller."""
        return self.embedding_bytes / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def cap(self) -> float:
        """How many times smaller the file can be at most, because of the dense embeddings."""
        return 1 / self.embedding_share if self.embedding_share else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all of it but the directory."""
        shares = {"ratio": self.ratio, "embedding_share": self.embedding_share}
        return {name: value for name, value in asdict(self).items() if name != "directory"} | shares

    def __str__(self) -> str:
        text = (
            f"{self.directory}: {self.compressed_bytes / 1e6:.2f} MB in place of {self.dense_bytes / 1e6:.2f} MB, "
            f"{1 / self.ratio if self.ratio else 1:.2f} times smaller (ratio {self.ratio:.3f}, "
            f"{self.compression or 'no zstd'}); {self.compact_tensors} of {self.tensors} tensors are compact."
        )
        if not self.embedding_bytes:
            return f"{text} No dense embeddings cap it."
        return (
            f"{text} Dense embeddings keep {self.embedding_share:.1%} of the dense size, which caps it at "
            f"{self.cap:.2f} times."
        )


def compress(
    model_or_directory: nn.Module | str | Path,
    output_dir: str | Path,
    dtype: torch.dtype | str | None = None,
    level: int | None = LEVEL,
) -> CompressionReport:
    """Writes a sparse model to the folder `output_dir`, its weights in one safetensors file without their zeros.

    `model_or_directory`: a model in evaluation mode, or a folder with its safetensors, sharded or not: a checkpoint,
        what a run has left, what `save_pretrained` or `save_shrunk` has written. All else in the folder (tokenizer,
        configs, card) is copied; states of optimizers and folders named checkpoint-* are not.
    `output_dir`: a new folder, or one without weights, or one that `compress` has written.
    `dtype`: float32, float16, bfloat16 or float64, of all floating-point weights; None (default) leaves them exact to
        the bit.
    `level`: of zstd, 1 to 22, where the package zstandard is installed (3 by default); None for no zstd.

    A tensor of at least two dimensions is stored as a bitmask or as gaps between values, whichever is smaller, and as
    it is where neither is smaller. One tensor is in memory at a time; a model is first saved beside `output_dir`, and
    needs that room on the disk. The folder is loaded by Transformers' `from_pretrained` and `pipeline` after `import
    hf_bimp`, and by `hf_bimp.load_compressed`.

    Returns sizes, and the cap that dense embeddings set; `print` tells them. Raises `ValueError`, before anything is
    written, for models in training, with adapters, quantized or compressed, and for arguments that do not fit.

        report = hf_bimp.compress("out", "out-compressed")
        print(report)  # out-compressed: 5.52 MB in place of 42.50 MB, 7.70 times smaller ...
        model = AutoModelForSeq2SeqLM.from_pretrained("out-compressed")
    """
    output_dir = Path(output_dir).absolute()
    check_compress(model_or_directory, output_dir, dtype, level)
    chosen = None if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    level = _level(level)
    with moved_at_once(output_dir, last=[SAFE_WEIGHTS_NAME]) as folder:
        if isinstance(model_or_directory, nn.Module):
            with tempfile.TemporaryDirectory(prefix=".dense-", dir=folder) as dense:
                _save(out_of_wrappers(model_or_directory), Path(dense))
                sizes = _compress_folder(Path(dense), folder, output_dir, chosen, level)
        else:
            sizes = _compress_folder(Path(model_or_directory).absolute(), folder, output_dir, chosen, level)
        written = (folder / SAFE_WEIGHTS_NAME).stat().st_size
    report = _report(output_dir, sizes, written, level)
    logger.info(str(report))
    return report


def _level(level: int | None) -> int | None:
    here = level_here(level)
    if here != level:
        logger.warning("zstandard is not installed: the file is written without zstd. pip install zstandard")
    return here


def _compress_folder(
    source: Path, folder: Path, output_dir: Path, dtype: torch.dtype | None, level: int | None
) -> dict[str, StoredSize]:
    copy_rest(source, folder, output_dir, dtype)
    return write_compressed(weight_files(source), folder / SAFE_WEIGHTS_NAME, dtype, level)


def _save(model: nn.Module, directory: Path) -> None:
    """Writes the plain checkpoint of a model, in its library's format."""
    origin = write_config(model, directory)
    if origin is not None and _was_shrunk(model, origin, directory):
        save_shrunk(model, directory)
    elif isinstance(model, PreTrainedModel):
        model.save_pretrained(directory)
    else:
        save_file(savable_state(model), directory / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def _was_shrunk(model: nn.Module, origin: dict[str, str], directory: Path) -> bool:
    """Whether its weights have other shapes than its config says."""
    try:
        with torch.device("meta"):
            built = build(origin, directory)
    except (RuntimeError, NotImplementedError):  # some models read numbers off tensors while they are built
        built = build(origin, directory)
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    return any(shapes.get(name, tensor.shape) != tensor.shape for name, tensor in model.state_dict().items())


def _report(output_dir: Path, sizes: dict[str, StoredSize], written: int, level: int | None) -> CompressionReport:
    embeddings = sum(s.stored for name, s in sizes.items() if EMBEDDINGS.search(name) and not s.is_compact)
    return CompressionReport(
        str(output_dir),
        sum(size.dense for size in sizes.values()),
        written,
        embeddings,
        len(sizes),
        sum(size.is_compact for size in sizes.values()),
        None if level is None else "zstd",
    )
