"""Sentence pairs for translation: the offline sample, a local folder or file, or a Hub id; then tokenized."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from shared.cldr_sample import cldr_dataset


@dataclass
class DataArguments:
    """Where the sentence pairs come from and how they are cut."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id (wmt/wmt16), or a local folder or file, with a `translation` column. By default an "
            "offline sample made from Unicode CLDR."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set (de-en)."})
    source_lang: str = field(default="en", metadata={"help": "Key of the source sentence."})
    target_lang: str = field(default="de", metadata={"help": "Key of the target sentence."})
    source_prefix: str = field(default="", metadata={"help": "Task prefix: 'translate English to German: '."})
    max_source_length: int = field(default=128, metadata={"help": "In tokens; longer sources are cut."})
    max_target_length: int = field(default=128, metadata={"help": "In tokens; longer targets are cut."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "The same for validation and test."})


def load_pairs(args: DataArguments) -> DatasetDict:
    """Splits train, validation and, where the data has it, test, each with a `translation` column.

    Raises `ValueError` where the column, a language or a split is missing.
    """
    if args.dataset_name is None:
        pairs = cldr_dataset()
    elif Path(args.dataset_name).is_file():
        kind = {"jsonl": "json"}.get(suffix := Path(args.dataset_name).suffix[1:], suffix)
        pairs = load_dataset(kind, data_files=args.dataset_name)
    else:
        pairs = load_dataset(args.dataset_name, args.dataset_config)
    if "validation" not in pairs:
        held_out = pairs["train"].train_test_split(test_size=0.1, seed=0)
        pairs = DatasetDict(pairs, train=held_out["train"], validation=held_out["test"])
    _check_columns(args, pairs["train"])
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_eval_samples}
    return DatasetDict({name: _first(pairs[name], limit) for name, limit in limits.items() if name in pairs})


def _check_columns(args: DataArguments, pairs: Dataset) -> None:
    if "translation" not in pairs.column_names:
        raise ValueError(
            f"{args.dataset_name} has the columns {pairs.column_names}; a `translation` column is needed, with rows "
            'such as {"en": "A house.", "de": "Ein Haus."}.'
        )
    languages = pairs[0]["translation"].keys()
    if not {args.source_lang, args.target_lang} <= languages:
        raise ValueError(
            f"{args.dataset_name} has the languages {', '.join(languages)}, not both source_lang={args.source_lang} "
            f"and target_lang={args.target_lang}."
        )


def _first(pairs: Dataset, limit: int | None) -> Dataset:
    return pairs if limit is None else pairs.select(range(min(limit, len(pairs))))


def sentences(args: DataArguments, pairs: Dataset) -> list[str]:
    """Both sides of all pairs, to train a tokenizer on."""
    rows = pairs["translation"]
    return [args.source_prefix + row[args.source_lang] for row in rows] + [row[args.target_lang] for row in rows]


def tokenize(args: DataArguments, pairs: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Token ids of the sources (with the prefix) as `input_ids` and of the targets as `labels`."""

    def encode(batch: dict) -> dict:
        sources = [args.source_prefix + row[args.source_lang] for row in batch["translation"]]
        targets = [row[args.target_lang] for row in batch["translation"]]
        encoded = tokenizer(sources, max_length=args.max_source_length, truncation=True)
        labels = tokenizer(text_target=targets, max_length=args.max_target_length, truncation=True)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": labels["input_ids"],
        }

    return pairs.map(encode, batched=True, remove_columns=["translation"], desc="Tokenizing")
