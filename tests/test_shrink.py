"""Shrinking: the same outputs with fewer parameters, saved and loaded; and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_bimp import find_prunable
from hf_bimp.pruning.structured.groups import find_filter_groups
from hf_bimp.pruning.structured.shrink import load_shrunk, save_shrunk, shrink
from processes import output_of
from shrinkable import MODELS, ConcatAndFlatten, make, outputs, zero_half

LOAD = """
import sys, torch
sys.path[:0] = sys.argv[1].split(":")
from shrinkable import MODELS, outputs
from hf_bimp.pruning.structured.shrink import load_shrunk
for folder, name in zip(sys.argv[2::2], sys.argv[3::2]):
    result = outputs(load_shrunk(folder), MODELS[name][1](7))
    torch.save(result, folder + "/outputs.pt")
"""


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for have, want in zip(one, other, strict=True):
        assert want.abs().max() > 1e-3
        assert (have - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def pruned(name: str) -> nn.Module:
    model = make(name)
    groups, _ = find_filter_groups(model, MODELS[name][1](0), find_prunable(model).weights)
    zero_half(model, groups)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_with_fewer_parameters(name: str, tmp_path: Path) -> None:
    model, inputs = make(name), MODELS[name][1]
    dense = outputs(model, inputs(7))
    groups, _ = find_filter_groups(model, inputs(0), find_prunable(model).weights)
    zero_half(model, groups)
    small = shrink(model, inputs(0))
    expected = outputs(model, inputs(7))
    assert_same(outputs(small, inputs(7)), expected)
    assert not torch.allclose(dense[-1], expected[-1])
    shapes = {name: parameter.shape for name, parameter in small.named_parameters()}
    for group in groups:
        for rows in group.weights:
            assert shapes[rows.name][rows.dim] == (group.size - group.size // 2) * rows.index[0].numel()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    save_shrunk(small, tmp_path)
    loaded = load_shrunk(tmp_path, ConcatAndFlatten() if name == "concat" else None)
    assert_same(outputs(loaded, inputs(7)), expected)
    assert str(loaded) == str(small.eval())


def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    names = ["cifar_wrn", "t5_gated", "pspnet"]
    arguments, expected = [], []
    for name in names:
        small = shrink(pruned(name), MODELS[name][1](0))
        save_shrunk(small, tmp_path / name)
        arguments += [str(tmp_path / name), name]
        expected.append(outputs(small, MODELS[name][1](7)))
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    output_of(sys.executable, "-c", LOAD, path, *arguments)
    for name, want in zip(names, expected, strict=True):
        assert_same(torch.load(tmp_path / name / "outputs.pt"), want)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    save_shrunk(shrink(pruned("t5_relu"), MODELS["t5_relu"][1](0)), tmp_path)
    loaded = load_shrunk(tmp_path)
    assert loaded.lm_head.weight is loaded.shared.weight is loaded.encoder.embed_tokens.weight
    assert loaded.generation_config.decoder_start_token_id == 0
    assert loaded.generate(MODELS["t5_relu"][1](0)["input_ids"], max_new_tokens=3).shape[0] == 2


def test_the_file_lists_only_layers_that_changed(tmp_path: Path) -> None:
    model = make("cifar_resnet20")
    with torch.no_grad():
        layer = model.features.stage1[0]
        for parameter in (layer.conv1.weight, layer.bn1.weight, layer.bn1.bias):
            parameter[[0, 3]] = 0
    save_shrunk(shrink(model, MODELS["cifar_resnet20"][1](0)), tmp_path)
    content = json.loads((tmp_path / "shrunk.json").read_text())
    assert content["origin"] == {"library": "timm", "name": "cifar_resnet20"}
    assert content["widths"] == {
        "features.stage1.0.conv1": {"in_channels": 16, "out_channels": 14, "groups": 1},
        "features.stage1.0.bn1": {"num_features": 14},
        "features.stage1.0.conv2": {"in_channels": 14, "out_channels": 16, "groups": 1},
    }


def test_a_group_keeps_its_last_channel() -> None:
    model = make("concat")
    with torch.no_grad():
        for parameter in (model.hidden.weight, model.hidden.bias):
            parameter.zero_()
    small = shrink(model, MODELS["concat"][1](0))
    assert small.hidden.out_features == small.last.in_features == 1
    assert_same(outputs(small, MODELS["concat"][1](7)), outputs(model, MODELS["concat"][1](7)))


def test_leaves_the_model_and_keeps_dtype_mode_and_frozen_layers() -> None:
    model = pruned("concat").to(torch.bfloat16).train()
    model.left.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = shrink(model, MODELS["concat"][1](0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small.training and not small.left.weight.requires_grad and small.right.weight.requires_grad


def test_refuses_where_nothing_is_zero() -> None:
    model = make("concat")
    with torch.no_grad():
        model.left.weight[2] = 0  # its bias is not zero
    with pytest.raises(ValueError, match='granularity="filter"'):
        shrink(model, MODELS["concat"][1](0))


def test_refuses_outputs_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned("concat")
    monkeypatch.setattr("hf_bimp.pruning.structured.shrink.output_difference", lambda *_: float("nan"))
    with pytest.raises(RuntimeError, match="puts out something else"):
        shrink(model, MODELS["concat"][1](0))


def test_refuses_folders_and_architectures_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="saving was cut off"):
        load_shrunk(tmp_path)
    save_shrunk(shrink(pruned("concat"), MODELS["concat"][1](0)), tmp_path)
    with pytest.raises(ValueError, match="Build the dense model"):
        load_shrunk(tmp_path)
    with pytest.raises(ValueError, match="not the architecture"):
        load_shrunk(tmp_path, nn.Sequential(nn.Linear(2, 2)))
    other = ConcatAndFlatten()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="another architecture"):
        load_shrunk(tmp_path, other)


def test_a_model_changed_after_it_was_made_needs_its_architecture(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = make("hf_resnet")
        model.classifier.add_module("2", nn.Linear(5, 3, bias=False))
        return model

    model, inputs = build(), MODELS["hf_resnet"][1]
    features = {"pixel_values": inputs(0)["pixel_values"]}
    groups, _ = find_filter_groups(model, features, find_prunable(model).weights)
    zero_half(model, groups)
    save_shrunk(small := shrink(model, features), tmp_path)
    with pytest.raises(ValueError, match="Build the dense model"):
        load_shrunk(tmp_path)
    assert_same(outputs(load_shrunk(tmp_path, build()), features), outputs(small, features))


SPOILT = {
    "no JSON": "{",
    "a list": "[]",
    "another library": {"origin": {"library": "os", "name": "system"}},
    "no model": {"origin": {"library": "transformers", "name": "AutoConfig"}},
    "a name that is none": {"origin": {"library": "transformers", "name": 3}},
    "another dtype": {"dtype": "load"},
    "a negative width": {"widths": {"0": {"out_features": -1}}},
    "a text for a width": {"widths": {"0": {"out_features": "12"}}},
    "an unknown attribute": {"widths": {"0": {"forward": 12}}},
    "an attribute of another layer": {"widths": {"0": {"num_features": 12}}},
    "a width that the weight has not": {"widths": {"0": {"out_features": 4096}}},
    "widths that are none": {"widths": 3},
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_shrunk_model_of_another_form_is_refused_by_file_and_field(tmp_path, what) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    save_shrunk(model, tmp_path)
    path = tmp_path / "shrunk.json"
    content = json.loads(path.read_text())
    spoilt = SPOILT[what]
    path.write_text(spoilt if isinstance(spoilt, str) else json.dumps(content | spoilt))
    given = None if what == "no model" else model
    if what == "no model":
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="shrunk.json|no model of transformers"):
        load_shrunk(tmp_path, given)
