"""The model card of a pruned model: how sparse it is, how it was pruned, how good it is, how to load it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from ..arguments import BIMPArgumentsMixin
from ..storage.model_formats import is_own, library_of, loading_code
from .deployment_table import TITLE, section_of
from .markdown import escaped, shown, table
from .plots import LAYERS_PLOT_NAME
from .results import MOST_ROWS, is_number

HUB_LIBRARIES = {
    "transformers": "transformers",
    "timm": "timm",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}
# Two sentences that are no longer true of a compressed copy, whose folder has others in their place.
PLAIN = "It is a plain checkpoint and needs no hf_bimp:"
DENSE_SIZE = "The checkpoint has the size of the dense one: `hf_bimp.compress` stores it without its zeros."
FASTER = "`hf_bimp.accelerate` leaves them out of the computation where that measures faster on a CPU."
TAGS = ("hf_bimp", "pruned", "sparse", "generated_from_trainer")


@dataclass(frozen=True)
class CardSource:
    """What a card is about: the model, the arguments and `results` of its run (None in the middle of it).

    `where` is the folder or the Hub id that it loads from.
    """

    model: nn.Module
    args: BIMPArgumentsMixin
    results: dict[str, Any] | None
    where: str


def write_model_card(
    source: CardSource,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Writes README.md into the output directory; the arguments are those of `Trainer.create_model_card`."""
    results = source.results
    name = model_name or Path(source.args.output_dir).absolute().name
    base_model = finetuned_from or _base_model(source.model)
    datasets = _as_list(dataset_tags) or _as_list(dataset)
    data = ModelCardData(
        language=language,
        license=license,
        library_name=HUB_LIBRARIES.get(library_of(source.model)),
        tags=[*TAGS, *(tag for tag in _as_list(tags) if tag not in TAGS)],
        base_model=base_model,
        datasets=_as_list(dataset_tags) or None,
        pipeline_tag=_first(tasks),
        metrics=list(_scores(results)) or None,
        model_name=name,
        eval_results=_eval_results(results, _first(tasks), _first(datasets), _first(dataset_args)),
    )
    body = [f"# {escaped(name)}", _summary(results, base_model), *_sections(source)]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"
    ModelCard(content).save(_card_path(source.args))


def add_to_model_card(source: CardSource) -> None:
    """Adds what is known of the pruning to the card that another trainer's `create_model_card` has written."""
    path = _card_path(source.args)
    card = ModelCard.load(path) if path.is_file() else ModelCard("---\ntags: []\n---\n")
    tags = _as_list(card.data.get("tags"))
    card.data["tags"] = list(dict.fromkeys([*tags, *TAGS]))
    summary = _summary(source.results, _base_model(source.model))
    card.text = "\n\n".join([card.text.rstrip(), "# Sparsity", summary, *_sections(source)]) + "\n"
    card.save(path)


def _card_path(args: BIMPArgumentsMixin) -> Path:
    return Path(args.output_dir) / "README.md"


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _first(value: str | list[str] | None) -> str | None:
    return next(iter(_as_list(value)), None)


def _base_model(model: nn.Module) -> str | None:
    """The Hub id that the model was loaded from; a local path, gone since perhaps, means nothing to others."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    # The commit is known of what came from the Hub alone.
    is_of_hub = getattr(config, "_commit_hash", None) is not None and not Path(config.name_or_path).exists()
    return config.name_or_path if is_of_hub else None


def _eval_results(results: dict | None, task: str | None, dataset: str | None, config: str | None):
    if not results or task is None or dataset is None:
        return None  # the Hub's metadata wants all three
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=config,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in _scores(results).items()
    ]


def _scores(results: dict | None) -> dict[str, Any]:
    """The metrics of the final model that are numbers, and no loss."""
    final = results["final"] if results else {}
    return {name: value for name, value in final.items() if not name.endswith("loss") and is_number(value)}


def _summary(results: dict | None, base_model: str | None) -> str:
    of = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    if results is None:
        return f"A model{of}, in training with hf_bimp."
    what = {"weight": "", "filter": " of whole filters"}.get(results["granularity"], f" to {results['granularity']}")
    how = f"{results['criterion']} pruning{what}, {results['allocation']} allocation, after {results['paper']}: "
    if results["paper"] is None:
        how = ""
    return (
        f"A version{of} in which **{results['sparsity']['prunable']:.2%} of the prunable weights** "
        f"({_counted(results['sparsity'])}) and {results['sparsity']['all_parameters']:.2%} of all parameters are "
        f"zero. Trained with hf_bimp: {how}{results['summary']}."
    )


def _counted(sparsity: dict) -> str:
    prunable, in_layers = sparsity["num_prunable"], sparsity["num_in_layers"]
    if prunable == in_layers:
        return f"all {prunable:,} of linear and convolution layers"
    return f"{prunable:,} of the {in_layers:,} of linear and convolution layers; the others stay dense, see below"


def _sections(source: CardSource) -> list[str]:
    sections, results = ["## How to load it", _loading(source)], source.results
    if results is None:
        return sections
    return [
        *("## Results", _metrics_table(results)),
        *("## How it was pruned", _plan_rows(results)),
        *("## Measures", _measures(results)),
        *((TITLE, deployment) if (deployment := section_of(results)) else ()),
        *sections,
        f"{DENSE_SIZE} {FASTER}" + _shrinking(source.args),
        *("## Training", _hyperparameters(source.args, results)),
    ]


def _loading(source: CardSource) -> str:
    needs = "It is a plain checkpoint and needs only its architecture from hf_bimp:" if is_own(source.model) else PLAIN
    return f"{needs}\n\n```python\n{loading_code(source.model, source.where)}\n```"


def _measures(results: dict) -> str:
    speedup, rate = results["theoretical_speedup"], results["throughput"]["training_samples_per_second"]
    rows = [
        ["theoretical speedup (multiply-adds, zeros cost nothing)", "-" if speedup is None else f"{speedup:.4g}"],
        ["training samples per second", "-" if rate is None else f"{rate:.4g}"],
        *([f"pruning stability ({name})", f"{value:.4g}"] for name, value in results["pruning_stability"].items()),
        ["layers with nothing left", ", ".join(results["collapsed_layers"]) or "none"],
    ]
    layers = [[name, f"{share:.2%}"] for name, share in results["sparsity"]["per_layer"].items()]
    details = (
        f"<details><summary>Sparsity of each layer</summary>\n\n{table(['weight', 'sparsity'], layers)}\n\n</details>"
    )
    parts = [table(["measure", "value"], rows), f"![Sparsity of each layer]({LAYERS_PLOT_NAME})", details]
    if results["stays_dense"]:
        dense = [[name, reason] for name, reason in results["stays_dense"].items()]
        parts.append(
            "<details><summary>Weight matrices that stay dense</summary>\n\nEmbeddings aside.\n\n"
            f"{table(['weight', 'why'], dense)}\n\n</details>"
        )
    return "\n\n".join(parts)


def _shrinking(args: BIMPArgumentsMixin) -> str:
    if args.granularity != "filter":
        return ""
    return " `hf_bimp.shrink(model, example_inputs)` gives a smaller dense model without its zero filters and heads."


def _metrics_table(results: dict) -> str:
    dense, sparse = results["dense"], f"{results['sparsity']['prunable']:.2%} sparse"
    if not dense:
        return table(["metric", sparse], [[m, shown(value)] for m, value in results["final"].items()])
    rows = [[m, shown(dense.get(m, "-")), shown(value)] for m, value in results["final"].items()]
    return table(["metric", "dense", sparse], rows)


def _plan_rows(results: dict) -> str:
    keys = ("threshold", "distance", "d1", "d2", "retrain_peak")
    header = [
        "cycle",
        "pruned before step",
        "sparsity",
        "threshold",
        "||W - W_p||",
        "d1",
        "d2",
        "peak learning rate",
    ]
    rows = [
        [p["cycle"], p["step"], f"{p['sparsity']:.2%}"] + [f"{p[key]:.4g}" if key in p else "-" for key in keys]
        for p in results["prunings"]
    ]
    if len(rows) > MOST_ROWS:
        rows[4:-3] = [["..."] * len(header)]
    return f"{results['plan']['total_steps']} optimizer steps in all.\n\n" + table(header, rows)


def _hyperparameters(args: BIMPArgumentsMixin, results: dict) -> str:
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = [
        ["optimizer", args.optim.value],
        ["learning rate", args.learning_rate],
        ["batch size (all processes, accumulated)", batch],
        ["weight decay", args.weight_decay],
        ["seed", args.seed],
        *([f"{name} version", number] for name, number in results["versions"].items()),
    ]
    return table(["", ""], rows)
