"""Training, validation and test rows of any data set in the Hub's layout, for the vision recipes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import DatasetDict, load_dataset


@dataclass
class SplitArguments:
    """Which data, and which part of it for what."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder. By default scikit-learn's digits, offline."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split to validate on. By default a tenth of the training data is held out."}
    )
    validation_share: float = field(default=0.1, metadata={"help": "Share of the training data held out."})
    split_seed: int = field(default=0, metadata={"help": "Decides what is held out; the same in every run."})
    test_split: str | None = field(default="test", metadata={"help": "Split to test on in the end; null for none."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only so many of the training images, held-out ones included."}
    )
    max_test_samples: int | None = field(default=None, metadata={"help": "Use only so many of the test images."})

    def __post_init__(self):
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must lie in (0, 1).")


def load_columns(args: SplitArguments, columns: dict[str, str], offline: Callable[[], DatasetDict]) -> DatasetDict:
    """All splits, with these columns alone under their new names; `offline` gives the data where none is named.

    Raises `ValueError` where a column or a split that `args` names is missing.
    """
    data = offline() if args.dataset_name is None else load_dataset(args.dataset_name, args.dataset_config)
    missing = {"train", args.validation_split, args.test_split} - {None} - data.keys()
    present = next(iter(data.values())).column_names
    if missing or (missing := columns.keys() - set(present)):
        raise ValueError(
            f"{args.dataset_name or 'The offline sample'} has the splits {list(data)} and the columns {present}, and "
            f"not: {', '.join(sorted(missing))}. Set validation_split and test_split, and the columns' names."
        )
    data = data.select_columns(list(columns))
    return data.rename_columns({old: new for old, new in columns.items() if old != new})


def make_splits(args: SplitArguments, data: DatasetDict) -> DatasetDict:
    """The splits train, validation and, unless `test_split` is null, test."""
    train = data["train"]
    if args.max_train_samples is not None:
        train = train.shuffle(seed=args.split_seed).select(range(min(args.max_train_samples, len(train))))
    if args.validation_split is None:
        halves = train.train_test_split(args.validation_share, seed=args.split_seed)
        splits = {"train": halves["train"], "validation": halves["test"]}
    else:
        splits = {"train": train, "validation": data[args.validation_split]}
    if args.test_split is not None:
        test = data[args.test_split]
        splits["test"] = test.select(range(min(args.max_test_samples or len(test), len(test))))
    return DatasetDict(splits)
