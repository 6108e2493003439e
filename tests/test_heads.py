"""Attention heads: which rows and columns they are, how many go, what makes them removable, models without them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import run_arguments
from hf_bimp import (
    BIMPArguments,
    BIMPTrainer,
    find_prunable,
    load_shrunk,
    save_shrunk,
    shrink,
)
from hf_bimp.pruning.build import make_masks
from hf_bimp.pruning.structured.filters import FilterGroup
from hf_bimp.pruning.structured.groups import find_filter_groups
from hf_bimp.reporting.flops import count_multiply_adds, theoretical_speedup
from processes import output_of
from shrinkable import MODELS, images, make, outputs, t5, vit
from test_shrink import LOAD, assert_same

# Of each family: an attention module, its query, key, value and output layers (and where parts of one layer begin),
# heads, and the numbers that its code reads: what counts heads, and what the units of all.
FAMILIES: dict[str, tuple[str, tuple[tuple[str, int], ...], int, tuple[str, ...], tuple[str, ...]]] = {
    "t5_relu": (
        "decoder.block.1.layer.1.EncDecAttention",
        (("q", 0), ("k", 0), ("v", 0), ("o", 0)),
        2,
        ("n_heads",),
        ("inner_dim",),
    ),
    "bert": (
        "bert.encoder.layer.0.attention",
        (("self.query", 0), ("self.key", 0), ("self.value", 0), ("output.dense", 0)),
        3,
        ("self.num_attention_heads",),
        ("self.all_head_size",),
    ),
    "vit": (
        "vit.layers.1.attention",
        (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 0)),
        3,
        ("num_attention_heads",),
        (),
    ),
    "timm_vit": (
        "blocks.0.attn",
        (("qkv", 0), ("qkv", 24), ("qkv", 48), ("proj", 0)),
        4,
        ("num_heads",),
        ("attn_dim",),
    ),
    "gpt2": (
        "transformer.h.1.attn",
        (("c_attn", 0), ("c_attn", 16), ("c_attn", 32), ("c_proj", 0)),
        4,
        ("num_heads",),
        ("split_size",),
    ),
    "llama": (
        "model.layers.0.self_attn",
        (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 0)),
        6,
        (),
        (),
    ),
    "swin": (
        "swin.encoder.layers.1.blocks.1.attention",
        (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 0)),
        4,
        ("num_attention_heads",),
        (),
    ),
    "timm_swin": (
        "layers.1.blocks.0.attn",
        (("qkv", 0), ("qkv", 16), ("qkv", 32), ("proj", 0)),
        4,
        ("num_heads",),
        (),
    ),
}


def head_groups(model: nn.Module, name: str) -> list[FilterGroup]:
    groups, _ = find_filter_groups(model, MODELS[name][1](0), find_prunable(model).weights)
    return [group for group in groups if group.attentions]


def inputs_dim(layer: nn.Module) -> int:
    return 0 if type(layer).__name__ == "Conv1D" else 1


class Family:
    """An attention module of a model, read by hand."""

    def __init__(self, name: str):
        self.name, self.model, self.inputs = name, make(name), MODELS[name][1]
        path, layers, self.heads, self.counts, self.units = FAMILIES[name]
        self.module = self.model.get_submodule(path)
        self.layers = [(self.module.get_submodule(layer), f"{path}.{layer}.weight", start) for layer, start in layers]
        self.columns = self.layers[3][0].weight.shape[inputs_dim(self.layers[3][0])]
        self.head_dim = self.columns // self.heads
        self.queries = 2 if name == "llama" else 1  # of a head of keys and values

    def places(self, part: int, head: int) -> list[int]:
        """Where a head of keys and values, with its queries, lies in the queries, keys, values or outputs."""
        width = self.head_dim * (self.queries if part in (0, 3) else 1)
        start = self.layers[part][2] + head * width
        return list(range(start, start + width))

    @torch.no_grad()
    def zero(self, part: int, head: int, bias: bool = True) -> None:
        layer = self.layers[part][0]
        for place in self.places(part, head):
            dim = inputs_dim(layer) if part == 3 else 1 - inputs_dim(layer)
            layer.weight.select(dim, place).zero_()
            if part < 3 and bias and layer.bias is not None:
                layer.bias[place] = 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_is_its_rows_and_its_columns(name: str) -> None:
    family = Family(name)
    weights = {weight for _, weight, _ in family.layers}
    (group,) = [g for g in head_groups(family.model, name) if weights & {rows.name for rows in g.weights}]
    assert group.size == family.heads // family.queries
    for head in range(group.size):
        expected: dict[str, set[int]] = {}
        for part, (_, weight, _) in enumerate(family.layers):
            expected.setdefault(weight, set()).update(family.places(part, head))
        taken = {r.name: set(r.index[head].flatten().tolist()) for r in group.weights if r.name in weights}
        assert taken == expected


@pytest.mark.parametrize("name", ["bert", "llama", "t5_relu", "gpt2", "timm_vit"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.99])
def test_the_smallest_heads_go_as_a_plain_loop_has_it(name: str, sparsity: float) -> None:
    model = make(name)
    parameters = {key: value.detach().clone() for key, value in model.named_parameters()}
    masks, _ = make_masks(model, lambda: MODELS[name][1](0), "filter")
    masks.prune(sparsity)
    groups = [group for group in masks.rule.groups if group.attentions]
    assert groups
    for group in groups:
        norms = []
        for head in range(group.size):
            squares = 0.0
            for rows in group.weights:
                for place in rows.index[head].flatten().tolist():
                    squares += float(parameters[rows.name].select(rows.dim, place).double().square().sum())
            norms.append(squares)
        count = min(round(sparsity * group.size), group.size - 1)
        gone = set(sorted(range(group.size), key=norms.__getitem__)[:count])
        for rows in group.weights + group.attached:
            for head in range(group.size):
                for place in rows.index[head].flatten().tolist():
                    values = model.get_parameter(rows.name).select(rows.dim, place)
                    assert bool((values == 0).all()) == (head in gone)
                    assert bool(masks.pruned[rows.name].select(rows.dim, place).all()) == (head in gone)


def test_later_prunings_keep_what_is_gone() -> None:
    model = make("timm_vit")
    masks, _ = make_masks(model, lambda: MODELS["timm_vit"][1](0), "filter")
    masks.prune(0.25)
    first = {name: mask.clone() for name, mask in masks.pruned.items()}
    masks.prune(0.75)
    assert all(masks.pruned[name][mask].all() for name, mask in first.items())
    assert masks.pruned["blocks.0.attn.proj.weight"].all(0).sum() == 18  # three of four heads, six columns each


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("part", [2, 3], ids=["values", "output"])
def test_a_head_without_values_or_without_output_is_removed(name: str, part: int) -> None:
    family = Family(name)
    if name == "t5_relu":  # one group with that of the other block
        other = family.model.decoder.block[0].layer[1].EncDecAttention
        with torch.no_grad():  # of the other kind
            other.v.weight[: family.head_dim] = 0
    family.zero(part, 0)
    small = shrink(family.model, family.inputs(0))
    assert_same(outputs(small, family.inputs(7)), outputs(family.model, family.inputs(7)))
    module = small.get_submodule(FAMILIES[name][0])
    left = family.heads - family.queries
    layers = [module.get_submodule(layer) for layer, _ in FAMILIES[name][1]]
    assert layers[3].weight.shape[inputs_dim(layers[3])] == left * family.head_dim
    for attribute in family.counts:
        owner, _, key = attribute.rpartition(".")
        assert getattr(module.get_submodule(owner), key) == left
    for attribute in family.units:
        owner, _, key = attribute.rpartition(".")
        assert getattr(module.get_submodule(owner), key) == left * family.head_dim
    tables = [p for key, p in module.named_parameters() if "relative_position_bias_table" in key]
    assert [table.shape[1] for table in tables] == [left] * ("swin" in name)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_heads_that_still_say_something_stay(name: str) -> None:
    family = Family(name)
    family.zero(0, 0)
    family.zero(1, 1)
    family.zero(2, 0, bias=False)  # the value is the bias
    with pytest.raises(ValueError, match="or of attention heads is wholly zero"):
        shrink(family.model, family.inputs(0))


def test_grouped_queries_need_all_of_their_columns_zero() -> None:
    family = Family("llama")
    with torch.no_grad():
        family.module.o_proj.weight[:, : family.head_dim] = 0  # one of the two queries
    with pytest.raises(ValueError, match="wholly zero"):
        shrink(family.model, family.inputs(0))
    with torch.no_grad():
        family.module.o_proj.weight[:, : 2 * family.head_dim] = 0
    small = shrink(family.model, family.inputs(0)).model.layers[0].self_attn
    assert (small.q_proj.out_features, small.k_proj.out_features, small.v_proj.out_features) == (16, 8, 8)


def test_the_last_head_stays() -> None:
    family = Family("vit")
    for head in range(3):
        family.zero(2, head)
    small = shrink(family.model, family.inputs(0))
    assert small.vit.layers[1].attention.num_attention_heads == 1
    assert_same(outputs(small, family.inputs(7)), outputs(family.model, family.inputs(7)))


def test_heads_of_a_stack_of_t5_go_together() -> None:
    """They share one position bias, which the first block computes."""
    model, inputs = make("t5_relu"), MODELS["t5_relu"][1]
    blocks = [block.layer[0].SelfAttention for block in model.decoder.block]
    with torch.no_grad():
        blocks[0].v.weight[:4] = 0
    with pytest.raises(ValueError, match="wholly zero"):
        shrink(model, inputs(0))
    with torch.no_grad():
        blocks[1].o.weight[:, :4] = 0
    small = shrink(model, inputs(0))
    assert [block.layer[0].SelfAttention.n_heads for block in small.decoder.block] == [1, 1]
    assert [block.layer[0].SelfAttention.n_heads for block in small.encoder.block] == [2, 2]
    table = small.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert table.embedding_dim == table.weight.shape[1] == 1
    assert torch.equal(table.weight[:, 0], blocks[0].relative_attention_bias.weight[:, 1])
    assert_same(outputs(small, inputs(7)), outputs(model, inputs(7)))


@torch.no_grad()
def uneven(name: str) -> nn.Module:
    """Another head is zero in every group, and none in the first."""
    model = make(name)
    for i, group in enumerate(head_groups(model, name)[1:]):
        for attention in group.attentions:
            for rows in attention.values:
                for place in rows.index[i % group.size].flatten().tolist():
                    model.get_parameter(rows.name).select(rows.dim, place).zero_()
    return model


def test_layers_with_other_numbers_of_heads_load_in_a_fresh_process(tmp_path: Path) -> None:
    arguments, expected = [], []
    for name in FAMILIES:
        model = uneven(name)
        small = shrink(model, MODELS[name][1](0))
        save_shrunk(small, tmp_path / name)
        arguments += [str(tmp_path / name), name]
        expected.append(outputs(model, MODELS[name][1](7)))
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    output_of(sys.executable, "-c", LOAD, path, *arguments)
    for name, want in zip(FAMILIES, expected, strict=True):
        assert_same(torch.load(tmp_path / name / "outputs.pt"), want)
        loaded = load_shrunk(tmp_path / name)
        if isinstance(loaded, PreTrainedModel):  # what it was before: one number cannot tell of all layers
            assert loaded.config.to_dict()["model_type"] == make(name).config.model_type
            number = "num_heads" if name in ("t5_relu", "swin") else "num_attention_heads"
            assert getattr(loaded.config, number) == getattr(make(name).config, number)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5_relu"])
def test_generates_the_same_tokens_one_by_one(name: str) -> None:
    model, ids = uneven(name), MODELS[name][1](3)["input_ids"]
    small = shrink(model, MODELS[name][1](0))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(small.generate(ids, **settings), model.generate(ids, **settings))
    assert small.config.use_cache is model.config.use_cache is True


def test_shrinks_twice_and_trains_on(tmp_path: Path) -> None:
    model, inputs = uneven("vit"), MODELS["vit"][1]
    once = shrink(model, inputs(0))
    with torch.no_grad():
        once.vit.layers[0].attention.v_proj.weight[8:16] = 0
        once.vit.layers[0].attention.v_proj.bias[8:16] = 0
    twice = shrink(once, inputs(0))
    assert [layer.attention.num_attention_heads for layer in twice.vit.layers] == [2, 2]
    assert_same(outputs(twice, inputs(7)), outputs(once, inputs(7)))
    twice.train()(**inputs(0)).loss.backward()
    assert all(parameter.grad is not None for parameter in twice.vit.layers.parameters())
    save_shrunk(twice, tmp_path)
    assert_same(outputs(load_shrunk(tmp_path), inputs(7)), outputs(twice.eval(), inputs(7)))


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224"), images(224)),
        (
            lambda: vit(image_size=224, patch_size=16, hidden_size=192, intermediate_size=768, num_hidden_layers=12),
            None,
        ),
    ],
    ids=["timm", "transformers"],
)
def test_half_of_the_filters_of_vit_tiny_leave_at_most_55_percent(build: Callable, inputs: Callable | None) -> None:
    torch.manual_seed(0)
    model, batch = build().eval(), (inputs or images(224))(0)
    batch = batch if inputs else {"pixel_values": batch}
    masks, _ = make_masks(model, lambda: batch, "filter")
    masks.prune(0.5)
    small = shrink(model, batch)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after <= 0.55 * before
    (have,), (want,) = outputs(small, batch), outputs(model, batch)
    assert want.abs().max() > 1e-2 and (have - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_multiply_adds_that_zero_heads_save(name: str) -> None:
    """Scores and sums of values go with the heads too, so that the smaller model saves more than zeros promise."""
    model, inputs = make(name), MODELS[name][1](0)
    dense = count_multiply_adds(model, inputs)
    masks, _ = make_masks(model, lambda: inputs, "filter")
    masks.prune(0.5)
    density = {key: float((masks.weights[key] != 0).float().mean()) for key in masks.weights}
    saved = sum(dense.per_weight[key] * (1 - share) for key, share in density.items())
    assert theoretical_speedup(model, inputs) == pytest.approx(dense.total / (dense.total - saved))
    small = count_multiply_adds(shrink(model, inputs), inputs)
    assert small.total < dense.total - saved
    output = FAMILIES[name][0] + "." + FAMILIES[name][1][3][0] + ".weight"
    if output in dense.per_weight:
        assert small.per_weight[output] == pytest.approx(dense.per_weight[output] * density[output])


def test_a_run_prunes_heads_of_a_vit_and_shrinks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = vit()
    generator = torch.Generator().manual_seed(1)
    items = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 5} for i in range(16)]
    changes = {"granularity": "filter", "target_sparsity": 0.5, "num_cycles": 2, "dense_ratio": 0.34, "max_steps": 6}
    args = BIMPArguments(**run_arguments(tmp_path, per_device_train_batch_size=4, **changes))
    trainer = BIMPTrainer(model=model, args=args, train_dataset=items)
    trainer.train()
    for layer in model.vit.layers:  # two of three heads, 16 of 24 rows
        attention = layer.attention
        for rows in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert (rows.weight == 0).all(1).sum() == (rows.bias == 0).sum() == 16
        assert (attention.o_proj.weight == 0).all(0).sum() == 16 and not (attention.o_proj.bias == 0).any()
        assert (layer.mlp.fc1.weight == 0).all(1).sum() == 10
    batch = {"pixel_values": torch.stack([item["pixel_values"] for item in items[:3]])}
    small = shrink(trainer.model, batch)
    assert [layer.attention.num_attention_heads for layer in small.vit.layers] == [1, 1]
    assert_same(outputs(small.eval(), batch), outputs(model.eval(), batch))
    save_shrunk(small, tmp_path / "small")
    assert_same(outputs(load_shrunk(tmp_path / "small"), batch), outputs(model, batch))


def reasons(model: nn.Module, inputs: object, **choice: list[str]) -> tuple[list[FilterGroup], dict[str, str]]:
    groups, dense = find_filter_groups(model, inputs, find_prunable(model, **choice).weights)
    return [group for group in groups if group.attentions], dense


def test_heads_with_a_layer_that_is_not_pruned_stay() -> None:
    groups, dense = reasons(make("vit"), MODELS["vit"][1](0), skip_modules=[r"layers\.0\.attention\.o_proj"])
    assert [group.attentions[0].name for group in groups] == ["vit.layers.1.attention"]
    assert "layers.0.attention.o_proj.weight is not pruned" in dense["vit.layers.0.attention.v_proj.weight"]
    assert "vit.layers.0.attention.o_proj.weight" not in dense


def test_tied_and_single_heads_stay() -> None:
    model = make("vit")
    first, second = (layer.attention for layer in model.vit.layers)
    second.v_proj.weight = first.v_proj.weight
    groups, dense = reasons(model, MODELS["vit"][1](0))
    assert not groups and "is tied" in dense["vit.layers.1.attention.q_proj.weight"]
    groups, dense = reasons(vit(num_attention_heads=1).eval(), MODELS["vit"][1](0))
    assert not groups and "a single attention head" in dense["vit.layers.1.attention.q_proj.weight"]


class Mixing(nn.Module):
    """Attention whose values pass from one head to another, between embeddings and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        q, k, v = (
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v.flip(1))
        return self.last(self.o_proj(mixed.transpose(1, 2).flatten(2)))


def test_heads_that_are_not_what_they_seem_stay() -> None:
    torch.manual_seed(0)
    groups, dense = reasons(Mixing().eval(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)))
    assert not groups and {"q_proj.weight", "k_proj.weight", "v_proj.weight"} <= dense.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stays_is_named_by_what_it_is(name: str) -> None:
    model = make(name)
    _, dense = find_filter_groups(model, MODELS[name][1](0), find_prunable(model).weights)
    assert set(dense.values()) <= {
        "its filters are the residual stream, whose width embeddings and normalisation layers fix",
        "its filters are the model's outputs",
    }
    assert any("the residual stream" in reason for reason in dense.values())


def test_files_with_parts_of_heads_are_refused(tmp_path: Path) -> None:
    """The widths in shrunk.json and the shapes of the weights agree with each other, and with no number of heads."""
    model = vit()
    attention = model.vit.layers[0].attention
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.weight, layer.bias = nn.Parameter(layer.weight[:12].clone()), nn.Parameter(layer.bias[:12].clone())
        layer.out_features = 12
    attention.o_proj.weight, attention.o_proj.in_features = nn.Parameter(attention.o_proj.weight[:, :12].clone()), 12
    save_shrunk(model, tmp_path)
    with pytest.raises(ValueError, match=r"shrunk.json: vit.layers.0.attention has 36 rows .* whole heads of 8"):
        load_shrunk(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["vit.layers.1.attention.o_proj.weight"] = torch.zeros(24, 16)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"another architecture|whole heads"):
        load_shrunk(tmp_path)


def test_finding_heads_leaves_no_trace() -> None:
    model = make("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_filter_groups(model, MODELS["llama"][1](0), find_prunable(model).weights)
    assert model.config.use_cache is True and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gated_t5_without_heads_of_a_stack_has_its_counts() -> None:
    torch.manual_seed(0)
    model = t5("gated-gelu").eval()
    masks, _ = make_masks(model, lambda: MODELS["t5_gated"][1](0), "filter")
    masks.prune(0.5)
    small = shrink(model, MODELS["t5_gated"][1](0))
    assert {module.n_heads for module in small.modules() if hasattr(module, "n_heads")} == {1}
    assert {module.wi_0.out_features for module in small.modules() if hasattr(module, "wi_0")} == {12}
