"""Offline metrics against others' of the same name: BLEU against sacrebleu, accuracy and IoU against scikit-learn."""

import copy
import pickle

import evaluate
import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, jaccard_score

from hf_bimp.metrics import Accuracy, Bleu, MeanIoU

PREDICTIONS = ["Das ist ein kleines Haus.", "Der Hund schläft im Garten.", "Sie liest ein Buch."]
REFERENCES = ["Das ist ein Haus.", "Der Hund schläft heute im Garten.", "Sie liest ein Buch."]


def test_bleu_equals_sacrebleu_and_records_its_signature():
    metric = Bleu(keep_in_memory=True)
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert isinstance(metric, evaluate.Metric)
    assert result["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert 0 < result["bleu"] < 100
    assert result["signature"].startswith("nrefs:1|") and f"version:{sacrebleu.__version__}" in result["signature"]


def test_bleu_over_batches_equals_bleu_at_once():
    metric = Bleu(keep_in_memory=True)
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score


IGNORE = -100
EXAMPLES = settings(deadline=None, derandomize=True)


@st.composite
def segmentations(draw):
    """Number of classes, predictions and references (B, H, W) with some ignored, and a split of the batch."""
    num_classes = draw(st.integers(1, 6))
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    used = draw(st.integers(1, num_classes))  # so that classes are absent
    predictions = generator.integers(0, draw(st.integers(1, num_classes)), shape)
    references = generator.integers(0, used, shape)
    references[generator.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.8]))] = IGNORE
    references.flat[0] = used - 1  # something counts
    cuts = draw(st.lists(st.integers(0, shape[0]), max_size=3))
    return num_classes, predictions, references, sorted(cuts)


@EXAMPLES
@given(segmentations())
def test_accuracy_equals_that_of_scikit_learn(data):
    _, predictions, references, _ = data
    counted = references != IGNORE
    result = Accuracy().compute(predictions=predictions, references=references)
    assert result == {"accuracy": pytest.approx(accuracy_score(references[counted], predictions[counted]))}


@EXAMPLES
@given(segmentations())
def test_mean_iou_equals_that_of_scikit_learn_over_the_classes_that_occur(data):
    num_classes, predictions, references, _ = data
    metric = MeanIoU(num_classes)
    result = metric.compute(predictions=predictions, references=references)
    counted = references != IGNORE
    truth, guess = references[counted], predictions[counted]
    labels = sorted({*truth.tolist(), *guess.tolist()})
    expected = jaccard_score(truth, guess, labels=labels, average=None)
    assert result["miou"] == pytest.approx(jaccard_score(truth, guess, labels=labels, average="macro"))
    assert result["pixel_accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert [label for label, iou in enumerate(metric.iou_per_class) if iou is not None] == labels
    assert [metric.iou_per_class[label] for label in labels] == pytest.approx(expected.tolist())
    assert all(type(value) is float for value in result.values())


@EXAMPLES
@given(segmentations())
def test_any_split_into_batches_gives_the_same(data):
    num_classes, predictions, references, cuts = data
    for metric in (Accuracy(), MeanIoU(num_classes)):
        whole = metric.compute(predictions=predictions, references=references)
        for p, r in zip(np.split(predictions, cuts), np.split(references, cuts), strict=True):
            metric.add_batch(predictions=torch.from_numpy(p), references=r.tolist() if r.size else r)
        assert metric.compute() == whole
        for p, r in zip(predictions, references, strict=True):
            metric.add(prediction=p, reference=torch.from_numpy(r))
        assert metric.compute() == whole


def both():
    return [Accuracy(), MeanIoU(3)]


@pytest.mark.parametrize("metric", both())
def test_counting_keeps_neither_predictions_nor_files(metric, tmp_path):
    metric = type(metric)(*([3] if isinstance(metric, MeanIoU) else []), cache_dir=str(tmp_path))
    before = len(pickle.dumps(metric))
    for _ in range(20):
        metric.add_batch(predictions=np.ones((4, 100, 100), int), references=np.ones((4, 100, 100), int))
    assert isinstance(metric, evaluate.Metric)
    assert len(pickle.dumps(metric)) < before + 100
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_class_only_predicted_has_iou_zero_and_an_absent_one_none():
    metric = MeanIoU(4)
    result = metric.compute(predictions=[0, 0, 2, 1], references=[0, 0, 0, 1])
    assert metric.iou_per_class == [2 / 3, 1.0, 0.0, None]
    assert result == {"miou": pytest.approx(5 / 9), "pixel_accuracy": 0.75}


def test_another_ignore_index_and_what_is_predicted_there_is_free():
    data = {"predictions": [0, 1, 255, 7], "references": [0, 0, 255, 255]}
    assert MeanIoU(2, ignore_index=255).compute(**data) == {"miou": 0.25, "pixel_accuracy": 0.5}
    assert Accuracy(ignore_index=255).compute(**data) == {"accuracy": 0.5}


@pytest.mark.parametrize("metric", both())
def test_compute_starts_afresh(metric):
    first = metric.compute(predictions=[0, 1], references=[1, 0])
    second = metric.compute(predictions=[0, 1], references=[0, 1])
    assert set(first.values()) == {0.0} and set(second.values()) == {1.0}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
@pytest.mark.parametrize("metric", both())
def test_copies_take_the_counts_along_and_then_count_for_themselves(metric, duplicate):
    metric.add_batch(predictions=[0, 1], references=[0, 1])
    other = duplicate(metric)
    other.add_batch(predictions=[2, 2], references=[1, 1])
    assert set(metric.compute().values()) == {1.0}
    assert max(other.compute().values()) == 0.5


@pytest.mark.parametrize("metric", both())
@pytest.mark.parametrize(
    "predictions, references, message",
    [
        (np.zeros((2, 3), int), np.zeros((2, 4), int), r"shape \(2, 3\) and the references \(2, 4\)"),
        (np.zeros((2, 1), int), np.zeros(2, int), "shape"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3).long(), "predictions are of type float"),
        ([0, 1], [0.5, 1.0], "references are of type float64"),
        ([0, 1], None, "There are no references"),
        ([0, 1], [IGNORE, IGNORE], "Nothing was counted"),
        ([], [], "Nothing was counted"),
        (None, None, "Nothing was counted"),
    ],
)
def test_bad_batches_raise(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([3], [0], "predictions hold class 3, and the classes are 0 to 2"),
        ([-100], [0], "predictions hold class -100"),
        ([0], [255], "references hold class 255.*ignore_index=-100"),
        ([0], [-1], "references hold class -1"),
    ],
)
def test_classes_out_of_range_raise_and_count_nothing(predictions, references, message):
    metric = MeanIoU(3)
    metric.add_batch(predictions=[1], references=[1])
    with pytest.raises(ValueError, match=message):
        metric.add_batch(predictions=[0, *predictions], references=[1, *references])
    assert metric.compute() == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="num_classes=0"):
        MeanIoU(0)
    with pytest.raises(ValueError, match="num_process=2"):
        Accuracy(num_process=2)
