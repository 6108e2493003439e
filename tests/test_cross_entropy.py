"""Cross-entropy by its definition, and the labels that it is not for."""

import pytest
import torch
from torch import nn

from hf_bimp import CrossEntropy


@pytest.mark.parametrize(
    "logits, labels, complaint",
    [
        ((4, 3), [0.5, 1.0, 0.0, 2.0], "class numbers, not labels of torch.float32.*compute_loss_func"),
        ((4, 3), [0, 1, 2, 3], "Label 3 is none of the model's classes, 0 to 2"),
        ((4, 3), [0, 1, 2, -1], "Label -1 is none"),
        ((4, 3), [[0, 1, 1]] * 4, r"not logits \(4, 3\), labels \(4, 3\).*compute_loss_func"),  # several at once
        ((4, 3), [0, 1, 2], r"labels \(3,\)"),
        ((4, 1), [0, 1, 0, 1], "single output.*compute_loss_func"),
        ((4,), [0, 1, 0, 1], r"logits \(4,\)"),
        ((1, 4, 6, 3), [[[0] * 6] * 4], r"not logits \(1, 4, 6, 3\)"),  # classes come second
        ((1, 3, 6), [[0] * 6], r"not logits \(1, 3, 6\)"),  # and with tokens last
    ],
)
def test_labels_that_do_not_fit_are_refused(logits, labels, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        CrossEntropy()(torch.zeros(logits), torch.tensor(labels))


@pytest.mark.parametrize("shape, labels_shape", [((6, 5), (6,)), ((2, 3, 5), (2, 3)), ((2, 5, 4, 4), (2, 8, 8))])
def test_it_is_the_mean_over_the_labels_that_count(shape, labels_shape) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, labels = torch.randn(shape, generator=generator), torch.randint(0, 5, labels_shape, generator=generator)
    labels.view(-1)[::3] = -100
    is_image = len(shape) == 4
    rows = nn.functional.interpolate(outputs, size=(8, 8), mode="bilinear").movedim(1, 3) if is_image else outputs
    scores = rows.log_softmax(-1)[labels != -100]
    expected = -scores.gather(1, labels[labels != -100][:, None]).mean()
    torch.testing.assert_close(CrossEntropy()({"out": outputs}, labels), expected)
    count = labels.ne(-100).sum()
    torch.testing.assert_close(CrossEntropy()(outputs, labels, num_items_in_batch=2 * count), expected / 2)
