"""The recipes that need no data: the Accelerate loop and both benchmarks, at small sizes."""

import re

import pytest
from safetensors.torch import load_file

from method_table import SHORT
from processes import output_of_recipe


def test_accelerate_loop_prunes_to_the_target_and_keeps_accuracy(tmp_path):
    output = output_of_recipe(
        "accelerate_loop.py", "--epochs", "8", "--num_cycles", "2", "--output_dir", str(tmp_path)
    )
    rows = re.findall(r"(trained|pruned).*accuracy +([\d.]+)%  sparsity +([\d.]+)%", output)
    events, accuracies, sparsities = zip(*rows, strict=True)
    assert events == ("trained", "pruned", "trained", "pruned", "trained")
    assert [float(value) for value in sparsities] == pytest.approx([0, 77.64, 77.64, 95, 95], abs=0.01)
    assert float(accuracies[-1]) > float(accuracies[0]) - 5 > 80
    weights = load_file(tmp_path / "model.safetensors")
    zeros = [(weights[f"{layer}.weight"] == 0).sum().item() for layer in (0, 2, 4)]
    assert sum(zeros) == round(0.95 * (64 * 256 + 256 * 256 + 256 * 10))


@pytest.mark.slow
def test_global_selection_prunes_the_same_weights_as_torch():
    # bfloat16 has many equal magnitudes, and the two methods choose among those at the threshold differently.
    output = output_of_recipe(
        "benchmarks/global_selection.py", "--weights", "50000", "--dtype", "bfloat16", "--repeats", "1"
    )
    count = int(re.search(r"^([\d,]+) bfloat16 weights", output, re.MULTILINE)[1].replace(",", ""))
    assert f"same weights pruned: yes, all {round(0.9 * count):,}" in output
    assert len(re.findall(r"\d s +\d+\.\d+ GB", output)) == 3
    assert len(re.findall(r"\((?:target met|target MISSED)", output)) == 5


def test_step_overhead_measures_every_run():
    sizes = ["--d_model", "64", "--num_layers", "1", "--vocab_size", "100", "--tokens", "8", "--batch_size", "2"]
    output = output_of_recipe("benchmarks/step_overhead.py", "--steps", "2", "--repeats", "2", *sizes)
    assert "90.00% pruned; 2 x 8 tokens" in output and "90.00% pruned; 2 x 2 tokens" in output
    ratios = re.findall(r"time ratio: ([\d.]+) \(middle half of 4 steps: ([\d.]+) to ([\d.]+)\)", output)
    assert len(ratios) == 8 and all(float(low) <= float(mid) <= float(high) for mid, low, high in ratios)
    assert all(output.count(part) == 4 for part in ("masking gradients", "masking weights", "one pruning"))
    table = re.findall(r"^(\S+) +2 x [28] +([\d.]+)% +[\d.]+ +[\d.]+$", output, re.M)
    assert [name for name, _ in table] == ["weights", "small", "n:m", "filters"]
    assert table[2][1] == "50.00" and 85 < float(table[3][1]) < 95


@pytest.mark.slow
def test_export_latency_tells_every_runtime():
    output = output_of_recipe(
        "benchmarks/export_latency.py", "--model", "cifar_resnet20", "--batch_size", "2", "--size", "16"
    )
    rows = re.findall(r"^\| ([\w ]+) \| [\d.]+ ms \| ([\d.]+) \| ([\d.]+) MB \|$", output, re.MULTILINE)
    assert [name for name, *_ in rows] == ["dense torch", "shrunk torch", "ONNX Runtime", "OpenVINO", "OpenVINO int8"]
    assert float(rows[0][2]) > 3 * float(rows[1][2])


def throughputs(*arguments: str) -> list[str]:
    """The methods whose throughput is told."""
    output = output_of_recipe("benchmarks/method_throughput.py", "--steps", "2", *arguments)
    lines = re.findall(r"^(\w+) +([\d.]+) +\(([\d.]+) to ([\d.]+)\) +target [\d.]+ (?:met|MISSED)$", output, re.M)
    assert all(0 < float(low) <= float(high) for _, _, low, high in lines)
    assert "one pruning, of all weights" in output
    return [name for name, *_ in lines]


def test_method_throughput_compares_a_method_with_dense_training():
    methods = ["bimp", "str"]
    assert throughputs("--models", "t5", "--batch_size", "1", "--methods", *methods) == methods


@pytest.mark.slow
def test_method_throughput_compares_every_method_on_both_models():
    assert throughputs("--models", "t5", "--batch_size", "1") == list(SHORT)
    assert throughputs("--models", "resnet18", "--batch_size", "2", "--methods", "dpf") == ["dpf"]
