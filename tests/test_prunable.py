"""What is pruned: linear and convolution layers by name, tied weights once, and what stays dense is listed."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_bimp import Masks, find_prunable


def tiny_t5() -> T5ForConditionalGeneration:
    size = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 20}
    return T5ForConditionalGeneration(T5Config(**size))


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16))


def names(model: nn.Module, **patterns: list[str]) -> list[str]:
    return list(find_prunable(model, **patterns).weights)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Linear(4, 3)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.c1 = nn.Conv1d(2, 4, 3)
        self.c2 = nn.Conv2d(2, 4, 3, groups=2, bias=False)
        self.c3 = nn.Conv3d(2, 4, 3)
        self.t2 = nn.ConvTranspose2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layer_norm = nn.LayerNorm([4, 4])
        self.embedding = nn.Embedding(5, 4)
        self.raw = nn.Parameter(torch.ones(2, 2))


def test_every_kind_of_layer() -> None:
    found = find_prunable(Everything())
    assert list(found.weights) == ["c1.weight", "c2.weight", "c3.weight", "t2.weight", "z.weight"]  # sorted
    # No biases, normalisation or embeddings in either; what has more than one dimension and is out of reach is told.
    assert {"bilinear.weight", "raw"} <= set(found.dense_names)
    assert "embedding.weight" not in found.dense_names


def test_the_parameters_are_the_models_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert find_prunable(model).weights["1.weight"] is model[1].weight
    Masks(find_prunable(model).weights).prune(0.5)
    assert sum(int((layer.weight == 0).sum()) for layer in model) == 9


def test_names_are_sorted_as_strings() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(11)))
    assert names(model) == sorted(f"{i}.weight" for i in range(11))


def test_transformers_conv1d() -> None:
    block = "transformer.h.0."
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names(tiny_gpt2()) == [f"{block}{layer}.weight" for layer in layers]


def test_a_layer_tied_to_an_embedding_is_pruned_on_demand_alone() -> None:
    model = tiny_t5()
    assert model.lm_head.weight is model.shared.weight
    dense = names(model)
    assert len(dense) == 6 + 10  # attention and feed-forward of one encoder and one decoder block
    assert not {"shared.weight", "lm_head.weight"} & set(dense)
    assert names(model, prune_modules=["lm_head"]) == ["shared.weight"]
    assert names(model, prune_modules=[""]) == sorted([*dense, "shared.weight"])
    assert "shared.weight" not in find_prunable(model).dense_names


def test_tied_layers_count_once_and_are_skipped_together() -> None:
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.ModuleDict({"first": first, "second": second, "third": third})
    assert names(model) == ["first.weight", "third.weight"]
    assert Masks(find_prunable(model).weights).num_weights == 18
    assert names(model, prune_modules=["second"]) == ["first.weight"]
    assert names(model, skip_modules=["second"]) == ["third.weight"]
    assert find_prunable(model, skip_modules=["second"]).dense_names == ("first.weight",)


def test_a_module_used_twice_counts_once() -> None:
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.GELU(), layer)) == ["0.weight"]


def test_patterns_are_searched_in_module_names() -> None:
    model = tiny_t5()
    decoder = names(model, prune_modules=[r"^decoder\."])
    assert len(decoder) == 10 and all(name.startswith("decoder.") for name in decoder)
    assert names(model, prune_modules=[r"\.wi$", r"\.wo$"]) == [
        n for n in names(model) if n.endswith(("wi.weight", "wo.weight"))
    ]
    assert names(model, skip_modules=["SelfAttention"]) == [n for n in names(model) if "SelfAttention" not in n]
    both = names(model, prune_modules=["decoder"], skip_modules=["Attention"])
    assert both == [n for n in names(model) if n.startswith("decoder") and "Attention" not in n]
    skipped = find_prunable(model, skip_modules=["encoder"])
    assert "encoder.block.0.layer.1.DenseReluDense.wi.weight" in skipped.dense_names


@pytest.mark.parametrize("argument", ["prune_modules", "skip_modules"])
@pytest.mark.parametrize("pattern", ["nothing_here", "embed_tokens", r"\.weight$"])
def test_a_pattern_that_matches_no_layer_is_refused(argument: str, pattern: str) -> None:
    with pytest.raises(ValueError) as error:
        find_prunable(tiny_t5(), **{argument: ["decoder", pattern]})
    message = str(error.value)
    assert argument in message and repr(pattern) in message
    assert "encoder.block.0.layer.0.SelfAttention.q" in message  # what names look like


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"T5.* no prunable weight.*prune_modules=\['wi'\], skip_modules=\['Dense'\]"):
        find_prunable(tiny_t5(), prune_modules=["wi"], skip_modules=["Dense"])


@pytest.mark.parametrize("model", [nn.Sequential(nn.LayerNorm(3)), nn.Embedding(3, 3), nn.LSTM(3, 3)])
def test_a_model_without_prunable_layer_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no prunable weight.*linear and convolution"):
        find_prunable(model)


def test_matrices_out_of_reach_are_listed() -> None:
    attention = find_prunable(nn.MultiheadAttention(4, 2))
    assert list(attention.weights) == ["out_proj.weight"] and attention.dense_names == ("in_proj_weight",)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 20, "num_local_experts": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(**size, num_attention_heads=2, num_key_value_heads=2))
    found = find_prunable(mixtral)
    experts = {name for name, parameter in mixtral.named_parameters() if parameter.ndim == 3}
    assert experts and experts <= set(found.dense_names)
    assert not set(found.weights) & set(found.dense_names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_that_are_ranked_exactly_pass(dtype: torch.dtype) -> None:
    assert names(nn.Linear(2, 2).to(dtype)) == ["weight"]


def test_double_precision_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match=r"1\.weight is torch\.float64.*model\.float\(\)"):
        find_prunable(model)
    assert names(model, skip_modules=["1"]) == ["0.weight"]
