"""Training data in any form: what is looked at before training is what the model gets, or is named."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from helpers import CLASSES, classification_items, run_arguments
from hf_bimp import BIMPArguments, BIMPTrainer
from hf_bimp.trainer.example_inputs import described, first_items, inputs_of_first_call


class Detector(nn.Module):
    """Convolutions, with one target an image in a list beside them; anchors have no row an image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3),
            nn.Linear(8, 4),
        )

    def forward(self, pixel_values: Tensor, labels: list, anchors: Tensor, scale: Tensor) -> dict[str, Tensor]:
        boxes = self.last(self.b(self.norm(self.a(pixel_values)).relu()).mean((2, 3))) * scale + anchors.mean(0)
        assert len(labels) == len(boxes), f"{len(labels)} labels for {len(boxes)} images"
        losses = [(box - label["boxes"].mean(0)).square().mean() for box, label in zip(boxes, labels, strict=True)]
        return {"loss": torch.stack(losses).mean(), "logits": boxes}


def detection_items(count: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
            "labels": {"boxes": torch.rand(2, 4, generator=generator)},
        }
        for _ in range(count)
    ]


def together(items: list[dict]) -> dict:
    """Images as a tensor, labels as a list, and two things that have nothing to do with the items."""
    images = torch.stack([item["pixel_values"] for item in items])
    labels = [item["labels"] for item in items]
    return {"pixel_values": images, "labels": labels, "anchors": torch.ones(5, 4), "scale": torch.tensor(2.0)}


def arguments(folder, **changes) -> BIMPArguments:
    return BIMPArguments(**run_arguments(folder, **({"max_steps": 8, "target_sparsity": 0.5} | changes)))


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_lists_and_numbers_beside_tensors(tmp_path, caplog, granularity) -> None:
    args = arguments(tmp_path, granularity=granularity, label_names=["labels"])
    trainer = BIMPTrainer(Detector(), args, train_dataset=detection_items(), data_collator=together)
    trainer.train()
    assert trainer.results["theoretical_speedup"] > 1.5 and "cannot be counted" not in caplog.text


class Mixing(nn.Module):
    """Takes whole batches of 8 alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.b(self.a(x).relu()).relu().view(2, 4, 16)).view(-1, CLASSES)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_a_model_that_mixes_the_items_of_a_batch_gets_the_whole(tmp_path, granularity) -> None:
    args = arguments(tmp_path, granularity=granularity)
    trainer = BIMPTrainer(Mixing(), args, train_dataset=classification_items())
    trainer.train()
    assert trainer.results["theoretical_speedup"] > 1.1


class Plain(nn.Module):
    """Returns the logits alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.a(x).relu()).relu())


class OwnLossTrainer(BIMPTrainer):
    """Batches are tuples."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        points, labels = inputs
        logits = model(points)
        loss = nn.functional.cross_entropy(logits, labels)
        return (loss, logits) if return_outputs else loss


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_tuples_with_a_loss_of_ones_own(tmp_path, caplog, granularity) -> None:
    items = classification_items()
    data = TensorDataset(torch.stack([i["x"] for i in items]), torch.tensor([i["labels"] for i in items]))
    args = arguments(tmp_path, granularity=granularity)
    trainer = OwnLossTrainer(Plain(), args, train_dataset=data, data_collator=default_collate)
    trainer.train()
    assert trainer.results["theoretical_speedup"] > 1.1 and "cannot be counted" not in caplog.text


class OwnLoaderTrainer(BIMPTrainer):
    """No `train_dataset`."""

    def get_train_dataloader(self):
        loader = DataLoader(classification_items(), batch_size=8, collate_fn=default_collate)
        return self.accelerator.prepare(loader)


@pytest.mark.parametrize("changes", [{}, {"granularity": "filter"}, {"retrain_schedule": "acc_allr"}], ids=str)
def test_a_loader_of_ones_own(tmp_path, changes) -> None:
    trainer = OwnLoaderTrainer(Mixing(), arguments(tmp_path, **changes))
    trainer.train()
    assert trainer.results["theoretical_speedup"] > 1.1
    assert ("train_accuracy_after" in trainer.results["prunings"][0]) == ("retrain_schedule" in changes)


class Choosy(nn.Module):
    """Its forward pass fails outside of training mode."""

    def __init__(self):
        super().__init__()
        self.a, self.last = nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not self.training:
            raise RuntimeError("x did not fit")
        logits = self.last(self.a(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_where_looking_fails_weights_train_and_filters_are_told_of_the_inputs(tmp_path, caplog) -> None:
    trainer = BIMPTrainer(Choosy(), arguments(tmp_path), train_dataset=classification_items())
    trainer.train()
    assert "multiply-adds cannot be counted" in caplog.text and trainer.results["theoretical_speedup"] is None
    refused = BIMPTrainer(Choosy(), arguments(tmp_path, granularity="filter"), train_dataset=classification_items())
    with pytest.raises(ValueError, match=r"x did not fit.*x: float32 \(8, 8\), labels: int64 \(8,\)"):
        refused.train()
    assert refused.state.global_step == 0


def test_first_items_of_what_has_a_row_an_item() -> None:
    batch = {
        "x": torch.arange(12).view(4, 3),
        "boxes": [torch.ones(1), torch.ones(2), torch.ones(3), torch.ones(4)],
        "cache": ((torch.zeros(4, 1), torch.zeros(4, 1)),),
        "class_weights": torch.ones(7),
        "scale": torch.tensor(1.0),
        "name": "text",
    }
    cut = first_items(batch)
    assert cut["x"].shape == (2, 3) and len(cut["boxes"]) == 2 and cut["cache"][0][1].shape == (2, 1)
    assert cut["class_weights"].shape == (7,) and cut["scale"] == 1 and cut["name"] == "text"
    assert [tuple(tensor.shape) for tensor in first_items((torch.zeros(4, 2), torch.zeros(4)))] == [(2, 2), (2,)]


def test_what_a_model_is_called_with() -> None:
    model = Plain()
    x = torch.zeros(2, 8)
    assert inputs_of_first_call(model, lambda m: m(x))[0] is x
    assert inputs_of_first_call(model, lambda m: m(x=x))["x"] is x
    assert inputs_of_first_call(model, lambda m: None) is None
    assert not model._forward_pre_hooks
    assert (
        described({"x": x, "y": [x, x], "z": 3}) == "x: float32 (2, 8), y: list of length 2 of float32 (2, 8), z: int"
    )


class InParts(nn.Module):
    """Whose parts a trainer calls one by one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)

    def forward(self, batch: dict) -> Tensor:
        raise AssertionError("nobody calls the whole")


class CountingTrainer(BIMPTrainer):
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        hidden = model.norm(model.first(inputs["x"]))
        return nn.functional.cross_entropy(model.last(hidden), inputs["labels"])


def test_a_loss_that_calls_parts_of_the_model_is_called_in_training_alone(tmp_path, caplog) -> None:
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = CountingTrainer(InParts(), args, train_dataset=classification_items())
    trainer.train()
    assert trainer.model.norm.num_batches_tracked == trainer.calls == 8
    assert trainer.results["theoretical_speedup"] is None and "cannot be counted" in caplog.text


class Renaming(BIMPTrainer):
    """Prepares batches in its own way."""

    def _prepare_inputs(self, inputs):
        prepared = super()._prepare_inputs(inputs)
        return {"x": prepared["features"], "labels": prepared["labels"]} if "features" in prepared else prepared


def test_a_trainer_that_prepares_batches_otherwise_is_measured_in_its_first_step(tmp_path) -> None:
    items = [{"features": item["x"], "labels": item["labels"]} for item in classification_items()]
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = Renaming(Mixing(), args, train_dataset=items)
    trainer.train()
    assert trainer.results["theoretical_speedup"] > 1.5


class OwnLoaderBesideData(BIMPTrainer):
    """The data are names of what the loader reads."""

    def get_train_dataloader(self):
        loader = DataLoader(classification_items(), batch_size=8, collate_fn=default_collate)
        return self.accelerator.prepare(loader)


@pytest.mark.parametrize("changes", [{}, {"granularity": "filter"}, {"retrain_schedule": "acc_allr"}], ids=str)
def test_data_that_only_a_loader_of_ones_own_can_read(tmp_path, changes) -> None:
    trainer = OwnLoaderBesideData(Mixing(), arguments(tmp_path, **changes), train_dataset=["a", "b"])
    trainer.train()
    assert trainer.results["theoretical_speedup"] > 1.1
