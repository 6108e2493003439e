"""Models that take no labels and return a tensor train in a few lines: timm's, torchvision's and one's own."""

import copy
import pickle
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import EvalPrediction

from helpers import classification_items, run_arguments
from hf_bimp import BIMPArguments, BIMPTrainer
from processes import output_of
from trainers import assert_same_tensors

CLASSES, SIZE = 4, 32


class Net(nn.Module):
    """One's own; no batch norm, so that a batch in parts is the batch."""

    def __init__(self, outputs: int = CLASSES):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, outputs)

    def forward(self, picture: Tensor) -> Tensor:
        return self.last(self.first(picture).relu().amax((2, 3)))


def vit() -> nn.Module:
    size = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **size)


def deeplab() -> nn.Module:
    build = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    return build(weights=None, weights_backbone=None, num_classes=CLASSES)


MODELS = {
    "timm resnet": lambda: timm.create_model("resnet10t", num_classes=CLASSES),
    "timm vit": vit,
    "torchvision resnet": lambda: torchvision.models.resnet18(num_classes=CLASSES),
    "torchvision deeplab": deeplab,  # returns {"out": logits}
    "own": Net,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def items(count: int = 16, has_pixels: bool = False, image: str = "image", label: str = "label") -> list[dict]:
    """Noise, brighter where the class is higher; as the columns of many data sets on the Hub are called."""
    generator = torch.Generator().manual_seed(1)
    shape = (SIZE, SIZE) if has_pixels else ()
    rows = []
    for _ in range(count):
        classes = torch.randint(0, CLASSES, shape, generator=generator)
        noise = torch.randn(3, SIZE, SIZE, generator=generator)
        rows.append({image: noise + classes, label: classes if has_pixels else int(classes)})
    return rows


def items_for(name: str) -> list[dict]:
    # Of "label" Trainer's own collator wants one number an item.
    return items(has_pixels=True, label="labels") if name == "torchvision deeplab" else items()


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(1) == evaluated.label_ids).mean())}


def trainer_of(model: nn.Module, folder: Path, rows: list[dict] | datasets.Dataset, **changes) -> BIMPTrainer:
    named = {name: changes.pop(name) for name in ("compute_loss_func", "data_collator") if name in changes}
    defaults = {"target_sparsity": 0.6, "max_steps": 6, "num_cycles": 2, "dense_ratio": 0.34, "learning_rate": 1e-2}
    args = BIMPArguments(**run_arguments(folder, **(defaults | changes)))
    return BIMPTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy, **named
    )


def logits(model: nn.Module, rows: list[dict]) -> Tensor:
    with torch.no_grad():
        outputs = model.eval()(torch.stack([row["image"] for row in rows]))
    return outputs if torch.is_tensor(outputs) else outputs["out"]


def labels_of(rows: list[dict]) -> Tensor:
    return torch.stack([torch.as_tensor(row.get("label", row.get("labels"))) for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_trains_prunes_evaluates_and_resumes(tmp_path, name) -> None:
    rows, saving = items_for(name), {"save_strategy": "steps", "save_steps": 3}
    model = make(name)
    kind, names = type(model), list(model.state_dict())
    trainer = trainer_of(model, tmp_path / "whole", rows, **saving)
    trainer.train()
    masks = trainer.method.masks
    exact = round(0.6 * masks.num_weights)
    assert masks.num_pruned == exact == sum(int((w == 0).sum()) for w in masks.weights.values())
    assert trainer.results["theoretical_speedup"] > 1

    expected, labels = logits(model, rows), labels_of(rows)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(nn.functional.cross_entropy(expected, labels)), rel=1e-4)
    assert metrics["eval_accuracy"] == pytest.approx(float((expected.argmax(1) == labels).float().mean()), abs=0.01)
    predicted = trainer.predict(rows)
    np.testing.assert_allclose(predicted.predictions, expected, rtol=1e-3, atol=1e-4)
    assert (predicted.label_ids == labels.numpy()).all()
    unlabelled = trainer.predict([{"image": row["image"]} for row in rows])
    np.testing.assert_allclose(unlabelled.predictions, predicted.predictions, rtol=1e-3, atol=1e-4)

    assert trainer.model is model and type(model) is kind and list(model.state_dict()) == names
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(logits(again, rows), expected)

    resumed = trainer_of(make(name), tmp_path / "resumed", rows, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_tensors(*(load_file(tmp_path / which / "model.safetensors") for which in ("whole", "resumed")))


@pytest.mark.parametrize("name", ["timm resnet", "timm vit"])
def test_timm_loads_what_was_saved(tmp_path, name) -> None:
    trainer = trainer_of(make(name), tmp_path, items(), save_strategy="epoch")
    trainer.train()
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same_tensors(loaded.state_dict(), trainer.model.state_dict())


def test_filters_of_a_timm_model(tmp_path) -> None:
    trainer = trainer_of(make("timm resnet"), tmp_path, items(), granularity="filter", target_sparsity=0.5)
    trainer.train()
    groups = trainer.method.masks.rule.groups
    assert len(groups) > 5
    weights = dict(trainer.model.named_parameters())
    for group in groups:
        assert int((weights[group.weights[0].name] == 0).flatten(1).all(1).sum()) == round(0.5 * group.size)


def test_a_batch_in_parts_is_the_batch(tmp_path) -> None:
    """Although in one part every label counts and in the other a few do."""
    rows = items()
    for row in rows[8:13]:
        row["label"] = -100
    runs = []
    for parts in (1, 2):
        sizes = {"per_device_train_batch_size": 16 // parts, "gradient_accumulation_steps": parts, "logging_steps": 1}
        trainer = trainer_of(make("own"), tmp_path, rows, optim="sgd", max_steps=4, num_cycles=1, **sizes)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, trainer.model.state_dict()))
    (whole, weights), (parted, others) = runs
    assert len(whole) == 4 and parted == pytest.approx(whole, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given", ["model", "model_init"])
def test_labels_are_smoothed_as_the_arguments_say(tmp_path, given) -> None:
    args = BIMPArguments(**run_arguments(tmp_path, target_sparsity=0.5, max_steps=2, label_smoothing_factor=0.3))
    models = {"model": make("own")} if given == "model" else {"model_init": lambda: make("own")}
    trainer = BIMPTrainer(**models, args=args, train_dataset=items(), eval_dataset=items())
    trainer.train()
    expected = nn.functional.cross_entropy(logits(trainer.model, items()), labels_of(items()), label_smoothing=0.3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_acc_allr_measures_the_training_accuracy(tmp_path) -> None:
    trainer = trainer_of(make("own"), tmp_path, items(), retrain_schedule="acc_allr")
    measured, train_accuracy = [], trainer._bimp_train_accuracy
    trainer._bimp_train_accuracy = lambda: measured.append((logits(trainer.model, items()), train_accuracy())) or 0.5
    trainer.train()
    assert measured
    for expected, share in measured:
        assert share == float((expected.argmax(1) == labels_of(items())).float().mean())


# ---- Columns ----


@pytest.mark.parametrize("image, label", [("pixel_values", "labels"), ("image", "label"), ("picture", "label_ids")])
def test_columns_of_a_data_set_of_the_hub(tmp_path, image, label) -> None:
    data = datasets.Dataset.from_list([{n: torch.as_tensor(v).tolist() for n, v in row.items()} for row in items()])
    data = data.rename_columns({"image": image, "label": label}).with_format("torch")
    if label == "label_ids":
        data = data.map(lambda row: {"label_ids": row["label_ids"].reshape(1)})  # as of token labels: lists

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        return {n: torch.stack([row[n] for row in rows]).squeeze(1) for n in rows[0]}

    trainer = trainer_of(make("own"), tmp_path, data, **({"data_collator": collate} if label == "label_ids" else {}))
    trainer.train()
    expected = trainer_of(make("own"), tmp_path, items())
    expected.train()
    assert_same_tensors(trainer.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_columns_that_the_forward_does_not_take_are_left_out_if_the_first_is_there(tmp_path, kind) -> None:
    rows = [
        row | {"picture": row.pop("image").tolist(), "tags": [0] * i, "weight": 1.0} for i, row in enumerate(items())
    ]
    trainer = trainer_of(make("own"), tmp_path, kind(rows) if kind is list else kind(rows).with_format("torch"))
    trainer.train()
    assert sorted(next(iter(trainer.get_train_dataloader()))) == ["labels", "picture"]
    with pytest.raises(ValueError, match="The model takes picture.*columns labels, image, weight is 'picture'"):
        trainer_of(make("own"), tmp_path, [row | {"weight": 1.0} for row in items()]).train()


def test_a_transform_of_the_data_set_sees_all_columns(tmp_path) -> None:
    data = datasets.Dataset.from_dict({"brightness": list(range(8)), "fine_label": [i % CLASSES for i in range(8)]})
    data.set_transform(
        lambda rows: {
            "pixel_values": [torch.full((3, SIZE, SIZE), float(b)) for b in rows["brightness"]],
            "labels": rows["fine_label"],
        }
    )
    trainer = trainer_of(make("timm resnet"), tmp_path, data)
    trainer.train()
    assert trainer.results["sparsity"]["prunable"] == pytest.approx(0.6, abs=1e-4)


# ---- What the user gives goes first ----


def test_a_loss_of_the_users_own(tmp_path) -> None:
    def squares(outputs: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        return (outputs.flatten() - labels).square().sum() / num_items_in_batch

    rows = [row | {"label": row["label"] / 2} for row in items()]
    trainer = trainer_of(Net(outputs=1), tmp_path, rows, compute_loss_func=squares)
    trainer.train()
    expected = (logits(trainer.model, rows).flatten() - labels_of(rows)).square().mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert trainer.predict(rows).predictions.shape == (16, 1)


def test_a_trainer_with_a_loss_of_its_own_gets_its_columns(tmp_path) -> None:
    seen = set()

    class OwnLoss(BIMPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.update(inputs)
            outputs = model(inputs["image"])
            loss = nn.functional.cross_entropy(outputs, inputs["labels"])
            return (loss, {"logits": outputs}) if return_outputs else loss

    args = BIMPArguments(**run_arguments(tmp_path, target_sparsity=0.5, max_steps=2, remove_unused_columns=False))
    OwnLoss(model=make("own"), args=args, train_dataset=items()).train()
    assert seen == {"image", "labels"}


def test_a_model_that_returns_a_loss_without_labels_is_left_alone(tmp_path) -> None:
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            outputs = self.layer(image)
            return {"loss": (outputs - image).square().mean(), "logits": outputs}

    sizes = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 16}
    args = BIMPArguments(**run_arguments(tmp_path, target_sparsity=0.5, **sizes))
    model = Autoencoder()
    expected = model(torch.stack([row["image"] for row in items()]))["loss"].item()
    trainer = BIMPTrainer(model=model, args=args, train_dataset=[{"image": row["image"]} for row in items()])
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(expected, rel=1e-5)
    assert trainer.results["sparsity"]["prunable"] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="returns a dict of loss, logits in place of logits"):
        BIMPTrainer(model=Autoencoder(), args=args, train_dataset=items()).train()


def test_auxiliary_heads_are_not_forgotten_silently(tmp_path) -> None:
    build = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large
    model = build(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)
    with pytest.raises(ValueError, match="a OrderedDict of out, aux in place of logits.*aux_classifier"):
        trainer_of(model, tmp_path, items(has_pixels=True, label="labels")).train()


def test_the_package_needs_neither_timm_nor_torchvision() -> None:
    code = (
        "import sys; sys.modules |= {'timm': None, 'torchvision': None}; import hf_bimp; print(hf_bimp.CrossEntropy)"
    )
    assert "hf_bimp.trainer.cross_entropy.CrossEntropy" in output_of(sys.executable, "-c", code)


def test_the_lines_in_the_readme_run(tmp_path, monkeypatch) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = text.split("## Models of timm and torchvision")[1].split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    assert_same_tensors(scope["sparse"].state_dict(), scope["model"].state_dict())
    assert scope["trainer"].results["sparsity"]["prunable"] == pytest.approx(0.9, abs=1e-6)
    assert {"loss"} <= scope["trainer"].results["final"].keys()


class Optional(nn.Module):
    """Its first argument can be left out, and its loss is its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids=None, x=None, target=None):
        logits = self.last(self.first(x).relu())
        return {"loss": nn.functional.cross_entropy(logits, target), "logits": logits}


def test_a_first_argument_that_can_be_left_out_is(tmp_path) -> None:
    items = [{"x": item["x"], "target": item["labels"]} for item in classification_items()]
    args = BIMPArguments(**run_arguments(tmp_path, max_steps=6, target_sparsity=0.5, label_names=["target"]))
    trainer = BIMPTrainer(Optional(), args, train_dataset=items)
    trainer.train()
    assert trainer.results["sparsity"]["prunable"] == 0.5


class Bare(nn.Module):
    def __init__(self, classes: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, classes)

    def forward(self, x):
        return self.last(self.first(x).relu())


def bare_trainer(folder, items: list, model: nn.Module | None = None, **changes) -> BIMPTrainer:
    settings = {"max_steps": 6, "target_sparsity": 0.5, "logging_steps": 1} | changes
    args = BIMPArguments(**run_arguments(folder, **settings))
    return BIMPTrainer(Bare() if model is None else model, args, train_dataset=items, eval_dataset=items)


def test_a_compiled_one_is_known_too(tmp_path) -> None:
    trainer = bare_trainer(tmp_path, classification_items(), torch.compile(Bare(), backend="eager"))
    trainer.train()
    assert trainer.results["sparsity"]["prunable"] == 0.5 and "loss" in trainer.results["final"]


def test_labels_of_eight_bits_count_like_others(tmp_path) -> None:
    """156 is -100 in eight bits, which does not count."""
    losses = []
    for dtype in (torch.uint8, torch.int64):
        items = [
            {"x": item["x"], "labels": torch.tensor(156 if i % 2 else 3, dtype=dtype)}
            for i, item in enumerate(classification_items())
        ]
        trainer = bare_trainer(tmp_path, items, Bare(171))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        losses[-1].append(trainer.results["final"]["loss"])
    assert losses[0] == losses[1]


def test_a_batch_without_labels_is_no_loss(tmp_path) -> None:
    items = [{"x": item["x"], "target": item["labels"]} for item in classification_items()]
    trainer = bare_trainer(tmp_path, items)
    with pytest.raises(ValueError, match="returns a tensor and no loss, and the batch .* holds no labels"):
        trainer.train()


def test_a_tuple_is_no_batch_of_a_bare_model(tmp_path) -> None:
    items = [(item["x"], item["labels"]) for item in classification_items()]
    args = BIMPArguments(**run_arguments(tmp_path, max_steps=6, target_sparsity=0.5))
    trainer = BIMPTrainer(Bare(), args, train_dataset=items, data_collator=default_collate)
    with pytest.raises(ValueError, match="The batch is a (list|tuple), and what of it the model takes as x"):
        trainer.train()


def test_label_names_may_be_those_of_the_data(tmp_path) -> None:
    items = [{"x": item["x"], "label": item["labels"]} for item in classification_items()]
    trainer = bare_trainer(tmp_path, items, label_names=["label"])
    trainer.train()
    assert trainer.results["final"].keys() == {"loss"}
