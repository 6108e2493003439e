"""Exports: the outputs of torch at any size, int8 with its metrics, what is told of it, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers.utils import logging

import hf_bimp
from helpers import VOCABULARY, tiny_t5
from hf_bimp import find_prunable
from hf_bimp.deployment.inputs import Batches, read_example
from hf_bimp.deployment.latency import measure
from hf_bimp.deployment.onnx_export import difference
from hf_bimp.pruning.structured.groups import find_filter_groups
from processes import output_of
from shrinkable import MODELS, images, make, t5, tokens, zero_half

MAPS = images(4)


def shrunk(name: str) -> nn.Module:
    model = make(name)
    groups, _ = find_filter_groups(model, MODELS[name][1](0), find_prunable(model).weights)
    zero_half(model, groups)
    return hf_bimp.shrink(model, MODELS[name][1](0))


def in_onnx(folder: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(o) for o in session.run(None, {name: value.numpy() for name, value in inputs.items()})]


def in_openvino(path: Path, value: Tensor) -> Tensor:
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model(value.numpy())[0])


def accuracy(evaluated) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


def assert_close(have: Tensor, want: Tensor) -> None:
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_a_shrunk_model_as_onnx_takes_any_batch_and_is_left_alone(tmp_path: Path) -> None:
    model, folder = shrunk("concat"), tmp_path / "new" / "onnx"
    model.left.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    report = hf_bimp.export(model, folder, MAPS(0)[:1])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert attributes == {name: dict(vars(module)) for name, module in model.named_modules()}
    for rows in (1, 2, 5):
        value = torch.randn(rows, 3, 4, 4)
        assert_close(in_onnx(folder, {"x": value})[0], model(value).detach())
    assert report.inputs == {"x": ["batch", 3, 4, 4]} and report.fixed == {} and report.max_difference < 1e-5
    assert [row.name for row in report.latency] == ["torch", "ONNX Runtime"] and report.latency[0].speedup == 1
    assert report.files == {"model.onnx": (folder / "model.onnx").stat().st_size}
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and list(report.files) == ["model.onnx"]
    assert sys.prefix.encode() not in (folder / "model.onnx").read_bytes()  # nothing of this machine


def test_t5_takes_any_lengths_with_labels_for_the_decoder(tmp_path: Path) -> None:
    model = tiny_t5().eval()
    config, example = model.config.to_dict(), {name: value % VOCABULARY for name, value in tokens(0).items()}
    report = hf_bimp.export(model, tmp_path, example)
    assert model.config.to_dict() == config and model.config.use_cache
    assert report.inputs == {"input_ids": ["batch", "length"], "decoder_input_ids": ["batch", "decoder_length"]}
    for rows, length, decoder_length in ((1, 1, 1), (4, 3, 11), (2, 12, 2)):
        inputs = {
            "input_ids": torch.randint(2, VOCABULARY, (rows, length)),
            "decoder_input_ids": torch.randint(2, VOCABULARY, (rows, decoder_length)),
        }
        with torch.no_grad():
            want = model(**inputs)
        logits, encoded = in_onnx(tmp_path, inputs)
        assert_close(logits, want.logits)
        assert_close(encoded, want.encoder_last_hidden_state)


def test_int8_with_metrics_table_results_and_card(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    model = shrunk("concat")
    (tmp_path / "bimp_results.json").write_text(json.dumps({"final": {"loss": 1}, "deployment": {"other": 1}}))
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n# A\n\n## Deployment\n\nOld.\n\n## Training\n\nRows.\n")
    inputs, labels = torch.cat([MAPS(seed) for seed in range(20)]), torch.arange(40) % 3
    data = DataLoader(TensorDataset(inputs, labels), batch_size=7)
    logging.disable_progress_bar()
    try:
        report = hf_bimp.export(
            model,
            tmp_path,
            (inputs[:4],),
            "openvino",
            data,
            dense_model=make("concat"),
            eval_dataset=data,
            compute_metrics=accuracy,
        )
    finally:
        logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")
    assert set(report.files) == {f"openvino_model{kind}.{end}" for kind in ("", "_int8") for end in ("xml", "bin")}
    assert report.files["openvino_model_int8.bin"] < 0.5 * report.files["openvino_model.bin"]
    with torch.no_grad():
        want = model(inputs)
    assert_close(in_openvino(tmp_path / "openvino_model.xml", inputs), want)
    quantized = in_openvino(tmp_path / "openvino_model_int8.xml", inputs)
    assert 1e-5 < difference([want], [quantized]) < 0.1 and 0 < report.int8_difference < 0.1
    for metrics, outputs in ((report.metrics_before, want), (report.metrics_after, quantized)):
        assert metrics == {"accuracy": pytest.approx((outputs.argmax(1) == labels).float().mean().item())}
    names = ["dense torch", "shrunk torch", "ONNX Runtime", "OpenVINO", "OpenVINO int8"]
    assert [row.name for row in report.latency] == names and report.threads == torch.get_num_threads()
    assert report.latency[0].bytes > report.latency[1].bytes > 0
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert results["final"] == {"loss": 1} and results["deployment"]["other"] == 1
    assert [row["name"] for row in results["deployment"]["latency"]] == names
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and card.count("## Deployment") == 1 and "Old." not in card
    assert report.markdown() in card and card.index(report.markdown()) < card.index("## Training\n\nRows.")
    assert all(f"| {name} |" in card for name in (*names, "accuracy"))


class Viewed(nn.Linear):
    """Takes batches of two alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(2, -1)


class Looped(nn.Linear):
    """Takes any batch, which no exporter can know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(Looped, self).forward(row) * i for i, row in enumerate(x)])


class WholeLength(nn.Embedding):
    """Takes any batch, and texts of seven tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).view(len(ids), 7 * self.embedding_dim)


@pytest.mark.parametrize("kind", [Viewed, Looped])
def test_a_batch_that_cannot_be_dynamic_is_told(kind: type, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = kind(4, 3).eval()
    report = hf_bimp.export(model, tmp_path, torch.randn(2, 4))
    assert f"takes a single batch: {report.fixed['batch']}" in caplog.text
    assert list(report.fixed) == ["batch"] and report.inputs == {"x": [2, 4]}
    assert "batch" in report.markdown() and report.fixed["batch"][:20] in report.markdown()
    value = torch.randn(2, 4)
    assert_close(in_onnx(tmp_path, {"x": value})[0], model(value).detach())


def test_a_length_that_cannot_be_dynamic_leaves_the_batch_dynamic(tmp_path: Path) -> None:
    report = hf_bimp.export(WholeLength(50, 3).eval(), tmp_path, torch.randint(50, (1, 7)))
    assert list(report.fixed) == ["length"] and report.inputs == {"ids": ["batch", 7]}
    assert in_onnx(tmp_path, {"ids": torch.randint(50, (5, 7))})[0].shape == (5, 21)


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(3)


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(("kind", "complaint"), [(Noisy, "put out different things"), (Branching, "cannot export")])
def test_failure_leaves_the_folder_as_it_was(kind: type, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("the last one")
    with pytest.raises(RuntimeError, match=complaint):
        hf_bimp.export(kind(4, 3).eval(), tmp_path, torch.randn(2, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "the last one"


def test_an_older_export_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("openvino_model_int8.xml", "openvino_model_int8.bin", "openvino_model.bin", "model.onnx", "kept"):
        (tmp_path / name).write_text("old")
    hf_bimp.export(nn.Linear(4, 3).eval(), tmp_path, torch.randn(2, 4), "openvino")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"openvino_model.xml", "openvino_model.bin", "model.onnx", "kept"}
    assert (tmp_path / "openvino_model.bin").read_bytes() != b"old"


def training_inside() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    model[1].train()
    return model


def with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"])).eval()


X = torch.zeros(2, 4)
REFUSED = {
    "training": (dict(model=nn.Linear(4, 3)), r"model.eval\(\)"),
    "a part in training": (dict(model=training_inside()), "its 1 is in training"),
    "dense model in training": (dict(dense_model=nn.Linear(4, 3)), r"dense_model.eval\(\)"),
    "dense model of other inputs": (dict(dense_model=nn.Linear(5, 3).eval()), "does not take the example_inputs"),
    "adapters": (dict(model=with_lora), "adapters"),
    "no model": (dict(model="out"), "must be an nn.Module"),
    "format": (dict(format="tflite"), "'onnx', 'openvino'"),
    "int8 as onnx": (dict(int8_calibration=[X], format="onnx"), "format='openvino'"),
    "nothing to calibrate on": (dict(int8_calibration=[]), "int8_calibration is empty"),
    "one batch": (dict(int8_calibration={"x": X}), r"\[batch\]"),
    "calibration without the input": (dict(int8_calibration=[{"a": X, "b": X}]), "input is missing"),
    "calibration of another shape": (dict(int8_calibration=[torch.zeros(2, 5)]), r"\(2, 5\).*\(batch, 4\)"),
    "calibration of no tensors": (dict(int8_calibration=[{"input": object()}]), "no tensor"),
    "inputs of another shape": (dict(example_inputs=torch.zeros(2, 5)), "does not take the example_inputs"),
    "nested inputs": (dict(example_inputs={"input": [X]}), "input is a list"),
    "no inputs": (dict(example_inputs={}), "no tensor"),
    "metrics of nothing": (dict(compute_metrics=accuracy), "eval_dataset is missing"),
    "no metrics": (dict(eval_dataset=[(X, X)]), "compute_metrics is missing"),
    "no labels": (dict(eval_dataset=[X], compute_metrics=accuracy), "has no labels"),
    "nothing to evaluate": (dict(eval_dataset=[], compute_metrics=accuracy), "eval_dataset is empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    changes, complaint = REFUSED[what]
    arguments = {"model": nn.Linear(4, 3).eval(), "example_inputs": X, "format": "openvino", **changes}
    if not isinstance(arguments["model"], (nn.Module, str)):
        arguments["model"] = arguments["model"]()
    with pytest.raises(ValueError, match=complaint):
        hf_bimp.export(directory=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_or_has_damaged_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(ValueError, match="is a file"):
            hf_bimp.export(nn.Linear(4, 3).eval(), folder, X)
    (tmp_path / "bimp_results.json").write_text("{")
    with pytest.raises(ValueError, match="bimp_results.json is no JSON"):
        hf_bimp.export(nn.Linear(4, 3).eval(), tmp_path, X)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime", "openvino", "nncf"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}\..*hf_bimp\[deploy\]"):
        hf_bimp.export(nn.Linear(4, 3).eval(), tmp_path / "out", X, "openvino", [X])
    assert list(tmp_path.iterdir()) == []


class Items(Dataset):
    """Single items without `__iter__`, as PyTorch's data sets are; one ends with no IndexError."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"pixels": np.full((4,), index, np.float64), "label": index % 3}


def test_data_come_in_any_form() -> None:
    model = nn.Linear(4, 3)
    example = read_example(model, torch.zeros(2, 4))
    value, labels = torch.arange(24.0).view(6, 4), torch.arange(6)
    forms = {
        "tensors": [value[:4], value[4:]],
        "rows of a tensor": value,
        "pairs": DataLoader(TensorDataset(value, labels), batch_size=4),
        "dicts, once": ({"input": part, "labels": part} for part in (value[:1], value[1:])),
        "another name": [{"pixel_values": value, "label": labels}],
        "lists of numbers": [{"input": row.tolist(), "labels": i} for i, row in enumerate(value)],
    }
    for name, data in forms.items():
        found = list(Batches(data, name, model, example))
        assert torch.equal(torch.cat([inputs["input"] for inputs, _ in found]), value), name
        assert all(inputs.keys() == {"input"} for inputs, _ in found)
        if name in ("pairs", "another name", "lists of numbers"):
            assert np.concatenate([own for _, own in found]).tolist() == labels.tolist(), name
    assert len(list(Batches(Items(5), "items", model, example))) == 5


def test_calibration_is_spread_over_items_and_ends_in_batches() -> None:
    model = nn.Linear(4, 3)
    example = read_example(model, torch.zeros(2, 4))
    spread = Batches(Items(1000), "items", model, example).spread(10)
    assert [batch["input"][0, 0].item() for batch in spread] == [100 * i for i in range(10)]
    endless = iter(lambda: torch.zeros(4, 4), None)
    assert len(Batches(endless, "endless", model, example).spread(10)) == 3
    assert len(Batches(Items(3), "few", model, example).spread(10)) == 3


def test_other_sizes_keep_masks_and_change_added_rows() -> None:
    ids, mask = torch.arange(2, 9)[None], torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    example = read_example(t5("relu"), {"input_ids": ids, "attention_mask": mask, "use_cache": False})
    assert example.sizes == {"batch": 1, "length": 7} and example.constants == {"use_cache": False}
    other = example.resized(batch=3, length=5)
    assert other["input_ids"].shape == (3, 5) and torch.equal(other["input_ids"][0], ids[0, :5])
    assert not torch.equal(other["input_ids"][1], other["input_ids"][0])
    assert torch.equal(other["attention_mask"], mask[:, :5].expand(3, 5))
    assert torch.equal(example.resized()["input_ids"], ids)


def test_what_compile_wrapped_is_exported(tmp_path: Path) -> None:
    model = nn.Linear(4, 3).eval()
    report = hf_bimp.export(torch.compile(model), tmp_path, X)
    assert report.inputs == {"input": ["batch", 4]}


def test_difference_sees_shapes_and_nan() -> None:
    one = torch.tensor([1.0, 4.0])
    assert difference([one], [one]) == 0 and difference([one], [one + 1]) == pytest.approx(0.25)
    assert difference([one], [one * torch.nan]) == difference([one], [one[:1]]) == float("inf")


def test_latencies_are_measured_in_turns() -> None:
    order: list[str] = []
    rows = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, {"a": 3, "b": 2})
    assert order == ["a", "b"] * (len(order) // 2) and len(order) >= 14
    assert [(row.name, row.bytes) for row in rows] == [("a", 3), ("b", 2)] and rows[0].speedup == 1


def transformers_models() -> dict:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    ids, mask = torch.randint(2, 50, (2, 7)), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = {"input_ids": ids, "attention_mask": mask}
    bert = BertConfig(vocab_size=50, **sizes, attn_implementation="flex_attention")
    return {
        "bert": (BertForSequenceClassification(bert), text | {"labels": torch.tensor([0, 1])}),
        "llama": (LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)), text),
        "vit": (ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)), images(32)(0)),
        "gpt2": (make("gpt2"), MODELS["gpt2"][1](0)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
def test_transformers_in_int8(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = transformers_models()[name]
    report = hf_bimp.export(model.eval(), tmp_path, inputs, "openvino", [inputs])
    assert report.fixed == {} and report.max_difference < 1e-5 and report.int8_difference < 0.3
    lengths = {axis for shape in report.inputs.values() for axis in shape if isinstance(axis, str)}
    assert lengths == ({"batch"} if name == "vit" else {"batch", "length"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenet", "maxvit", "deeplabv3", "hf_resnet", "t5_relu"])
def test_shrunk_models(name: str, tmp_path: Path) -> None:
    report = hf_bimp.export(shrunk(name), tmp_path, MODELS[name][1](0), "openvino", dense_model=make(name))
    assert report.fixed == {} and report.max_difference < 1e-5
    assert report.latency[1].bytes < report.latency[0].bytes


SIGNAL_AFTER_EXPORT = """
import faulthandler, os, signal, sys
faulthandler.enable()
import torch
from torch import nn
import hf_bimp

heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
batch = torch.randn(4, 3, 8, 8)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
hf_bimp.export(model, sys.argv[1], batch, "openvino", batch)
os.kill(os.getpid(), signal.SIGUSR1)
assert heard == [1]
print("alive")
"""


def test_signals_are_handled_after_an_int8_export(tmp_path: Path) -> None:
    """OpenVINO and nncf free the stack that handlers run on."""
    assert "alive" in output_of(sys.executable, "-c", SIGNAL_AFTER_EXPORT, tmp_path / "out")
