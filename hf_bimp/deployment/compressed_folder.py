"""What is in a compressed checkpoint's folder beside the weights: copied and adapted."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..pruning.structured.shrink import SHRUNK_NAME
from ..reporting.model_card import DENSE_SIZE, PLAIN
from ..storage.files import write_json
from ..storage.run_state import MASKS_NAME, METHOD_NAME, STATISTICS_NAME
from .compact import VERSION
from .compressed_files import weight_files

# Other copies of the weights, what only resuming a run needs, and checksums of what is left behind.
LEFT = (
    "pytorch_model*.bin",
    "*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "rng_state*.pth",
    "bimp_files*.json",
    f"{PREFIX_CHECKPOINT_DIR}-*",
    ".*",
    *(OPTIMIZER_NAME, "optimizer.bin", SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME),
    *(MASKS_NAME, METHOD_NAME, STATISTICS_NAME, SAFE_WEIGHTS_INDEX_NAME),
)
CARD = "README.md"
# What the card says of a plain checkpoint, and what of a compressed one.
SAID = {
    PLAIN: "Its zeros are not stored: `pip install 'hf_bimp[deploy]'`, and `import hf_bimp` before (what is no model "
    "of Transformers is loaded by `hf_bimp.load_compressed(folder)`):",
    DENSE_SIZE: "It is stored without its zeros, by `hf_bimp.compress`.",
}


def quantization_config() -> dict[str, Any]:
    """The entry of config.json that names the format."""
    return {"quant_method": "hf_bimp", "format": "compact", "version": VERSION}


def copy_rest(source: Path, folder: Path, output_dir: Path, dtype: torch.dtype | None) -> None:
    """Copies everything of `source` but its weights and states of optimizers to `folder`.

    `output_dir` may lie in `source`. Configs tell the format, and the type where it was changed.
    """
    skipped = {path.resolve() for path in (*weight_files(source), output_dir, folder)}

    def left(directory: str, names: list[str]) -> set[str]:
        found = shutil.ignore_patterns(*LEFT)(directory, names)
        return found | {name for name in names if (Path(directory) / name).resolve() in skipped}

    shutil.copytree(source, folder, ignore=left, dirs_exist_ok=True)
    _adapt_config(folder / CONFIG_NAME, dtype)
    if dtype is not None and (shrunk := folder / SHRUNK_NAME).is_file():
        write_json(shrunk, _read(shrunk) | {"dtype": str(dtype).removeprefix("torch.")})
    if (card := folder / CARD).is_file():
        text = card.read_text(encoding="utf-8")
        for old, new in SAID.items():
            text = text.replace(old, new)
        text = text.replace("```python\nfrom transformers", "```python\nimport hf_bimp\nfrom transformers")
        card.write_text(text, encoding="utf-8")


def _adapt_config(path: Path, dtype: torch.dtype | None) -> None:
    """config.json of Transformers names the format; other libraries would not know what to make of it."""
    config = _read(path) if path.is_file() else {}
    if "model_type" not in config:
        return
    config["quantization_config"] = quantization_config()
    if dtype is not None:
        _set_dtype(config, str(dtype).removeprefix("torch."))
    write_json(path, config)


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = name
        elif isinstance(value, dict) and key.endswith("config") and key != "quantization_config":
            _set_dtype(value, name)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
