"""The architecture: imports go one way, files are small, overridden hooks are Trainer's, names do not collide."""

import ast
import inspect
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

import hf_bimp
from helpers import classification_items, classifier, run_arguments
from hf_bimp.arguments import BIMPArgumentsMixin
from hf_bimp.trainer.callbacks import PruningCallback, ReportingCallback
from hf_bimp.trainer.checkpoints import CheckpointHooks
from hf_bimp.trainer.finishing import FinishingHooks
from hf_bimp.trainer.loss import LabelWeightedLoss
from hf_bimp.trainer.measuring import MeasuringHooks
from hf_bimp.trainer.mixin import BIMPMixin
from hf_bimp.trainer.plain_models import PlainModels

PACKAGE = Path(hf_bimp.__file__).parent
# Each may import those before it, and itself.
ORDER = [
    "reproducibility",
    "schedules",
    "models",
    "metrics",
    "storage",
    "pruning",
    "methods",
    "support",
    "arguments",
    "reporting",
    "deployment",
    "trainer",
    "__init__",
]
MIXINS = (CheckpointHooks, MeasuringHooks, FinishingHooks, BIMPMixin, LabelWeightedLoss, PlainModels)


def imports(path: Path) -> set[str]:
    """The modules of hf_bimp that a file imports, dotted, from the package on."""
    package, found = path.relative_to(PACKAGE).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            found |= (
                {".".join([*base, node.module])} if node.module else {".".join([*base, a.name]) for a in node.names}
            )
    return found


def test_imports_go_one_way() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports(path):
            assert ORDER.index(module.split(".")[0]) <= ORDER.index(own), f"{path} imports {module}"


def test_no_module_imports_another_that_imports_it() -> None:
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    edges = {name: {module for module in imports(path) if module in names} for name, path in names.items()}

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for module in edges[todo.pop()] - seen:
                seen.add(module)
                todo.append(module)
        return seen

    assert [name for name in names if name in reachable(name)] == []


def test_files_are_small_and_say_their_duty() -> None:
    flat = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(flat) <= 6, flat
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.startswith('"""') and len(text.splitlines()) <= 300, path


def overrides() -> list[tuple[type, str]]:
    return [(mixin, name) for mixin in MIXINS for name in vars(mixin) if name in dir(Trainer) and name[:2] != "__"]


@pytest.mark.parametrize(("mixin", "name"), overrides(), ids=lambda part: getattr(part, "__name__", part))
def test_overridden_methods_take_what_trainer_passes(mixin: type, name: str) -> None:
    """A new Transformers that calls them otherwise fails here first."""
    parent = inspect.signature(getattr(Trainer, name)).parameters
    ours = inspect.signature(vars(mixin)[name]).parameters
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in ours.values())
    named = [p for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for mine, theirs in zip(named, parent.values(), strict=False):
        assert mine.name == theirs.name or name == "_init_training_state", (mine, theirs)
    assert takes_any or len(named) == len([p for p in parent.values() if p.kind is not p.VAR_KEYWORD])


def test_private_overrides_are_few() -> None:
    private = sorted({name for _, name in overrides() if name.startswith("_")})
    assert private == [
        "_clip_grad_norm",
        "_determine_best_metric",
        "_get_collator_with_removed_columns",
        "_init_training_state",
        "_load_best_model",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_remove_unused_columns",
        "_save",
        "_save_rng_state",
    ]


@pytest.mark.parametrize("callback", [PruningCallback, ReportingCallback])
def test_callbacks_hear_events_that_there_are(callback: type) -> None:
    assert all(name in vars(TrainerCallback) for name in vars(callback) if name.startswith("on_"))


def test_names_of_the_mixin_are_free_in_other_trainers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformerTrainer
    from trl import DPOTrainer, RewardTrainer, SFTTrainer

    ours = {name for mixin in MIXINS for name in vars(mixin)} - set(dir(Trainer))
    for other in (SFTTrainer, DPOTrainer, RewardTrainer, SentenceTransformerTrainer):
        assert not ours & set(dir(other)), other
        assigned = {
            node.attr
            for kind in other.__mro__
            if kind.__module__.split(".")[0] in ("trl", "sentence_transformers")
            for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(kind))))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        }
        # Where one name means the same in both it does no harm.
        assert not (ours | {"throughput", "results", "resumed"}) & assigned, other
    trainer = Trainer(
        model=classifier(),
        args=TrainingArguments(**run_arguments(tmp_path)),
        train_dataset=classification_items(8),
    )
    assert not ours & set(vars(trainer))


def test_argument_names_are_free_in_other_arguments() -> None:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import DPOConfig, RewardConfig, SFTConfig

    ours = set(BIMPArgumentsMixin.__dataclass_fields__)
    for other in (SFTConfig, DPOConfig, RewardConfig, SentenceTransformerTrainingArguments):
        assert not ours & set(other.__dataclass_fields__), other
