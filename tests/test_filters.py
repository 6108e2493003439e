"""Groups of filters: which layers they couple, which stay dense and why, and that finding them leaves no trace."""

import pytest
import torch
from torch import Tensor, nn

from hf_bimp import find_prunable
from hf_bimp.pruning.structured.filters import FilterGroup
from hf_bimp.pruning.structured.groups import find_filter_groups
from shrinkable import MODELS, make


class Residual(nn.Module):
    """stem -> norm, plus body(stem), read by a grouped and a plain branch; both logits and features are outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 1)
        self.outer = nn.Conv2d(6, 8, 1)
        self.feature = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.outer(self.inner(x).relu())).relu()
        return self.head(x.mean((2, 3))), self.feature(x)


def groups_of(model: nn.Module, inputs: object, **choice: list[str]) -> tuple[list[FilterGroup], dict[str, str]]:
    return find_filter_groups(model, inputs, find_prunable(model, **choice).weights)


def names(groups: list[FilterGroup]) -> list[list[str]]:
    return [[rows.name for rows in group.weights] for group in groups]


def test_residual_coupling_by_hand() -> None:
    groups, dense = groups_of(Residual(), torch.randn(1, 3, 4, 4))
    stem, inner = groups
    assert (stem.size, names([stem])) == (8, [["outer.weight", "stem.weight"]])
    assert [rows.name for rows in stem.attached] == ["norm.bias", "norm.weight", "outer.bias"]
    assert sorted(rows.name for rows in stem.readers) == ["feature.weight", "head.weight", "inner.weight"]
    assert (inner.size, names([inner]), [rows.name for rows in inner.attached]) == (
        6,
        [["inner.weight"]],
        ["inner.bias"],
    )
    assert all(rows.dim == 0 and rows.index.tolist() == list(range(8)) for rows in stem.weights + stem.attached)
    assert dense == {
        "feature.weight": "its filters are the model's outputs",
        "head.weight": "its filters are the model's outputs",
    }


def test_concatenation_and_flattening_by_hand() -> None:
    model, inputs = make("concat"), MODELS["concat"][1](0)
    groups, dense = groups_of(model, inputs)
    assert names(groups) == [
        ["left.weight"],
        ["right.weight"],
        ["depthwise.weight", "up.weight"],
        ["down.weight"],
        ["hidden.weight"],
    ]
    left, right, up, down, _ = groups
    assert {rows.name: rows.index.tolist() for rows in left.attached}["norm.weight"] == [4, 5, 6, 7, 8, 9]
    assert {rows.name: rows.index.tolist() for rows in right.attached}["norm.weight"] == [
        [channel, 10 + channel] for channel in range(4)
    ]
    assert {rows.name: rows.dim for rows in up.weights} == {"up.weight": 1, "depthwise.weight": 0}
    assert down.readers[0].index.tolist() == [list(range(16 * channel, 16 * channel + 16)) for channel in range(5)]
    assert list(dense) == ["last.weight"]
    assert names(groups_of(model, inputs)[0]) == names(groups)


@pytest.mark.parametrize("name", MODELS)
def test_every_prunable_weight_is_grouped_once_or_has_a_reason(name: str) -> None:
    model, inputs = make(name), MODELS[name][1](0)
    prunable = find_prunable(model).weights
    groups, dense = find_filter_groups(model, inputs, prunable)
    grouped = [weight for group in names(groups) for weight in group]
    assert len(grouped) == len(set(grouped)) and not set(grouped) & set(dense)
    assert set(grouped) | set(dense) == set(prunable)
    parameters = dict(model.named_parameters())
    for group in groups:
        for rows in group.weights:
            assert sorted(rows.index.flatten().tolist()) == list(range(parameters[rows.name].shape[rows.dim]))
        assert all(rows.index.shape[0] == group.size for rows in group.weights + group.attached + group.readers)


DENSE = {
    "cifar_resnet20": {"fc.weight"},
    "cifar_vgg16_bn": {"fc.weight"},
    "deeplabv3": {"segmentation_head.0.weight"},
    "hf_resnet": {"classifier.1.weight"},
}


@pytest.mark.parametrize("name", DENSE)
def test_only_the_last_layer_stays_dense(name: str) -> None:
    model = make(name)
    _, dense = groups_of(model, MODELS[name][1](0))
    assert dense == dict.fromkeys(DENSE[name], "its filters are the model's outputs")


def test_pspnet_leaves_the_layers_it_does_not_use() -> None:
    model = make("pspnet")
    _, dense = groups_of(model, MODELS["pspnet"][1](0))
    assert dense.pop("segmentation_head.0.weight") == "its filters are the model's outputs"
    assert {name.split(".")[1] for name in dense} == {"layer3", "layer4"}
    assert set(dense.values()) == {"no path that can be traced leads from it to the outputs"}


@pytest.mark.parametrize("name, inner", [("t5_relu", ["wi"]), ("t5_gated", ["wi_0", "wi_1"])])
def test_t5_has_its_feed_forward_units(name: str, inner: list[str]) -> None:
    groups, dense = groups_of(make(name), MODELS[name][1](0))
    blocks = [f"{stack}.block.{i}.layer.{n}" for stack, n in (("encoder", 1), ("decoder", 2)) for i in (0, 1)]
    expected = [[f"{block}.DenseReluDense.{layer}.weight" for layer in inner] for block in blocks]
    assert sorted(names([group for group in groups if not group.attentions])) == sorted(expected)
    assert set(dense) == {f"{block}.DenseReluDense.wo.weight" for block in blocks}
    assert all("the residual stream" in reason for reason in dense.values())


@pytest.mark.parametrize("name", ["maxvit", "maxvit_tf"])
def test_maxvit_has_its_feed_forward_units_and_the_inside_of_its_convolution_blocks(name: str) -> None:
    groups, dense = groups_of(make(name), MODELS[name][1](0))
    grouped = {weight for group in names(groups) for weight in group}
    inside = {"stem.conv1.weight"}  # of the other filters, all go through a LayerNorm or attention
    for i in range(4):
        inside |= {f"stages.{i}.blocks.0.attn_{kind}.mlp.fc1.weight" for kind in ("block", "grid")}
        inside |= {f"stages.{i}.blocks.0.conv.{layer}.weight" for layer in ("conv1_1x1", "conv2_kxk", "se.fc1")}
    assert inside <= grouped
    assert not any("qkv" in weight or "proj" in weight for weight in grouped)
    assert dense["head.fc.weight"] == "its filters are the model's outputs"


def test_gpt2_is_traced_whole(caplog: pytest.LogCaptureFixture) -> None:
    groups, _ = groups_of(make("gpt2"), MODELS["gpt2"][1](0))
    assert len(groups) == 4 and "cannot be traced" not in caplog.text


class Untraceable(nn.Module):
    """Keeps keys and values for a next token, which torch-pruning cannot follow behind a split."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make("gpt2")

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=True).logits


def test_heads_and_feed_forward_units_alone_where_tracing_fails(caplog: pytest.LogCaptureFixture) -> None:
    model = Untraceable()
    groups, dense = groups_of(model, MODELS["gpt2"][1](0))
    assert "Untraceable cannot be traced whole" in caplog.text
    blocks = [f"model.transformer.h.{i}" for i in (0, 1)]
    assert names(groups) == [[f"{block}.mlp.c_fc.weight"] for block in blocks] + [
        [f"{block}.attn.c_attn.weight", f"{block}.attn.c_proj.weight"] for block in blocks
    ]
    assert groups[0].weights[0].dim == 1 and groups[0].readers[0].dim == 0
    assert set(dense) == {f"{block}.mlp.c_proj.weight" for block in blocks}
    assert all("the residual stream" in reason for reason in dense.values())


class Net(nn.Module):
    """Convolutions around something in the middle."""

    def __init__(self, middle: nn.Module, width: int = 8):
        super().__init__()
        self.first, self.middle, self.second = nn.Conv2d(3, 8, 1), middle, nn.Conv2d(width, 4, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.middle(self.first(x))))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=1)
        return one * two.sigmoid()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    "middle, width, reason",
    [
        (nn.GroupNorm(2, 8), 8, "a GroupNorm"),
        (nn.BatchNorm2d(8, affine=False), 8, "without weight and bias"),
        (nn.PReLU(8), 8, "PReLU"),
        (nn.InstanceNorm2d(8, affine=True), 8, "InstanceNorm"),
        (nn.Conv2d(8, 8, 1, groups=2), 8, "grouped convolution"),
        (nn.Conv2d(8, 16, 1, groups=8), 16, "grouped convolution"),
        (nn.PixelShuffle(2), 2, "one to one"),
        (nn.ChannelShuffle(2), 8, ""),
        (nn.Softmax(dim=1), 8, "changes the outputs"),
        (nn.Sigmoid(), 8, "changes the outputs"),
        (Gate(), 4, "a split"),
        (Scale(), 8, "a parameter outside"),
    ],
)
def test_what_keeps_filters_dense(middle: nn.Module, width: int, reason: str) -> None:
    groups, dense = groups_of(Net(middle, width), torch.randn(2, 3, 4, 4))
    assert names(groups) == [["second.weight"]]
    assert reason in dense["first.weight"] and dense["last.weight"] == "its filters are the model's outputs"


def test_layers_coupled_with_skipped_ones_stay_dense() -> None:
    groups, dense = groups_of(Residual(), torch.randn(1, 3, 4, 4), skip_modules=["^stem$"])
    assert names(groups) == [["inner.weight"]]
    assert dense["outer.weight"] == "its filters are coupled with those of stem.weight, which is not pruned"
    assert "stem.weight" not in dense


def test_finding_groups_leaves_no_trace() -> None:
    model = make("cifar_resnet20").train()
    model.features.stage1[0].conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    with torch.no_grad():
        groups, _ = groups_of(model, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(random, torch.get_rng_state()) and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert frozen == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert any("features.stage1.0.conv1.weight" in group for group in names(groups))
