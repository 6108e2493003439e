"""Compressed checkpoints: loaded by Transformers as the plain ones they were made of, small, refused if damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_bimp
from helpers import classification_items, classifier, run_arguments, tiny_t5, translation_items
from hf_bimp.deployment.compressed_files import read_compressed
from processes import output_of, run

BERT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
EXPERTS = dict(num_key_value_heads=2, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=100)


def sparse(model: nn.Module, share: float = 0.9) -> nn.Module:
    """90 % of all matrices but embeddings set to zero, by magnitude."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and id(weight) not in embeddings:
                count = round(share * weight.numel())
                weight.view(-1)[weight.abs().view(-1).argsort()[:count]] = 0
    return model.eval()


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    models = {
        "bert": lambda: BertForMaskedLM(BertConfig(**BERT)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_attention_heads=4, num_local_experts=4, **EXPERTS)),
        "qwen2_moe": lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                num_attention_heads=4,
                num_experts=4,
                moe_intermediate_size=64,
                shared_expert_intermediate_size=64,
                **EXPERTS,
            )
        ),
    }
    return sparse(models[kind]())


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same(one: nn.Module | dict, other: nn.Module | dict) -> None:
    one, other = (each if isinstance(each, dict) else each.state_dict() for each in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(as_bytes(tensor), as_bytes(other[name])), name


@pytest.fixture
def without_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)


# ---- Loading by Transformers ----


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_as_the_plain_model(tmp_path: Path, kind: str, shard: str, dtype: torch.dtype) -> None:
    """Tied weights, shards and merged experts, to the bit, and without a trace."""
    model = made(kind).to(dtype)
    model.save_pretrained(tmp_path / "plain", max_shard_size=shard)
    hf_bimp.compress(tmp_path / "plain", tmp_path / "small")
    plain = type(model).from_pretrained(tmp_path / "plain")
    loaded, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, plain)
    traces = {"hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"}
    assert vars(loaded).keys() == vars(plain).keys() - traces
    assert loaded.config.to_dict() | {"_name_or_path": ""} == plain.config.to_dict() | {"_name_or_path": ""}
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded.config, "_is_quantized")
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert len({p.data_ptr() for p in loaded.parameters()}) == len({p.data_ptr() for p in plain.parameters()})
    loaded.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    plain.save_pretrained(tmp_path / "expected")
    assert_same(saved, load_file(tmp_path / "expected" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["t5", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto", "bfloat16"])
def test_types_asked_for_at_loading(tmp_path: Path, kind: str, dtype: torch.dtype | str) -> None:
    """T5 keeps some layers in float32, and says so to Transformers alone."""
    made(kind).save_pretrained(tmp_path / "plain")
    hf_bimp.compress(tmp_path / "plain", tmp_path / "small")
    kind = type(made(kind))
    plain, small = (kind.from_pretrained(tmp_path / name, dtype=dtype) for name in ("plain", "small"))
    assert_same(small, plain)
    assert_same(kind.from_pretrained(tmp_path / "small", torch_dtype=dtype), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "torch.float64"])
def test_types_asked_for_at_compressing(tmp_path: Path, dtype: torch.dtype | str) -> None:
    model = made("t5")
    hf_bimp.compress(model, tmp_path, dtype=dtype)
    kind = getattr(torch, str(dtype).removeprefix("torch."))
    loaded = hf_bimp.load_compressed(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].to(kind), weight.to(kind)), name
    assert loaded.dtype == kind
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_bits_that_are_no_usual_numbers(tmp_path: Path) -> None:
    model = made("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, float("inf"), float("-inf"), 1e-44])
        weight.view(torch.int32)[1, :2] = torch.tensor([0x7FC01234, -0x3FEDCC])  # NaNs with payloads
        model.bert.encoder.layer[1].output.dense.weight.mul_(-1)  # negative zeros
    hf_bimp.compress(model, tmp_path)
    assert_same(hf_bimp.load_compressed(tmp_path), model)


def test_trains_converts_and_saves_plainly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparse(BertForSequenceClassification(BertConfig(num_labels=2, **BERT)))
    hf_bimp.compress(model, tmp_path / "small")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    items = [{"input_ids": torch.arange(5, 13) + i, "labels": i % 2} for i in range(16)]
    args = TrainingArguments(**run_arguments(tmp_path / "run", save_strategy="epoch", num_train_epochs=1))
    Trainer(model=loaded, args=args, train_dataset=items).train()
    assert not torch.equal(loaded.classifier.weight, model.classifier.weight)
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    assert "quantization_config" not in json.loads((checkpoint / "config.json").read_text())
    assert_same(BertForSequenceClassification.from_pretrained(checkpoint), loaded)
    assert loaded.half().dtype == torch.float16 and loaded.to(torch.bfloat16).dtype == torch.bfloat16


def test_a_base_model_a_head_and_another_number_of_labels(tmp_path: Path) -> None:
    """What Transformers adds, drops and reinitialises it does with compressed checkpoints too."""
    model = made("bert")
    hf_bimp.compress(model, tmp_path / "small")
    assert_same(BertModel.from_pretrained(tmp_path / "small", add_pooling_layer=False), model.bert)
    assert type(AutoModel.from_pretrained(tmp_path / "small")) is BertModel
    _, info = BertForSequenceClassification.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert "classifier.weight" in info["missing_keys"]
    hf_bimp.compress(sparse(BertForSequenceClassification(BertConfig(num_labels=70, **BERT))), tmp_path / "labels")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(tmp_path / "labels", num_labels=3)
    other = BertForSequenceClassification.from_pretrained(
        tmp_path / "labels", num_labels=3, ignore_mismatched_sizes=True
    )
    assert other.classifier.weight.shape == (3, 64) and other.classifier.weight.abs().sum() > 0


def test_device_maps(tmp_path: Path) -> None:
    for kind in ("bert", "mixtral"):
        model = made(kind)
        hf_bimp.compress(model, tmp_path / kind)
        assert_same(type(model).from_pretrained(tmp_path / kind, device_map="cpu"), model)
    offloaded = type(model).from_pretrained(
        tmp_path / "mixtral",
        device_map={"model.layers.0": "disk"}
        | dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
        offload_folder=tmp_path / "offload",
    )
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, model(ids).logits)


LOAD = """
import sys
import hf_bimp
import torch
from transformers import AutoModelForMaskedLM, pipeline

model = AutoModelForMaskedLM.from_pretrained(sys.argv[1])
expected = torch.load(sys.argv[2], weights_only=True)
assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
"""
LOAD_PLAIN = """
import sys
from transformers import AutoModelForMaskedLM, AutoModelForCausalLM

kind = {"bert": AutoModelForMaskedLM, "mixtral": AutoModelForCausalLM}[sys.argv[2]]
model = kind.from_pretrained(sys.argv[1])
print("LOADED")
"""


def test_other_processes_with_hf_bimp(tmp_path: Path) -> None:
    model = made("bert")
    hf_bimp.compress(model, tmp_path / "small")
    torch.save(model.state_dict(), tmp_path / "expected.pt")
    output_of(sys.executable, "-c", LOAD, tmp_path / "small", tmp_path / "expected.pt")


@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_without_hf_bimp_loading_ends_in_an_error_of_sizes(tmp_path: Path, kind: str) -> None:
    """And not in random weights with a warning."""
    hf_bimp.compress(made(kind), tmp_path / "small")
    done = run(sys.executable, "-c", LOAD_PLAIN, tmp_path / "small", kind)
    assert done.returncode != 0 and "LOADED" not in done.stdout
    assert "RuntimeError" in done.stderr
    assert ("size" if kind == "bert" else "CONVERSION") in done.stderr


def test_pipeline(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1")
    torch.manual_seed(0)
    sparse(BertForSequenceClassification(BertConfig(**BERT))).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    hf_bimp.compress(tmp_path / "plain", tmp_path / "small")
    plain, small = (pipeline("text-classification", str(tmp_path / name)) for name in ("plain", "small"))
    assert small("w3 w4 w5") == plain("w3 w4 w5")


# ---- Other libraries ----


@pytest.mark.parametrize("kind", ["timm", "own", "smp"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_models_of_timm_and_smp(tmp_path: Path, kind: str, dtype: torch.dtype | None) -> None:
    import segmentation_models_pytorch as smp
    import timm

    import hf_bimp.models  # noqa: F401

    makers = {
        "timm": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32),
        "own": lambda: timm.create_model("cifar_resnet20", num_classes=5),
        "smp": lambda: smp.Unet("resnet18", encoder_weights=None, classes=3),
    }
    torch.manual_seed(0)
    model = sparse(makers[kind]())
    report = hf_bimp.compress(model, tmp_path, dtype)
    loaded = hf_bimp.load_compressed(tmp_path)
    assert type(loaded) is type(model) and not loaded.training and report.ratio < 0.2
    assert_same(loaded, model if dtype is None else model.to(dtype))


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    """Its weights come as a state dict, or into a copy of the architecture."""
    model = nn.Sequential(nn.Linear(50, 60), nn.BatchNorm1d(60), nn.Conv1d(60, 8, 3))
    model.register_buffer("bytes", torch.arange(200, dtype=torch.uint8))
    model.tied = model[0]
    model.eval()
    sparse(model)
    hf_bimp.compress(model, tmp_path)
    state = hf_bimp.load_compressed(tmp_path)
    assert_same(state, model)
    fresh = nn.Sequential(nn.Linear(50, 60), nn.BatchNorm1d(60), nn.Conv1d(60, 8, 3))
    fresh.register_buffer("bytes", torch.zeros(200, dtype=torch.uint8))
    fresh.tied = fresh[0]
    before = fresh[0].weight.clone()
    filled = hf_bimp.load_compressed(tmp_path, fresh)
    assert_same(filled, model)
    assert filled.tied is filled[0] and torch.equal(fresh[0].weight, before)
    with pytest.raises(ValueError, match="another architecture than Linear"):
        hf_bimp.load_compressed(tmp_path, nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_shrunk_models(tmp_path: Path) -> None:
    model = made("t5")
    with torch.no_grad():
        for block in [*model.encoder.block, *model.decoder.block]:
            block.layer[-1].DenseReluDense.wi.weight[:64] = 0
    ids = torch.arange(6)[None]
    small = hf_bimp.shrink(model, {"input_ids": ids, "decoder_input_ids": ids})
    hf_bimp.save_shrunk(small, tmp_path / "shrunk")
    hf_bimp.compress(tmp_path / "shrunk", tmp_path / "of-folder")
    hf_bimp.compress(small, tmp_path / "of-model")
    for name in ("of-folder", "of-model"):
        assert_same(hf_bimp.load_compressed(tmp_path / name), small)
    hf_bimp.compress(small, tmp_path / "half", dtype="bfloat16")
    assert hf_bimp.load_compressed(tmp_path / "half").dtype == torch.bfloat16


# ---- Folders of runs ----


def test_the_final_folder_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = hf_bimp.BIMPSeq2SeqArguments(
        **run_arguments(out, save_strategy="epoch", num_train_epochs=2, target_sparsity=0.75)
    )
    trainer = hf_bimp.BIMPSeq2SeqTrainer(model=tiny_t5(), args=args, train_dataset=translation_items())
    trainer.train()
    trainer.create_model_card()
    (out / "sub").mkdir()
    (out / "sub" / "more.txt").write_text("more")
    report = hf_bimp.compress(out, out / "small")  # inside of what is compressed
    left = {path.relative_to(out / "small").as_posix() for path in (out / "small").rglob("*") if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md", "sub/more.txt"} <= left
    assert not {name for name in left if "checkpoint-" in name or "optimizer" in name or "bimp_files" in name}
    assert report.compact_tensors > 0 and "import hf_bimp\nfrom" in (out / "small" / "README.md").read_text()
    assert_same(T5ForConditionalGeneration.from_pretrained(out / "small"), trainer.model)
    checkpoint = next(out.glob("checkpoint-*"))
    hf_bimp.compress(checkpoint, tmp_path / "of-checkpoint")
    assert not list((tmp_path / "of-checkpoint").glob("*.pt")) and not list((tmp_path / "of-checkpoint").glob("rng*"))
    assert_same(
        T5ForConditionalGeneration.from_pretrained(tmp_path / "of-checkpoint"),
        T5ForConditionalGeneration.from_pretrained(checkpoint),
    )


def test_the_final_folder_of_a_plain_module(tmp_path: Path) -> None:
    args = hf_bimp.BIMPArguments(**run_arguments(tmp_path / "out", save_strategy="epoch", target_sparsity=0.75))
    trainer = hf_bimp.BIMPTrainer(model=classifier(), args=args, train_dataset=classification_items())
    trainer.train()
    hf_bimp.compress(tmp_path / "out", tmp_path / "small")
    assert_same(hf_bimp.load_compressed(tmp_path / "small"), trainer.model)


# ---- Sizes ----


def test_sizes_of_a_90_percent_sparse_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = dict(BERT, hidden_size=384, intermediate_size=1536, max_position_embeddings=8)
    sparse(BertModel(BertConfig(**sizes))).save_pretrained(tmp_path / "plain")
    dense = (tmp_path / "plain" / "model.safetensors").stat().st_size
    embeddings = 4 * 384 * (100 + 8 + 2)
    report = hf_bimp.compress(tmp_path / "plain", tmp_path / "zstd")
    file = (tmp_path / "zstd" / "model.safetensors").stat().st_size
    assert file == report.compressed_bytes and (file - embeddings) / (dense - embeddings) <= 0.11
    assert report.embedding_bytes == embeddings and report.compression == "zstd"
    assert report.cap == pytest.approx(report.dense_bytes / embeddings)
    assert f"caps it at {report.cap:.2f} times" in str(report)
    assert f"{report.dense_bytes / file:.2f} times smaller" in str(report)
    hf_bimp.compress(tmp_path / "plain", tmp_path / "none", level=None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert hf_bimp.compress(tmp_path / "plain", tmp_path / "missing").compression is None
    for name in ("none", "missing"):
        file = (tmp_path / name / "model.safetensors").stat().st_size
        assert (file - embeddings) / (dense - embeddings) <= 0.13
        assert_same(AutoModel.from_pretrained(tmp_path / name), AutoModel.from_pretrained(tmp_path / "plain"))
    for load in (hf_bimp.load_compressed, AutoModel.from_pretrained):
        with pytest.raises(ImportError, match="zstandard"):
            load(tmp_path / "zstd")


def test_plain_tensors_stay_plain_and_aligned(tmp_path: Path) -> None:
    """Dense, small, one-dimensional and integer ones are read by any reader of safetensors."""
    tensors = {
        "dense": torch.randn(33, 7).bfloat16(),
        "vector": torch.zeros(1000),
        "tiny": torch.zeros(2, 3),
        "numbers": torch.zeros(40, 40, dtype=torch.int64),
        "flags": torch.zeros(5, dtype=torch.bool),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(101),
        "zeros": torch.zeros(64, 65, dtype=torch.float64),
    }
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    report = hf_bimp.compress(tmp_path / "plain", tmp_path / "small")
    raw = load_file(tmp_path / "small" / "model.safetensors")
    compact = {name for name, tensor in raw.items() if tensor.dtype == torch.uint8}
    assert compact == {"sparse", "zeros"} and report.compact_tensors == 2
    assert_same(
        {n: t for n, t in raw.items() if n not in compact}, {n: t for n, t in tensors.items() if n not in compact}
    )
    assert_same(hf_bimp.load_compressed(tmp_path / "small"), tensors)
    content = (tmp_path / "small" / "model.safetensors").read_bytes()
    start = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + start])
    sizes = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "U8": 1, "BOOL": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, name
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "hf_bimp_compact": "1"}


STREAMED = """
import resource, sys
import torch
import hf_bimp
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hf_bimp.compress(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.randn(1024, 2048) * (torch.rand(1024, 2048) < 0.1) for i in range(24)}  # 8 MB each
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    kilobytes = int(output_of(sys.executable, "-c", STREAMED, tmp_path / "plain", tmp_path / "small"))
    assert kilobytes < 60_000


# ---- Refused, before anything is written ----


def test_refusals(tmp_path: Path) -> None:
    model, out = made("bert"), tmp_path / "out"
    model.save_pretrained(tmp_path / "plain")
    hf_bimp.compress(model, tmp_path / "small")
    before = sorted(tmp_path.iterdir())
    attempts = [
        ((model.train(), out), "training mode"),
        ((tmp_path / "none", out), "is no folder"),
        ((tmp_path, out), "has neither model.safetensors nor"),
        ((tmp_path / "plain", tmp_path / "plain"), "is the folder to compress"),
        ((tmp_path / "small", out), "is compressed already"),
        ((3, out), "must be an nn.Module or a folder"),
        ((tmp_path / "plain", out, "int8"), "dtype='int8' is none of"),
        ((tmp_path / "plain", out, torch.int8), "dtype=torch.int8 is none of"),
        ((tmp_path / "plain", out, None, 0), "level=0 must be from 1 to 22"),
        ((tmp_path / "plain", out, None, 23), "level=23 must be"),
        ((tmp_path / "plain", out, None, True), "level=True must be"),
        ((tmp_path / "small", tmp_path / "plain"), "compressed already"),
        ((tmp_path / "plain", tmp_path / "plain" / "config.json"), "is a file"),
    ]
    for arguments, message in attempts:
        with pytest.raises(ValueError, match=message):
            hf_bimp.compress(*arguments)
    with pytest.raises(ValueError, match="holds model.safetensors, weights that are not"):
        hf_bimp.compress(model.eval(), tmp_path / "plain")
    assert sorted(tmp_path.iterdir()) == before
    hf_bimp.compress(model, tmp_path / "small", level=None)  # its own folder may be written again
    assert_same(hf_bimp.load_compressed(tmp_path / "small"), model)
    for load in (tmp_path / "plain", tmp_path / "none"):
        with pytest.raises(ValueError, match="of hf_bimp.compress|hf_bimp.compress has written"):
            hf_bimp.load_compressed(load)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
def test_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(made("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    with pytest.raises(ValueError, match="PEFT"):
        hf_bimp.compress(model, tmp_path / "out")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapters of PEFT"):
        hf_bimp.compress(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_out_of_range_leave_nothing_behind(tmp_path: Path) -> None:
    model = made("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="beyond 65,504.*bfloat16"):
        hf_bimp.compress(model, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_shards_that_are_missing(tmp_path: Path) -> None:
    made("bert").save_pretrained(tmp_path / "plain", max_shard_size="40KB")
    next((tmp_path / "plain").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is not whole: model.safetensors.index.json names"):
        hf_bimp.compress(tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Damaged files ----


def test_damage_names_file_and_tensor(tmp_path: Path) -> None:
    hf_bimp.compress(made("bert"), tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    whole, name = path.read_bytes(), "bert.encoder.layer.0.output.dense.weight"
    start = 8 + int.from_bytes(whole[:8], "little")
    begin, end = json.loads(whole[8:start])[name]["data_offsets"]
    blob = whole[start + begin : start + end]
    flipped = blob[:400] + bytes([blob[400] ^ 4]) + blob[401:]
    huge = blob.replace(b'"shape":[64,128]', b'"shape":[64,999]')
    for damaged in (flipped, huge, b"x" + blob[1:]):
        path.write_bytes(whole[: start + begin] + damaged + whole[start + end :])
        for load in (hf_bimp.load_compressed, AutoModelForMaskedLM.from_pretrained):
            with pytest.raises(ValueError, match=f"model.safetensors: tensor '{name}' is damaged"):
                load(tmp_path / "small")
        with pytest.raises(ValueError, match="is damaged"):
            read_compressed(path)
    path.write_bytes(whole[: len(whole) // 2])
    for load in (hf_bimp.load_compressed, AutoModelForMaskedLM.from_pretrained):
        with pytest.raises(ValueError, match="model.safetensors is no whole safetensors file"):
            load(tmp_path / "small")


def test_experts_that_are_damaged(tmp_path: Path) -> None:
    hf_bimp.compress(made("mixtral"), tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    name = next(n for n in json.loads(whole[8:start]) if ".experts.1." in n)
    begin, _ = json.loads(whole[8:start])[name]["data_offsets"]
    place = start + begin + 500
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=f"tensor '{name}' is damaged: its checksum"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_versions_to_come(tmp_path: Path) -> None:
    hf_bimp.compress(made("bert"), tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "hf_bimp", "format": "compact", "version": 1}
    config["quantization_config"]["version"] = 2
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version=2.*Upgrade hf_bimp"):
        BertForMaskedLM.from_pretrained(tmp_path / "small")


@pytest.mark.slow
def test_importing_it_twice_registers_once() -> None:
    forget = "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('hf_bimp')]"
    program = f"import sys, hf_bimp; {forget}; import hf_bimp"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_failure_in_the_middle_leaves_the_folder_before(tmp_path: Path) -> None:
    model = made("bert")
    hf_bimp.compress(model, tmp_path / "small")
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight[0, 0] = 1e30
    with pytest.raises(ValueError, match="beyond 65,504"):
        hf_bimp.compress(model, tmp_path / "small", dtype=torch.float16)
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before


def test_a_model_that_is_given_is_left_alone(tmp_path: Path) -> None:
    model = made("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    report = hf_bimp.compress(model, tmp_path, "bfloat16")
    assert torch.equal(torch.get_rng_state(), state) and not hasattr(model.config, "quantization_config")
    assert_same(model, before)
    assert json.loads(json.dumps(report.to_dict()))["ratio"] == report.ratio
    assert_same(hf_bimp.load_compressed(tmp_path, model), hf_bimp.load_compressed(tmp_path))
