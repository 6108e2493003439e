"""Criteria: signed scores against brute force, gradients that are gathered, ones of the user's own, and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hf_bimp
from helpers import At, classifier, snapshot, sparsity
from hf_bimp import BIMPArguments, Masks
from hf_bimp.pruning.criteria import CRITERIA, DECAY
from hf_bimp.pruning.granularity import NOfMRule, WeightRule
from hf_bimp.pruning.ranking import prune_smallest
from trainers import make_trainer

SCORES = st.floats(-2, 2, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45])


@hf_bimp.register_criterion("distance to one")
def distance_to_one(weight: torch.Tensor, statistic: None) -> torch.Tensor:
    return (weight - 1).abs()


@given(
    scores=st.lists(SCORES, min_size=1, max_size=40),
    share=st.floats(0, 1),
    pruned=st.sets(st.integers(0, 39)),
    chunk=st.sampled_from([3, 1 << 18]),
)
def test_signed_scores_are_ranked_exactly(scores, share, pruned, chunk) -> None:
    count = len(scores)
    mask = torch.tensor([i in pruned for i in range(count)])
    weights = torch.arange(1.0, count + 1).masked_fill(mask, 0)
    k = max(round(share * count), int(mask.sum()))
    # Pruned before first, then by score (-0.0 equals 0.0), then by index.
    order = sorted(range(count), key=lambda i: (not mask[i], np.float32(scores[i]) + 0.0, i))
    expected = set(order[:k])
    values = torch.tensor(scores, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_bimp.pruning.ranking.CHUNK", chunk)
        selection = prune_smallest([weights], [mask], k, [values])
    assert set(mask.nonzero().flatten().tolist()) == expected
    assert selection.threshold == max((float(weights[i]) for i in expected), default=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad) -> None:
    values = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(ValueError, match="score is NaN or infinite"):
        prune_smallest([torch.ones(3)], [torch.zeros(3, dtype=torch.bool)], 1, [values])
    # What is pruned already does not count.
    mask = torch.tensor([False, True, False])
    prune_smallest([torch.ones(3)], [mask], 2, [values])
    assert mask.tolist() == [True, True, False]


def gathered(name: str, weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> torch.Tensor:
    """The statistic by its definition."""
    if name == "movement":
        return -sum(w * g for w, g in zip(weights, gradients, strict=True))
    mean = torch.zeros_like(weights[0])
    for gradient in gradients:
        mean = DECAY * mean + (1 - DECAY) * gradient
    return mean


@pytest.mark.parametrize("name", ["movement", "taylor"])
def test_gradients_are_gathered(name) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 4))
    masks = Masks({"w": parameter}, WeightRule(criterion=name))
    weights, gradients = [], []
    for _ in range(3):
        parameter.data += 0.1
        parameter.grad = torch.randn(3, 4)
        weights.append(parameter.detach().clone()), gradients.append(parameter.grad.clone())
        masks.observe(masks.weights)
    statistic = gathered(name, weights, gradients)
    torch.testing.assert_close(masks.statistics["w"], statistic)
    scores = statistic if name == "movement" else (weights[-1] * statistic).abs()
    masks.prune(0.5)
    assert set(masks.pruned["w"].flatten().nonzero().flatten().tolist()) == set(
        scores.flatten().argsort()[:6].tolist()
    )


def test_one_of_ones_own_decides_in_a_run(tmp_path) -> None:
    before: dict[str, torch.Tensor] = {}
    trainer = make_trainer(tmp_path, num_cycles=1, criterion="distance to one")
    trainer.add_callback(At("on_step_end", lambda model, step: step == 6 and before.update(snapshot(model))))
    trainer.train()
    weights = trainer.method.masks.weights
    scores = torch.cat([(before[name] - 1).abs().flatten() for name in weights])
    mask = torch.cat([trainer.method.masks.pruned[name].flatten() for name in weights])
    assert scores[mask].max() <= scores[~mask].min()
    assert trainer.results["criterion"] == "distance to one"


@pytest.mark.parametrize("name", ["movement", "taylor"])
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_gradient_criteria_resume_bit_for_bit(tmp_path, name, granularity) -> None:
    settings = {"criterion": name, "granularity": granularity, "save_strategy": "steps", "save_steps": 3}
    settings |= {
        "target_sparsity": None if granularity == "2:4" else 0.8,
        "num_cycles": 1 if granularity == "2:4" else 2,
    }
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert whole.method.masks.statistics.keys() == whole.method.masks.weights.keys()
    assert sparsity(whole.model) == pytest.approx(0.5 if granularity == "2:4" else 0.8, abs=3e-3)


def test_a_statistic_that_is_missing_makes_the_checkpoint_incomplete(tmp_path) -> None:
    make_trainer(tmp_path, criterion="movement", save_strategy="steps", save_steps=3).train()
    (tmp_path / "checkpoint-3" / "bimp_statistics.safetensors").unlink()
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(tmp_path, criterion="movement").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_n_of_m_goes_by_scores_too() -> None:
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    masks = Masks({"w": weight}, NOfMRule(2, 4, {"w": 1}, "movement"))
    weight.grad = torch.tensor([[1.0, -1.0, 1.0, -1.0]])  # scores -4, 3, -2, 1
    masks.observe(masks.weights)
    masks.prune(0.5)
    assert masks.pruned["w"].tolist() == [[True, False, True, False]]


# ---- Refused ----


def test_a_name_is_taken_once() -> None:
    hf_bimp.register_criterion("distance to one")(distance_to_one)  # the same again, as where a module is reloaded
    with pytest.raises(ValueError, match="already"):
        hf_bimp.register_criterion("magnitude")(lambda weight, statistic: weight)
    assert CRITERIA["magnitude"].score.__module__ == "hf_bimp.pruning.criteria"


def test_scores_of_another_shape_are_refused() -> None:
    CRITERIA["short"] = hf_bimp.pruning.criteria.Criterion("short", lambda weight, statistic: weight[:1])
    try:
        with pytest.raises(ValueError, match="criterion='short' gives \\(1, 3\\).*one float for each weight"):
            Masks({"w": nn.Parameter(torch.ones(2, 3))}, WeightRule(criterion="short")).prune(0.5)
    finally:
        del CRITERIA["short"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"criterion": "wanda"}, "'wanda' is none of magnitude.*register_criterion"),
        ({"criterion": "movement", "granularity": "filter"}, "ranks single weights"),
        ({"criterion": "random", "method": "lc", "weight_decay": 0.1}, "criterion='random' does not go with"),
        ({"criterion": "magnitude", "method": "movement"}, "allowed: movement"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, given, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        BIMPArguments(output_dir=str(tmp_path), use_cpu=True, **{"target_sparsity": 0.5} | given)


def test_pruning_before_any_gradient_is_refused_before_training(tmp_path) -> None:
    with pytest.raises(ValueError, match="goes by gradients, and the plan prunes before the first step"):
        make_trainer(tmp_path, criterion="movement", dense_ratio=0.0).train()


def test_a_frozen_layer_has_no_gradients(tmp_path) -> None:
    model = classifier()
    model.first.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="none yet of first.weight.*skip_modules"):
        make_trainer(tmp_path, model, criterion="movement").train()
