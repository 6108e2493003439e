"""What the end of a run says of the zeros: the size that `compress` gives, a measured speed, or why there is none."""

import json

import pytest
import torch
from torch import nn

import hf_bimp
from helpers import classification_items, classifier, snapshot, tiny_t5, translation_items
from hf_bimp.deployment import compact
from hf_bimp.deployment.savings import compressed_bytes, measure_savings
from shrinkable import images, make
from trainers import make_trainer


def trained(tmp_path, *args, **changes):
    trainer = make_trainer(tmp_path, *args, measure_deployment=True, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["classifier", "t5"])
def test_a_run_ends_with_what_its_zeros_save(tmp_path, capsys, name) -> None:
    data = {"classifier": (classifier(), classification_items()), "t5": (tiny_t5(), translation_items())}
    trainer = trained(tmp_path, *data[name], save_strategy="steps", save_steps=12)
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    size, speed = results["deployment"]["size"], results["throughput"]["inference"]
    assert speed["means"] == "accelerate" and speed["speedup"] >= 1.0 and speed["threads"] >= 1
    assert size["compressed_bytes"] < size["dense_bytes"]
    report = hf_bimp.compress(trainer.model.eval(), tmp_path / "compressed")
    header = report.compressed_bytes - size["compressed_bytes"]
    assert 0 < header < 300 * report.tensors  # of the safetensors file
    assert report.dense_bytes == size["dense_bytes"]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for told in (capsys.readouterr().out, card):
        assert "Compressed (`hf_bimp.compress`), the weights take" in told and "`hf_bimp.accelerate`" in told
    measured = [entry for entry in trainer.state.log_history if "measured_speedup" in entry]
    assert measured[0]["size_compressed"] == size["compressed_bytes"]


@pytest.mark.parametrize("changes", [
    {"measure_deployment": False},
    {"method": "dense", "num_cycles": None, "target_sparsity": None},
])  # fmt: skip
def test_nothing_is_measured_where_nobody_wants_it(tmp_path, changes) -> None:
    trainer = make_trainer(tmp_path, **({"measure_deployment": True} | changes))
    trainer.train()
    assert "deployment" not in trainer.results


def test_nor_of_a_model_that_is_too_large(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hf_bimp.trainer.finishing.MOST_WEIGHTS", 10)
    assert "deployment" not in trained(tmp_path).results


def test_measuring_changes_neither_the_model_nor_what_is_drawn_next(tmp_path) -> None:
    ends = []
    for measured in (True, False):
        trainer = make_trainer(
            tmp_path / str(measured), classifier(dropout=0.3), measure_deployment=measured,
            eval_dataset=classification_items(9, seed=2),
        )  # fmt: skip
        trainer.train()
        ends.append((snapshot(trainer.model), torch.rand(3), trainer.results["final"]["loss"]))
        assert trainer.model.training
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    assert torch.equal(ends[0][1], ends[1][1]) and ends[0][2] == ends[1][2]


def test_whole_filters_are_shrunk() -> None:
    model, example = make("cifar_resnet20"), images(16)(0)
    masks, _ = hf_bimp.make_masks(model, lambda: example, granularity="filter")
    masks.prune(0.5)
    savings = measure_savings(model.train(), example, whole_filters=True)
    small = hf_bimp.shrink(model, example)
    size, speed = savings.size, savings.speed
    assert size.is_shrunk and speed.means == "shrink" and speed.speedup > 0 and speed.reason == ""
    assert size.compressed_bytes == compressed_bytes(small)
    assert size.compressed_bytes <= sum(t.nbytes for t in small.state_dict().values()) < size.dense_bytes
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("change", "example", "reason"), [
    (lambda model: model.bfloat16(), torch.ones(2, 8), "bfloat16"),
    (lambda model: model, None, "does not take the first training items"),
    (lambda model: model, torch.ones(2, 5), "does not take the example_inputs"),
])  # fmt: skip
def test_a_speed_that_is_not_measured_has_a_reason(change, example, reason) -> None:
    model = change(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)))
    savings = measure_savings(model, example)
    assert savings.speed.speedup is None and reason in savings.speed.reason
    assert savings.size.compressed_bytes <= savings.size.dense_bytes == sum(p.nbytes for p in model.parameters())


def test_a_card_that_is_written_later_keeps_what_an_export_has_added(tmp_path) -> None:
    trainer = trained(tmp_path)
    path = tmp_path / "bimp_results.json"
    results = json.loads(path.read_text())
    results["deployment"]["size"]["compressed_bytes"] = 654_321_000
    path.write_text(json.dumps(results))
    trainer.create_model_card()
    assert "654.32 MB" in (tmp_path / "README.md").read_text()


def test_a_failure_does_not_end_the_run(tmp_path, monkeypatch, caplog) -> None:
    def fail(*args: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr("hf_bimp.trainer.finishing.measure_savings", fail)
    trainer = trained(tmp_path, save_strategy="steps", save_steps=12)
    assert "Measuring what the zeros save failed" in caplog.text
    assert trainer.results["sparsity"]["prunable"] > 0.79 and (tmp_path / "model.safetensors").is_file()


def test_sizes_without_zstd(monkeypatch) -> None:
    def missing() -> None:
        raise ImportError

    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight.masked_fill_(torch.rand(64, 64) < 0.9, 0.0)
    with_zstd = compressed_bytes(model)
    monkeypatch.setattr(compact, "zstandard", missing)
    assert measure_savings(model, None).size.compression is None
    assert with_zstd <= compressed_bytes(model) < 0.2 * 64 * 64 * 4


def test_two_runs_have_the_same_results_but_for_what_a_clock_decides(tmp_path) -> None:
    one, other = (trained(tmp_path / name).results for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name != "throughput")
