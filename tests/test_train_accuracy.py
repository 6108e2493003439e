"""The accuracy that acc_allr goes by: outputs of any form, and labels that are no classes refused before training."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMultipleChoice, BertForQuestionAnswering, BertForSequenceClassification

from helpers import CLASSES, FEATURES, classification_items, run_arguments
from hf_bimp import BIMPArguments, BIMPTrainer
from hf_bimp.trainer.train_accuracy import logits_of

ITEMS = classification_items(37)
BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class AnyForm(nn.Module):
    """Gives its logits as `form` says, with other tensors around them."""

    def __init__(self, form: str):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.first, self.last = form, nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None):
        hidden = self.first(x).relu()
        logits = self.last(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        forms = {
            "dict": {"loss": loss, "ids": x.argmax(-1), "logits": logits, "states": hidden},
            "unnamed": {"loss": loss, "scores": logits},
            "tuple": (loss, logits, hidden),
            "tensor": logits,
        }
        return forms[self.form]


class LossOfTensor(BIMPTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        return (loss, logits) if return_outputs else loss


def trainer_of(folder, model: nn.Module, items: list[dict], kind=BIMPTrainer, **changes) -> BIMPTrainer:
    defaults = {"max_steps": 40, "target_sparsity": 0.9, "num_cycles": 2, "retrain_schedule": "acc_allr"}
    args = BIMPArguments(**run_arguments(folder, **(defaults | changes)))
    return kind(model, args, train_dataset=items)


def share_right(model: nn.Module) -> float:
    points, labels = torch.stack([item["x"] for item in ITEMS]), torch.tensor([item["labels"] for item in ITEMS])
    with torch.no_grad():
        return float((model.last(model.first(points).relu()).argmax(-1) == labels).double().mean())


@pytest.mark.parametrize("form", ["dict", "unnamed", "tuple", "tensor"])
def test_outputs_of_any_form(tmp_path, form) -> None:
    kind = LossOfTensor if form == "tensor" else BIMPTrainer
    trainer = trainer_of(tmp_path, AnyForm(form), ITEMS, kind)
    measured, prune = [], trainer._bimp_train_accuracy
    trainer._bimp_train_accuracy = lambda: measured.append((prune(), share_right(trainer.model))) or measured[-1][0]
    trainer.train()
    assert [one for one, _ in measured] == pytest.approx([other for _, other in measured], abs=1e-12)
    dense, first, second = (one for one, _ in measured)
    assert dense > 0.5  # more than the 0.25 of chance, so that another tensor would show
    records = trainer.results["prunings"]
    assert [record["train_accuracy_before"] for record in records] == [dense, dense]
    assert [record["train_accuracy_after"] for record in records] == [first, second]
    assert [r["d1"] for r in records] == pytest.approx([max(0.0, (dense - a) / dense) for a in (first, second)])


def test_other_schedules_say_nothing_of_it(tmp_path) -> None:
    trainer = trainer_of(tmp_path, AnyForm("dict"), ITEMS, retrain_schedule="allr")
    trainer.train()
    assert not any("train_accuracy_before" in record for record in trainer.results["prunings"])


def test_label_smoothing_takes_the_labels_out_of_the_batch(tmp_path) -> None:
    items = [{"input_ids": torch.full((8,), 1 + i % 4), "labels": i % 4} for i in range(32)]
    model = bert(BertForSequenceClassification, num_labels=4)
    trainer = trainer_of(tmp_path, model, items, label_smoothing_factor=0.1)
    trainer.train()
    assert trainer.results["prunings"][0]["train_accuracy_before"] > 0.5


def question(i: int) -> dict:
    return {"start_positions": i % 8, "end_positions": 7}


def bert(kind: type[nn.Module], **changes) -> nn.Module:
    torch.manual_seed(0)
    return kind(BertConfig(**BERT, max_position_embeddings=16, **changes))


def regression(**changes) -> nn.Module:
    return bert(BertForSequenceClassification, num_labels=1, problem_type="regression")


def several(number: int) -> nn.Module:
    return bert(BertForSequenceClassification, num_labels=number, problem_type="multi_label_classification")


@pytest.mark.parametrize(
    ("model", "labels", "complaint"),
    [
        (lambda: bert(BertForQuestionAnswering), question, "start_positions and end_positions together"),
        (regression, lambda i: {"labels": i / 32}, "is no class for each prediction"),
        (lambda: several(3), lambda i: {"labels": torch.ones(3)}, "is no class for each prediction"),
        (lambda: several(8), lambda i: {"labels": torch.ones(8)}, "is no class for each prediction"),
    ],
    ids=["question answering", "regression", "three labels", "as many labels as items"],
)
def test_labels_that_are_no_classes_are_refused_before_training(tmp_path, model, labels, complaint) -> None:
    items = [{"input_ids": torch.arange(1, 9)} | labels(i) for i in range(32)]
    trainer = trainer_of(tmp_path, model(), items)
    with pytest.raises(ValueError, match=f"acc_allr.*{complaint}.*Use retrain_schedule='allr'"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.glob("*.json"))


def test_whole_numbers_as_targets_of_a_regression_are_refused(tmp_path) -> None:
    class Regression(AnyForm):
        def forward(self, x: Tensor, labels: Tensor):
            value = self.last(self.first(x))[:, :1]
            return {"loss": (value[:, 0] - labels).square().mean(), "logits": value}

    with pytest.raises(ValueError, match="no output of the model scores two classes or more"):
        trainer_of(tmp_path, Regression("dict"), ITEMS).train()


def test_a_loss_that_gives_no_outputs_is_refused(tmp_path) -> None:
    class NoOutputs(BIMPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if return_outputs:
                raise NotImplementedError("no outputs here")
            return model(**inputs)["loss"]

    with pytest.raises(ValueError, match="gives no outputs of the first batch: NotImplementedError"):
        trainer_of(tmp_path, AnyForm("dict"), ITEMS, NoOutputs).train()


def test_choices_are_classes(tmp_path) -> None:
    items = [{"input_ids": torch.randint(1, 32, (4, 8)), "labels": i % 4} for i in range(16)]
    trainer = trainer_of(tmp_path, bert(BertForMultipleChoice), items, max_steps=8)
    trainer.train()
    assert 0 <= trainer.results["prunings"][0]["train_accuracy_before"] <= 1


def test_logits_are_found_by_the_labels_that_they_score() -> None:
    tokens, images = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 8, 8, dtype=torch.long)
    logits, maps = torch.zeros(2, 5, 7), torch.zeros(2, 3, 4, 4)
    assert logits_of((torch.zeros(()), torch.zeros(2, 5), logits), tokens) is logits
    assert logits_of({"out": (torch.zeros(2, 9), maps)}, images) is maps
    with pytest.raises(ValueError, match=r"labels have shape \(2, 5\), outputs \[\(2, 3, 4, 4\)\]"):
        logits_of(maps, tokens)
