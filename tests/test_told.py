"""What plan, results, card and warnings say is so: frozen and sparse models, patterns, filters, origins."""

import json
import re

import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from helpers import classification_items, classifier, matrices, sparsity, tiny_t5, translation_items
from hf_bimp import make_masks
from hf_bimp.reporting.plots import write_layer_plot
from trainers import make_trainer

# ---- Frozen weights ----


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("cs", {"cs_initial_mask": -0.1}),
        ("dst", {"dst_penalty": 5e-4}),
        ("str", {"weight_decay": 0.1}),
    ],
)
def test_methods_that_learn_what_goes_leave_frozen_weights_alone(tmp_path, capsys, method, settings) -> None:
    model = classifier()
    model.first.requires_grad_(False)
    before = model.first.weight.clone()
    trainer = make_trainer(
        tmp_path, model, method=method, target_sparsity=None, num_cycles=None, max_steps=40, **settings
    )
    trainer.train()
    assert torch.equal(model.first.weight, before)
    assert list(trainer.results["sparsity"]["per_layer"]) == ["last.weight"]
    assert "frozen" in trainer.results["stays_dense"]["first.weight"]
    assert "first.weight (it is frozen" in capsys.readouterr().out


def test_a_wholly_frozen_model_has_nothing_to_learn(tmp_path) -> None:
    model = classifier().requires_grad_(False)
    model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match="no prunable weight that is trained"):
        make_trainer(tmp_path, model, method="dst", target_sparsity=None, num_cycles=None).train()


@pytest.mark.parametrize("method", ["bimp", "gmp", "dnw", "lc", "dpf"])
def test_the_other_methods_prune_frozen_weights_like_any(tmp_path, method) -> None:
    model = classifier()
    model.first.requires_grad_(False)
    extra = {} if method == "bimp" else {"num_cycles": None, "weight_decay": 0.1}
    extra |= {"num_prunings": 3} if method in ("gmp", "dpf") else {}
    make_trainer(tmp_path, model, method=method, **extra).train()
    assert sum(int((w == 0).sum()) for w in matrices(model).values()) == round(0.8 * 192)


# ---- A sparse model that is given without keep_zeros ----


def sparse_classifier() -> nn.Module:
    model = classifier()
    with torch.no_grad():
        for weight in matrices(model).values():
            weight.masked_fill_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.8, 0)
    return model


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("bimp", "Without keep_zeros=True they may grow back"),
        ("dense", "method='dense' does not hold them.*keep_zeros=True and num_cycles=0"),
        ("gmp", "method='gmp' does not hold them"),
        ("dnw", "method='dnw' does not hold them"),
        ("str", "method='str' does not hold them"),
        ("rigl", "method='rigl' does not hold them"),
    ],
)
def test_every_method_warns_of_a_sparse_model_that_it_makes_dense(tmp_path, caplog, method, remedy) -> None:
    changes: dict = {} if method == "bimp" else {"num_cycles": None}
    changes |= {"target_sparsity": None, "weight_decay": 0.1} if method in ("dense", "str") else {}
    changes |= {"num_prunings": 3} if method == "gmp" else {}
    changes |= {"target_sparsity": 0.9} if method in ("bimp", "gmp", "dnw", "rigl") else {}
    make_trainer(tmp_path, sparse_classifier(), method=method, **changes).train()
    found = [record for record in caplog.records if "are zero already" in record.message]
    assert len(found) == 1 and found[0].levelname == "WARNING" and found[0].name.startswith("hf_bimp")
    assert re.search(remedy, found[0].message)


def test_zeros_that_are_kept_are_no_reason_to_warn(tmp_path, caplog) -> None:
    model = sparse_classifier()
    kept = sparsity(model)
    make_trainer(tmp_path, model, keep_zeros=True, num_cycles=0).train()
    assert "are zero already" not in caplog.text and sparsity(model) >= kept


# ---- Plans ----


def test_the_plan_of_n_of_m_holds_what_the_rule_does(tmp_path, capsys) -> None:
    trainer = make_trainer(tmp_path, granularity="2:4", target_sparsity=None, num_cycles=2)
    trainer.train()
    assert trainer.plan.sparsities == (0.25, 0.5)
    assert [record["sparsity"] for record in trainer.results["prunings"]] == [0.25, 0.5]
    assert trainer.results["plan"]["sparsities"] == [0.25, 0.5]
    printed = capsys.readouterr().out
    assert "25.00%" in printed and "29.29%" not in printed


@pytest.mark.parametrize("granularity", ["1:4", "3:4", "2:8"])
@pytest.mark.parametrize("cycles", [1, 3])
def test_other_patterns_reach_their_plan(tmp_path, granularity, cycles) -> None:
    class Chain(nn.Sequential):
        def forward(self, x, labels):
            logits = super().forward(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = Chain(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4))
    trainer = make_trainer(tmp_path, model, granularity=granularity, num_cycles=cycles, target_sparsity=None)
    trainer.train()
    reached = [record["sparsity"] for record in trainer.results["prunings"]]
    assert list(trainer.plan.sparsities) == pytest.approx(reached, abs=1e-12)


def test_kept_zeros_count_in_the_plan_of_n_of_m() -> None:
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, 17).view(2, 8))
        layer.weight[0, :3] = 0  # one more than 2 of 4 take
    masks, _ = make_masks(nn.Sequential(layer), lambda: None, "2:4")
    masks.keep_zeros()
    assert masks.planned([0.25, 0.5]) == [6 / 16, 9 / 16]
    assert masks.prune(0.5).norm > 0 and masks.sparsity == 9 / 16


# ---- Results and cards ----


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_metrics_of_a_model_that_came_sparse_are_not_called_dense(tmp_path) -> None:
    data = {"eval_dataset": classification_items(16), "compute_metrics": accuracy}
    for changes in ({"num_cycles": 0}, {"num_cycles": 1, "target_sparsity": 0.9}):
        trainer = make_trainer(tmp_path, sparse_classifier(), keep_zeros=True, **changes, **data)
        trainer.train()
        assert trainer.results["dense"] == {} and "accuracy" in trainer.results["final"]
        trainer.create_model_card()
        assert "| metric | dense |" not in (tmp_path / "README.md").read_text()


def test_a_filter_card_says_what_counts_and_what_stays_dense(tmp_path) -> None:
    class Chain(nn.Sequential):
        def forward(self, x, labels):
            logits = super().forward(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    model = Chain(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    trainer = make_trainer(tmp_path, model, granularity="filter", target_sparsity=0.5, num_cycles=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "**50.00% of the prunable weights** (192 of the 288 of linear and convolution layers" in card
    assert "| 2.weight | its filters are the model's outputs |" in card
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert results["stays_dense"] == {"2.weight": "its filters are the model's outputs"}
    assert (results["sparsity"]["num_prunable"], results["sparsity"]["num_in_layers"]) == (192, 288)


def test_a_layer_tied_to_an_embedding_is_an_embedding_to_the_card(tmp_path) -> None:
    model = tiny_t5()
    trainer = make_trainer(tmp_path, model, translation_items())
    trainer.train()
    count = sum(weight.numel() for weight in matrices(model).values())
    assert (trainer.results["sparsity"]["num_prunable"], trainer.results["sparsity"]["num_in_layers"]) == (
        count,
        count,
    )
    trainer.create_model_card()
    assert f"(all {count:,} of linear and convolution layers)" in (tmp_path / "README.md").read_text()


def test_every_matrix_that_stays_dense_has_its_reason(tmp_path) -> None:
    model = tiny_t5()
    model.extra = nn.Bilinear(2, 2, 2)
    trainer = make_trainer(tmp_path, model, translation_items(), skip_modules=["SelfAttention.q"])
    trainer.train()
    reasons = trainer.results["stays_dense"]
    assert reasons["extra.weight"] == "Bilinear is no linear or convolution layer"
    assert reasons["encoder.block.0.layer.0.SelfAttention.q.weight"] == "skip_modules leaves it out"
    assert all(reasons.values())


@pytest.mark.parametrize("path", ["folder", "relative"])
def test_a_local_folder_is_no_base_model_though_it_is_gone(tmp_path, monkeypatch, path) -> None:
    monkeypatch.chdir(tmp_path)
    where = str(tmp_path / "dense") if path == "folder" else "models/dense"  # which reads like an id of the Hub
    tiny_t5().save_pretrained(where)
    model = T5ForConditionalGeneration.from_pretrained(where)
    for file in (tmp_path / ("dense" if path == "folder" else where)).iterdir():
        file.unlink()
    (tmp_path / ("dense" if path == "folder" else where)).rmdir()
    trainer = make_trainer(tmp_path / "out", model, translation_items())
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card and where not in card.replace(str(tmp_path / "out"), "")
    model.config._commit_hash, model.config.name_or_path = "0" * 40, "org/dense"
    trainer.create_model_card()
    assert "base_model: org/dense" in (tmp_path / "out" / "README.md").read_text()


def test_what_comes_from_outside_is_plain_text_in_the_card(tmp_path) -> None:
    name = "a|b\n# pwn <script>alert(1)</script>"
    model = classifier()
    model.add_module("x|y<img src=x onerror=alert(1)>", nn.Linear(4, 4))
    trainer = make_trainer(
        tmp_path, model, eval_dataset=classification_items(16), compute_metrics=lambda prediction: {name: 0.5}
    )
    trainer.train()
    trainer.create_model_card(model_name="n\n---\n<script>")
    card = (tmp_path / "README.md").read_text()
    body = card[card.index("\n# ") :]  # what precedes is YAML, written by huggingface_hub
    assert "<script>" not in body.replace("\\<script\\>", "") and "<img" not in body.replace("\\<img", "")
    assert "\n# pwn" not in body and "\n# n --- \\<script\\>\n" in body
    rows = [line for line in body.splitlines() if line.startswith("|") and "pwn" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4) for row in rows)


def test_no_file_holds_the_token_of_the_hub(tmp_path) -> None:
    trainer = make_trainer(tmp_path, hub_token="hf_secret", save_strategy="steps", save_steps=6)
    trainer.train()
    assert trainer.args.hub_token == "hf_secret"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


@pytest.mark.parametrize("number", [100, 3000])
def test_the_picture_of_the_layers_has_bars_for_some_of_very_many(tmp_path, monkeypatch, number) -> None:
    from matplotlib.axes import Axes

    drawn, barh = [], Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda axis, names, *rest, **more: drawn.append(names) or barh(axis, names, *rest)
    )
    layers = {f"layer.{i}": (i * 37 % number) / number for i in range(number)}
    write_layer_plot(str(tmp_path), {"sparsity": {"per_layer": layers, "prunable": 0.5}})
    assert len(drawn[0]) == min(number, 120) and [*tmp_path.iterdir()] == [tmp_path / "bimp_layers.png"]
    assert {min(layers, key=layers.get), max(layers, key=layers.get)} <= set(drawn[0])
