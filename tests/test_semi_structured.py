"""2:4: what sparse tensor cores can run is told right, and pruning groups the inputs that they want. On the CPU."""

import itertools

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import hf_bimp
from hf_bimp.deployment import semi_structured


def pruned(model: nn.Module, granularity: str = "2:4") -> nn.Module:
    masks, _ = hf_bimp.make_masks(model, lambda: None, granularity)
    n, m = map(int, granularity.split(":"))
    masks.prune(1 - n / m)
    return model.eval()


def only(model: nn.Module) -> semi_structured.SemiStructuredLayer:
    (layer,) = hf_bimp.check_semi_structured(nn.Sequential(model)).layers
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pruned_layers_can_run(kind, dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96) if kind == "linear" else Conv1D(96, 128)
    found = only(pruned(nn.Sequential(layer))[0].to(dtype))
    assert found.can_run and found.is_2_of_4 and found.reasons == () and found.backends == ("cuSPARSELt", "CUTLASS")
    assert found.shape == (96, 128) and found.kind == type(layer).__name__ and found.dtype == str(dtype)[6:]


@pytest.mark.parametrize(
    ("inputs", "outputs", "backends"),
    [
        (64, 32, ("cuSPARSELt", "CUTLASS")),
        (32, 32, ("cuSPARSELt",)),
        (64, 16, ("cuSPARSELt",)),
        (48, 48, ("cuSPARSELt",)),
        (64, 24, ()),
        (24, 64, ()),
        (8, 8, ()),
    ],
)
def test_sizes(inputs, outputs, backends) -> None:
    """As torch's own check has them, which is run here but for the device."""
    layer = pruned(nn.Sequential(nn.Linear(inputs, outputs)))[0].half()
    found = only(layer)
    assert found.backends == backends and found.can_run == bool(backends)
    if not backends:
        assert found.reasons == (
            f"{outputs} x {inputs} are no multiples of 16 x 16 (cuSPARSELt) or 32 x 64 (CUTLASS)",
        )
    for name, backend in semi_structured.BACKENDS.items():
        limits = backend._DTYPE_SHAPE_CONSTRAINTS[torch.float16]
        fits = outputs % limits.sparse_min_rows == 0 and inputs % limits.sparse_min_cols == 0
        assert fits == (name in backends)


def test_every_reason_is_told() -> None:
    torch.manual_seed(0)
    dense = only(nn.Linear(24, 30))
    assert not dense.can_run and [reason.split()[0] for reason in dense.reasons] == ["not", "30", "it"]
    assert "call model.half()" in dense.reasons[2]
    conv = only(pruned(nn.Sequential(nn.Conv2d(16, 16, 3)))[0].half())
    assert conv.is_2_of_4 and not conv.can_run and "TensorRT takes convolutions" in conv.reasons[0]
    weird = only(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    assert weird.reasons == ("its weight is computed anew at each access",)


def test_what_is_no_model_is_refused() -> None:
    for call in (hf_bimp.check_semi_structured, hf_bimp.to_semi_structured):
        with pytest.raises(ValueError, match="must be an nn.Module, not a str"):
            call("gpt2")


def test_one_weight_too_many_is_seen() -> None:
    layer = pruned(nn.Sequential(nn.Linear(64, 32)))[0].half()
    assert only(layer).can_run
    row, column = (layer.weight == 0).nonzero()[-1].tolist()
    layer.weight.data[row, column] = 1.0
    assert not only(layer).can_run and "two of every four" in only(layer).reasons[0]


def test_a_sparse_head_that_is_an_embedding_too_stays() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    model.head.weight.data[:, ::2] = 0
    (found,) = hf_bimp.check_semi_structured(model.half()).layers
    assert found.is_2_of_4 and found.reasons == ("its weight is shared with another module, such as an embedding",)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16))


def test_a_report_of_a_whole_model() -> None:
    report = hf_bimp.check_semi_structured(pruned(gpt2()).half())
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert report.can_run == [f"transformer.h.0.{name}" for name in names]
    assert "4 of 5 layers can run" in str(report)
    assert "| transformer.h.0.mlp.c_fc | Conv1D 256 x 64 | float16 | yes |" in str(report)
    assert [layer["name"] for layer in report.to_dict()["layers"]][-1] == "lm_head"
    if not torch.cuda.is_available():
        assert report.reasons == ["torch sees no CUDA GPU"]


def test_the_pattern_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, dim in (((3, 8), 1), ((8, 3), 0), ((2, 8, 2, 2), 1), ((8, 2, 2, 1), 0)):
        for _ in range(20):
            weight = (torch.rand(shape, generator=generator) < 0.3).float()
            moved = weight.movedim(dim, -1)
            expected = True
            for place in itertools.product(*map(range, moved.shape[:-1])):
                row = moved[place].tolist()
                expected &= all(sum(value != 0 for value in row[i : i + 4]) <= 2 for i in range(0, 8, 4))
            assert semi_structured.is_2_of_4(weight, dim, 8) == expected


# ---- Conversion ----


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_conversion_is_refused() -> None:
    with pytest.raises(RuntimeError, match="compute capability 8.0 or more.*sees no CUDA GPU"):
        hf_bimp.to_semi_structured(pruned(gpt2()).half())


def test_an_older_gpu_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old")
    with pytest.raises(RuntimeError, match="Old has compute capability 7.5"):
        hf_bimp.to_semi_structured(pruned(gpt2()).half())


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """All but torch's own compression, which needs the GPU: it is left out."""
    monkeypatch.setattr(semi_structured, "_why_not_here", list)
    for backend in semi_structured.BACKENDS.values():
        monkeypatch.setattr(backend, "from_dense", staticmethod(lambda weight: weight.clone()))


def test_what_is_on_the_cpu_dense_or_in_training_is_refused(as_on_a_gpu) -> None:
    with pytest.raises(ValueError, match="is not on a GPU. Call model.cuda"):
        hf_bimp.to_semi_structured(pruned(gpt2()).half())
    with pytest.raises(ValueError, match="no layer that can run on sparse tensor cores(.|\n)*not two of every four"):
        hf_bimp.to_semi_structured(gpt2().half().eval())
    with pytest.raises(ValueError, match="cannot be converted while it is in training mode"):
        hf_bimp.to_semi_structured(pruned(gpt2()).train())


def test_converted_layers_compute_the_same(as_on_a_gpu, monkeypatch) -> None:
    monkeypatch.setattr(nn.Parameter, "is_cuda", property(lambda self: True), raising=False)
    model = pruned(gpt2()).bfloat16()
    fast = hf_bimp.to_semi_structured(model)
    assert fast.semi_structured_report.can_run and isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)
    ids = torch.randint(0, 64, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, atol=0.05, rtol=0.05)
    assert type(fast.transformer.h[0].mlp.c_fc) is nn.Linear and not fast.training
    assert fast.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU")
def test_on_a_gpu() -> None:
    model = pruned(gpt2()).half().cuda()
    fast = hf_bimp.to_semi_structured(model)
    ids = torch.randint(0, 64, (8, 16), device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, atol=0.02, rtol=0.02)


# ---- Pruning along the inputs of one output ----

LAYERS = {
    "linear": lambda: nn.Linear(16, 6),
    "conv1d of transformers": lambda: Conv1D(6, 16),
    "convolution": lambda: nn.Conv2d(8, 6, 3),
    "grouped": lambda: nn.Conv2d(16, 4, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3),
    "grouped transposed": lambda: nn.ConvTranspose2d(16, 4, 3, groups=2),
}


def inputs_of_outputs(layer: nn.Module) -> list[torch.Tensor]:
    """Flat indices of the weights that one output reads at one place of the kernel, in the order of the inputs."""
    index = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    if isinstance(layer, Conv1D):
        return list(index.t())
    if isinstance(layer, nn.Linear):
        return list(index)
    if isinstance(layer, nn.ConvTranspose2d):
        parts = index.chunk(layer.groups)
        return [part[:, o, y, x] for part in parts for o in range(index.shape[1]) for y in range(3) for x in range(3)]
    return [row[:, y, x] for row in index for y in range(3) for x in range(3)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", ["2:4", "1:2", "2:8"])
def test_of_every_m_inputs_of_an_output_n_stay(name, granularity) -> None:
    torch.manual_seed(0)
    n, m = map(int, granularity.split(":"))
    layer = LAYERS[name]()
    before = layer.weight.detach().clone().flatten()
    pruned(nn.Sequential(layer), granularity)
    after = layer.weight.detach().flatten()
    for places in inputs_of_outputs(layer):
        for block in places.split(m):
            kept = sorted(block.tolist(), key=lambda i: float(before[i].abs()))[m - n :]
            assert {i for i in block.tolist() if after[i] != 0} == set(kept)
    assert only(layer).is_2_of_4  # 1 of 2 and 2 of 8 are 2 of 4 as well


def test_depthwise_and_narrow_groups_stay_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ConvTranspose2d(16, 8, 3, groups=8)
    )
    model.append(nn.Linear(8, 4))
    masks, dense = hf_bimp.make_masks(model, lambda: None, "2:4")
    assert list(masks.weights) == ["3.weight"]
    assert dense == {
        f"{i}.weight": f"its {inputs} inputs do not divide by 4" for i, inputs in ((0, 1), (1, 1), (2, 2))
    }
