"""The recipes that need no data: the Accelerate loop and both benchmarks, at small sizes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_bimp.methods import METHODS

RECIPES = Path(__file__).parent.parent / "recipes"


def run(recipe: str, *arguments: str) -> str:
    """What the recipe prints; it must succeed."""
    command = [sys.executable, str(RECIPES / recipe), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_accelerate_loop_prunes_to_the_target_and_keeps_accuracy(tmp_path):
    output = run("accelerate_loop.py", "--epochs", "8", "--num_cycles", "2", "--output_dir", str(tmp_path))
    rows = re.findall(r"(trained|pruned).*accuracy +([\d.]+)%  sparsity +([\d.]+)%", output)
    events, accuracies, sparsities = zip(*rows, strict=True)
    assert events == ("trained", "pruned", "trained", "pruned", "trained")
    assert [float(value) for value in sparsities] == pytest.approx([0, 77.64, 77.64, 95, 95], abs=0.01)
    assert float(accuracies[-1]) > float(accuracies[0]) - 5 > 80
    weights = load_file(tmp_path / "model.safetensors")
    zeros = [(weights[f"{layer}.weight"] == 0).sum().item() for layer in (0, 2, 4)]
    assert sum(zeros) == round(0.95 * (64 * 256 + 256 * 256 + 256 * 10))


def test_global_selection_prunes_the_same_weights_as_torch():
    # bfloat16 has many equal magnitudes, and the two methods choose among those at the threshold differently.
    output = run("benchmarks/global_selection.py", "--weights", "50000", "--dtype", "bfloat16", "--repeats", "1")
    count = int(re.search(r"^([\d,]+) bfloat16 weights", output, re.MULTILINE)[1].replace(",", ""))
    assert f"same weights pruned: yes, all {round(0.9 * count):,}" in output
    assert len(re.findall(r"\d s +\d+\.\d+ GB", output)) == 2
    assert len(re.findall("target met|target MISSED", output)) == 3


def test_step_overhead_measures_a_90_percent_sparse_model():
    sizes = ["--d_model", "64", "--num_layers", "1", "--vocab_size", "100", "--tokens", "8", "--batch_size", "2"]
    output = run("benchmarks/step_overhead.py", "--steps", "2", "--repeats", "2", *sizes)
    assert "90.00% pruned; 2 x 8 tokens" in output
    ratios = re.findall(r"time ratio: ([\d.]+) \(middle half of 4 steps: ([\d.]+) to ([\d.]+)\)", output)
    assert len(ratios) == 2 and all(float(low) <= float(mid) <= float(high) for mid, low, high in ratios)
    assert all(part in output for part in ("masking gradients", "masking weights", "one pruning"))


def test_method_throughput_compares_every_method_with_dense_training():
    output = run("benchmarks/method_throughput.py", "--models", "t5", "--steps", "2", "--batch_size", "1")
    lines = re.findall(r"^(\w+) +([\d.]+) +\(([\d.]+) to ([\d.]+)\) +target [\d.]+ (?:met|MISSED)$", output, re.M)
    assert [name for name, *_ in lines] == [name for name in METHODS if name != "dense"]
    assert all(0 < float(low) <= float(high) for _, _, low, high in lines)
    few = ["--methods", "dpf", "--steps", "2", "--batch_size", "2"]
    image_lines = run("benchmarks/method_throughput.py", "--models", "resnet18", *few)
    assert re.search(r"^dpf .* target 0.85", image_lines, re.M) and "one pruning, of all weights" in image_lines
