"""`accelerate`: outputs, choices, reports, what is shared and saved, and what is refused. No test goes by a clock."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel
from transformers.pytorch_utils import Conv1D

import hf_bimp
from helpers import tiny_t5
from hf_bimp.deployment import acceleration, csr_choice
from hf_bimp.deployment.csr import CsrLayer, turn_into_csr, turn_into_dense

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="CSR needs MKL")


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Few rounds: what they measure is of no importance here."""
    monkeypatch.setattr(csr_choice, "ROUNDS", (1, 1))
    monkeypatch.setattr(acceleration, "SECONDS", 0.0)


def sparse(model: nn.Module, sparsity: float = 0.9, seed: int = 0) -> nn.Module:
    """`model` with random zeros in its linear layers and convolutions, tied ones too."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)) and id(module.weight) not in embeddings:
            gone = torch.rand(module.weight.shape, generator=generator) < sparsity
            module.weight.data.masked_fill_(gone, 0)
    return model.eval()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return sparse(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8, bias=False)))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def fake_clock(monkeypatch, dense: float, other: float, whole: float = 2.0) -> None:
    """Layers take `dense` and `other` seconds, the dense model `whole` and the accelerated one a second."""

    def take_turns(calls, *args, **kwargs):
        assert all(call() is not Ellipsis for call in calls.values())  # they run
        times = {"csr": other, "accelerated": 1.0, "dense": dense if "csr" in calls else whole}
        return {name: [times[name]] * 3 for name in calls}

    monkeypatch.setattr(csr_choice, "take_turns", take_turns)
    monkeypatch.setattr(acceleration, "take_turns", take_turns)


# ---- Layers ----


@needs_mkl
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (2, 5, 24), (3, 31, 24), (65, 24), (0, 24)])
def test_a_linear_layer_takes_any_number_of_rows(bias, shape) -> None:
    torch.manual_seed(0)
    layer = sparse(nn.Linear(24, 40, bias=bias)).requires_grad_(False)
    x = torch.randn(shape)
    expected = layer(x)
    turn_into_csr(layer)
    output = layer(x)
    assert output.shape == expected.shape and output.is_contiguous()
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    assert (layer._made is not None) == (x.numel() > 0)
    turn_into_dense(layer)
    assert type(layer) is nn.Linear and torch.equal(layer(x), expected)


@needs_mkl
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["2d", "1d"])
def test_a_pointwise_convolution(kind, stride, channels_last) -> None:
    torch.manual_seed(0)
    layer = {"2d": nn.Conv2d, "1d": nn.Conv1d}[kind](16, 24, 1, stride=stride)
    layer = sparse(layer).requires_grad_(False)
    x = torch.randn((3, 16, 5, 7) if kind == "2d" else (3, 16, 9))
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    expected, alone = layer(x), layer(x[0])
    turn_into_csr(layer)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)
    assert layer(x).stride() == expected.stride() or kind == "1d"
    torch.testing.assert_close(layer(x[0]), alone, atol=1e-6, rtol=1e-5)  # without a batch: the dense way


@needs_mkl
def test_a_wholly_zero_layer() -> None:
    layer = nn.Linear(8, 4).requires_grad_(False).eval()
    layer.weight.zero_()
    turn_into_csr(layer)
    assert torch.equal(layer(torch.randn(5, 8)), layer.bias.expand(5, 4))
    assert torch.equal(layer(torch.randn(1, 8)), layer.bias.expand(1, 4))


@needs_mkl
def test_csr_follows_the_weight_and_gradients_take_the_dense_way() -> None:
    layer = mlp()[0].requires_grad_(False)
    turn_into_csr(layer)
    x = torch.randn(5, 24)
    before = layer(x)
    layer.weight.mul_(2)
    assert close(layer(x) - layer.bias, 2 * (before - layer.bias))
    layer.load_state_dict({"weight": torch.zeros(40, 24), "bias": torch.ones(40)})
    assert torch.equal(layer(x), torch.ones(5, 40))
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(40, 24), atol=1e-5)
    assert layer.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16


# ---- Models ----


def bert() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sparse(BertModel(BertConfig(vocab_size=50, **size)))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return sparse(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32)))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 32, shape, generator=torch.Generator().manual_seed(1))


def t5_inputs() -> dict:
    return {"input_ids": ids(2, 7), "labels": ids(2, 5)}


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return sparse(T5EncoderModel(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)))


MODELS = {
    "mlp": (mlp, lambda: torch.randn(5, 24)),
    "bert": (bert, lambda: {"input_ids": ids(1, 16)}),
    "bert-tuple": (bert, lambda: (ids(2, 6), torch.ones(2, 6, dtype=torch.long))),
    "gpt2": (gpt2, lambda: {"input_ids": ids(2, 9), "labels": ids(2, 9)}),
    "t5": (lambda: sparse(tiny_t5()), t5_inputs),
    "t5-encoder": (encoder, lambda: {"input_ids": ids(1, 12)}),
    "resnet": (lambda: sparse(timm.create_model("resnet26", num_classes=5)), lambda: torch.randn(2, 3, 32, 32)),
}


@needs_mkl
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_and_the_given_model_is_left_as_it_was(name) -> None:
    make, example = MODELS[name]
    model, inputs = make(), example()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    fast = hf_bimp.accelerate(model, inputs, min_speedup=0)
    assert torch.equal(generator, torch.get_rng_state())
    report = fast.acceleration_report
    assert report.max_difference <= 1e-5 and report.reason == "" and report.speedup > 0 and report.extra_bytes > 0
    chosen = {layer.name for layer in report.layers if layer.chosen == "csr"}
    assert chosen == {key for key, module in fast.named_modules() if isinstance(module, CsrLayer)} != set()
    assert not any(isinstance(module, CsrLayer) for module in model.modules())
    assert not any(hook for module in model.modules() for hook in module._forward_pre_hooks)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for found in (model.state_dict(), fast.state_dict(), copy.deepcopy(fast).state_dict()):
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    shared = dict(model.named_parameters(remove_duplicate=False))
    for key, parameter in fast.named_parameters(remove_duplicate=False):
        assert parameter.data_ptr() == shared[key].data_ptr() and not parameter.requires_grad


@needs_mkl
def test_the_report_has_every_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1), nn.Flatten(), nn.Linear(32 * 36, 4))
    sparse(model)
    model[3].weight.data.fill_(1.0)
    report = hf_bimp.accelerate(model, torch.randn(2, 3, 8, 8), min_speedup=0).acceleration_report
    first, second, third = report.layers
    assert (first.name, first.shape, first.rows, first.chosen) == ("0", (16, 3, 3, 3), (2 * 64,), "dense")
    assert "3x3" in first.reason and first.dense_ms is None and first.csr_ms is None
    assert (second.shape, second.rows, second.chosen) == ((32, 16, 1, 1), (2 * 36,), "csr")
    assert second.dense_ms > 0 and second.csr_ms > 0 and second.sparsity == pytest.approx(0.9, abs=0.05)
    assert third.sparsity == 0 and third.rows == (2,) and "0% of its weights are zero" in third.reason
    assert report.threads == torch.get_num_threads() and report.processor and report.example == {"input": [2, 3, 8, 8]}
    assert str(report) == report.markdown() and "| 1 | 32 x 16 x 1 x 1 |" in str(report)
    assert report.to_dict()["layers"][1]["chosen"] == "csr"


@needs_mkl
def test_layers_are_chosen_by_what_is_measured(monkeypatch) -> None:
    for dense, other, chosen in ((1.1, 1.0, "csr"), (1.09, 1.0, "dense")):
        fake_clock(monkeypatch, dense, other)
        report = hf_bimp.accelerate(mlp(), torch.randn(5, 24)).acceleration_report
        assert [layer.chosen for layer in report.layers] == [chosen] * 2
        assert report.layers[0].dense_ms == pytest.approx(dense * 1e3)
    assert report.speedup == 1 and "no layer is faster" in report.reason and "1.09 times" in report.layers[0].reason


@needs_mkl
def test_a_model_that_is_not_faster_as_a_whole_stays_dense(monkeypatch) -> None:
    model, x = mlp(), torch.randn(5, 24)
    fake_clock(monkeypatch, 3.0, 1.0, whole=1.02)
    assert hf_bimp.accelerate(model, x).acceleration_report.speedup == 1.02
    fake_clock(monkeypatch, 3.0, 1.0, whole=1.01)
    fast = hf_bimp.accelerate(model, x)
    report = fast.acceleration_report
    assert report.speedup == 1 and report.dense_ms == report.accelerated_ms and report.extra_bytes == 0
    assert "1.01 times" in report.reason and all(layer.chosen == "dense" for layer in report.layers)
    assert not any(isinstance(module, CsrLayer) for module in fast.modules()) and torch.equal(fast(x), model(x))


def test_without_mkl_all_layers_stay_dense(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    report = hf_bimp.accelerate(mlp(), torch.randn(5, 24), min_speedup=0).acceleration_report
    assert "without MKL" in report.reason and {layer.chosen for layer in report.layers} == {"dense"}


def test_a_model_without_such_layers() -> None:
    fast = hf_bimp.accelerate(nn.Sequential(nn.ReLU()).eval(), torch.randn(2, 3))
    assert fast.acceleration_report.layers == [] and fast.acceleration_report.speedup == 1


@needs_mkl
def test_layers_that_are_not_called_stay_dense() -> None:
    model = mlp()
    model.unused = nn.Linear(8, 8)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    sparse(model)
    layers = {layer.name: layer for layer in hf_bimp.accelerate(model, torch.randn(2, 24)).acceleration_report.layers}
    assert "does not call it" in layers["unused"].reason and layers["unused"].rows == ()


# ---- Use ----


@needs_mkl
@pytest.mark.parametrize("name", ["t5", "gpt2"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate(name, beams) -> None:
    make, example = MODELS[name]
    model = make()
    fast = hf_bimp.accelerate(model, example(), min_speedup=0)
    prompt = ids(1, 4)
    told = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(fast.generate(prompt, **told), model.generate(prompt, **told))


@needs_mkl
def test_saved_copied_and_pickled(tmp_path) -> None:
    model, inputs = sparse(tiny_t5()), t5_inputs()
    fast = hf_bimp.accelerate(model, inputs, min_speedup=0)
    fast.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, CsrLayer) for module in loaded.modules())
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert loaded.lm_head.weight is loaded.shared.weight
    assert fast.lm_head.weight is fast.shared.weight is fast.encoder.embed_tokens.weight
    with torch.no_grad():
        expected = fast(**inputs).logits
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert any(isinstance(module, CsrLayer) for module in other.modules())
            assert torch.equal(other(**inputs).logits, expected)
            assert other.acceleration_report == fast.acceleration_report


@needs_mkl
def test_a_sparse_layer_tied_to_an_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    torch.manual_seed(0)
    model = Tied().eval()
    model.head.weight.data[torch.rand(50, 16) < 0.8] = 0
    fast = hf_bimp.accelerate(model, ids(2, 5), min_speedup=0)
    assert isinstance(fast.head, CsrLayer) and fast.head.weight is fast.embedding.weight
    assert close(fast(ids(3, 4)), model(ids(3, 4)))


@needs_mkl
def test_both_models_have_the_same_weights_when_the_given_one_is_trained_on() -> None:
    model, x = mlp(), torch.randn(5, 24)
    fast = hf_bimp.accelerate(model, x, min_speedup=0)
    before = fast(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(x).square().sum().backward()
    optimizer.step()
    assert not close(fast(x), before) and close(fast(x), model.eval()(x))


@needs_mkl
def test_input_gradients_and_training_mode_are_those_of_the_dense_model() -> None:
    model, x = mlp(), torch.randn(5, 24, requires_grad=True)
    fast = hf_bimp.accelerate(model, x.detach(), min_speedup=0)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    (gradient,) = torch.autograd.grad(fast(x).sum(), x)
    assert torch.allclose(gradient, expected) and torch.equal(fast.train()(x), model(x))


@needs_mkl
def test_the_given_model_trains_on_what_its_forward_caches() -> None:
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cached, self.calls = sparse(nn.Linear(8, 8)), None, []

        def forward(self, x):
            self.calls.append(len(x))
            self.cached = torch.ones(8) if self.cached is None else self.cached
            return self.linear(x) * self.cached

    model = Caching().eval()
    hf_bimp.accelerate(model, torch.randn(3, 8), min_speedup=0)
    assert model.cached is None and model.calls == []
    model.train()(torch.randn(3, 8)).sum().backward()
    assert model.linear.weight.grad is not None


@needs_mkl
def test_an_accelerated_model_is_exported_as_the_dense_one() -> None:
    model, x = mlp(), torch.randn(5, 24)
    fast = hf_bimp.accelerate(model, x, min_speedup=0)
    assert torch.equal(torch.export.export(fast, (x,)).module()(x), model(x))


@needs_mkl
def test_inputs_that_are_expanded_or_transposed() -> None:
    model = nn.Sequential(nn.Linear(24, 24))
    sparse(model)
    for x in (torch.randn(1, 24).expand(5, 24), torch.randn(24, 5).t(), torch.randn(2, 24, 3).transpose(1, 2)):
        fast = hf_bimp.accelerate(model, x, min_speedup=0)
        assert close(fast(x), model(x)) and fast(x).is_contiguous()


# ---- Refused ----


def test_what_cannot_be_accelerated_is_refused_with_the_way_out() -> None:
    x = torch.randn(5, 24)
    with pytest.raises(ValueError, match="cannot be accelerated while .*training mode. Call model.eval"):
        hf_bimp.accelerate(mlp().train(), x)
    with pytest.raises(ValueError, match="bfloat16.*Call model.float"):
        hf_bimp.accelerate(mlp().bfloat16(), x)
    with pytest.raises(ValueError, match="float16.*Call model.float"):
        hf_bimp.accelerate(mlp().half(), x)
    with pytest.raises(ValueError, match="is on meta.*Call model.cpu"):
        hf_bimp.accelerate(mlp().to("meta"), x)
    with pytest.raises(ValueError, match="torch.compile"):
        hf_bimp.accelerate(torch.compile(mlp()), x)
    compiled = mlp()
    compiled.compile()
    with pytest.raises(ValueError, match="torch.compile"):
        hf_bimp.accelerate(compiled, x)
    with pytest.raises(ValueError, match="does not take the example_inputs"):
        hf_bimp.accelerate(mlp(), torch.randn(5, 23))
    with pytest.raises(ValueError, match="no tensor with a row in them. Give a batch, such as"):
        hf_bimp.accelerate(mlp(), torch.randn(0, 24))
    with pytest.raises(ValueError, match="must be an nn.Module, not a dict"):
        hf_bimp.accelerate({}, x)
    for odd in (-1, float("nan"), "1.1"):
        with pytest.raises(ValueError, match="min_speedup=.* must be a number"):
            hf_bimp.accelerate(mlp(), x, min_speedup=odd)
    pruned = mlp()
    nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ValueError, match="torch.nn.utils.prune"):
        hf_bimp.accelerate(pruned, x)


@needs_mkl
def test_an_accelerated_model_is_refused() -> None:
    fast = hf_bimp.accelerate(mlp(), torch.randn(5, 24), min_speedup=0)
    with pytest.raises(ValueError, match="accelerated already"):
        hf_bimp.accelerate(fast, torch.randn(5, 24))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # from within peft
def test_adapters_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    with pytest.raises(ValueError, match="PEFT models are not supported.*merge_and_unload"):
        hf_bimp.accelerate(model, {"input_ids": ids(1, 4)})


@needs_mkl
def test_other_outputs_are_an_error(monkeypatch) -> None:
    monkeypatch.setattr("hf_bimp.deployment.csr.to_csr", lambda matrix: (1.001 * matrix).to_sparse_csr())
    with pytest.raises(RuntimeError, match=r"outputs differ by .*e-0\d of their largest magnitude, where 1e-05"):
        hf_bimp.accelerate(mlp(), torch.randn(5, 24), min_speedup=0)
