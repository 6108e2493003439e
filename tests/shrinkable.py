"""Models of the kinds that filter pruning meets, small, with the helpers that prune some of their filters."""

from collections.abc import Callable

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_bimp.models  # noqa: F401  registers the CIFAR models with timm
from hf_bimp.pruning.structured.filters import FilterGroup
from hf_bimp.pruning.structured.tracing import Inputs


class ConcatAndFlatten(nn.Module):
    """Two branches side by side, one of them twice; a transposed and a depthwise convolution; maps made flat."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(14)
        self.up = nn.ConvTranspose2d(14, 8, 2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 5, 2, stride=2)
        self.hidden = nn.Linear(5 * 16, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        right = self.right(x)
        x = self.norm(torch.cat([right, self.left(x), right], dim=1)).relu()
        x = self.down(self.depthwise(self.up(x)).relu())
        return self.last(self.hidden(x.flatten(1)).relu())


def images(size: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def image_dict(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": images(32)(seed), "labels": torch.tensor([seed % 5, 1])}


def tokens(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(2, 50, (2, length), generator=generator) for length in (7, 5)]
    return {"input_ids": draw[0], "labels": draw[1]}


def text(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed)["input_ids"]}


def t5(activation: str) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj=activation
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))


def llama() -> LlamaForCausalLM:
    """Six heads of queries over three of keys and values."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
        num_labels=5,
    )
    return BertForSequenceClassification(config)


def vit(**changes: float) -> ViTForImageClassification:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 20}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**(sizes | heads | changes)))


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5
    )


def swin() -> SwinForImageClassification:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return SwinForImageClassification(config)


def timm_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=5,
    )


def maxvit(name: str) -> nn.Module:
    return timm.create_model(name, img_size=64, embed_dim=(32, 32, 64, 64), depths=(1, 1, 1, 1), num_classes=5)


def hf_resnet() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=5)
    )


# How to make each, and its inputs from a seed.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "concat": (ConcatAndFlatten, images(4)),
    "cifar_resnet20": (lambda: timm.create_model("cifar_resnet20"), images(16)),
    "cifar_resnet18": (lambda: timm.create_model("cifar_resnet18"), images(8)),
    "cifar_vgg16_bn": (lambda: timm.create_model("cifar_vgg16_bn"), images(32)),
    "cifar_wrn": (lambda: timm.create_model("cifar_wrn28_10", depth=10, widen=1), images(16)),
    "resnet50": (lambda: timm.create_model("resnet50", num_classes=7), images(32)),
    "mobilenet": (lambda: timm.create_model("mobilenetv2_050"), images(32)),
    "maxvit": (lambda: maxvit("maxvit_rmlp_pico_rw_256"), images(64)),
    "maxvit_tf": (lambda: maxvit("maxvit_tiny_tf_224"), images(64)),
    "pspnet": (lambda: smp.PSPNet("resnet18", encoder_weights=None, classes=5), images(48)),
    "deeplabv3": (lambda: smp.DeepLabV3("resnet18", encoder_weights=None, classes=5), images(32)),
    "hf_resnet": (hf_resnet, image_dict),
    "t5_relu": (lambda: t5("relu"), tokens),
    "t5_gated": (lambda: t5("gated-gelu"), tokens),
    "gpt2": (gpt2, text),
    "llama": (llama, text),
    "bert": (bert, text),
    "vit": (vit, image_dict),
    "timm_vit": (timm_vit, images(32)),
    "swin": (swin, image_dict),
    "timm_swin": (timm_swin, images(32)),
}


@torch.no_grad()
def make(name: str) -> nn.Module:
    """The model in evaluation mode, nothing left at the zeros and ones of its initialisation."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.4, 1.2)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def zero_half(model: nn.Module, groups: list[FilterGroup]) -> list[Tensor]:
    """Zeroes half of the channels of every group, by indexing that owes nothing to the library; which ones."""
    parameters, chosen = dict(model.named_parameters()), []
    generator = torch.Generator().manual_seed(1)
    for group in groups:
        channels = torch.randperm(group.size, generator=generator)[: group.size // 2]
        for rows in group.weights + group.attached:
            for place in rows.index[channels].flatten().tolist():
                parameters[rows.name].select(rows.dim, place).zero_()
        chosen.append(channels)
    return chosen


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(inputs, dict):
            result = model(**inputs)
            return [result[key] for key in ("loss", "logits") if key in result]
        return [model(inputs)]
