"""Every family of models: filters are pruned in a run, which resumes, saves, loads again and shrinks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from helpers import run_arguments, translation_items
from hf_bimp import BIMPArguments, BIMPTrainer, load_shrunk, save_shrunk, shrink
from hf_bimp.storage.model_formats import library_of, loading_code
from shrinkable import hf_resnet, swin, t5, timm_vit, vit
from trainers import assert_same_tensors

CLASSES = 5


def segformer() -> SegformerForSemanticSegmentation:
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def maxvit() -> nn.Module:
    return timm.create_model(
        "maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=8, num_classes=CLASSES
    )


# How to make each model, the size of its images, and whether every pixel has a label.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "cifar_resnet": (lambda: timm.create_model("cifar_resnet20", num_classes=CLASSES), 8, False),
    "cifar_vgg": (lambda: timm.create_model("cifar_vgg16_bn", width=0.125, num_classes=CLASSES), 32, False),
    "cifar_wrn": (lambda: timm.create_model("cifar_wrn28_10", depth=10, widen=1, num_classes=CLASSES), 8, False),
    "resnet50": (lambda: timm.create_model("resnet50", layers=(1, 1, 1, 1), num_classes=CLASSES), 32, False),
    "maxvit": (lambda: maxvit(), 64, False),
    "timm_wrapper": (
        lambda: TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet10t", num_labels=CLASSES)),
        32,
        False,
    ),
    "hf_resnet": (hf_resnet, 32, False),
    "pspnet": (lambda: smp.PSPNet("resnet18", encoder_weights=None, classes=CLASSES, psp_dropout=0.0), 32, True),
    "deeplabv3": (
        lambda: smp.DeepLabV3("resnet18", encoder_weights=None, classes=CLASSES, decoder_aspp_dropout=0.0),
        32,
        True,
    ),
    "segformer": (segformer, 32, True),
    "t5": (lambda: t5("relu"), 0, False),
    "vit": (lambda: vit(num_attention_heads=4), 32, False),
    "timm_vit": (timm_vit, 32, False),
    "swin": (swin, 32, False),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]()


def items(family: str) -> list[dict]:
    _, size, has_pixels = FAMILIES[family]
    if family == "t5":
        return translation_items(16)
    generator = torch.Generator().manual_seed(1)
    shape = (size, size) if has_pixels else ()
    return [
        {
            "pixel_values": torch.randn(3, size, size, generator=generator),
            "labels": torch.randint(0, CLASSES, shape, generator=generator),
        }
        for _ in range(16)
    ]


def batch(family: str, model: nn.Module) -> dict[str, torch.Tensor]:
    first = items(family)[:3]
    inputs = {name: torch.stack([item[name] for item in first]) for name in first[0]}
    return {"x": inputs["pixel_values"]} if library_of(model) in ("timm", "segmentation_models_pytorch") else inputs


def trainer_of(family: str, output_dir: Path, granularity: str) -> BIMPTrainer:
    model = build(family)
    args = BIMPArguments(
        **run_arguments(
            output_dir,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            dense_ratio=0.34,
            num_cycles=2,
            target_sparsity=0.5,
            granularity=granularity,
            per_device_train_batch_size=4,
        )
    )
    return BIMPTrainer(model=model, args=args, train_dataset=items(family))


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output if torch.is_tensor(output) else output["logits"]


def assert_same_model(one: nn.Module, other: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Weights to the bit. Outputs to rounding: weights that are mapped from a file lie at other alignments than
    allocated ones, and on some processors another kernel takes them."""
    assert_same_tensors(one.state_dict(), other.state_dict())
    torch.testing.assert_close(logits(one, inputs), logits(other, inputs))


def load_again(model: nn.Module, directory: Path) -> nn.Module:
    """By the very code that the model card shows."""
    scope: dict = {}
    exec(loading_code(model, str(directory)), scope)
    return scope["model"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prunes_resumes_saves_loads_and_shrinks(family: str, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path / "whole", "filter")
    trainer.train()
    model, masks = trainer.model, trainer.method.masks
    assert trainer.results["sparsity"]["prunable"] == masks.sparsity == pytest.approx(0.5, abs=0.02)
    assert trainer.results["theoretical_speedup"] > 1.05
    assert all(not masks.parameters[name][mask].any() for name, mask in masks.pruned.items())
    for group in masks.rule.groups:
        rows = group.weights[0]
        gone = masks.pruned[rows.name].movedim(rows.dim, 0).flatten(1).all(1)[rows.index].view(group.size, -1).all(1)
        assert sum(gone) == round(0.5 * group.size)

    resumed = trainer_of(family, tmp_path / "resumed", "filter")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    files = [load_file(tmp_path / which / "model.safetensors") for which in ("whole", "resumed")]
    assert_same_tensors(*files)

    inputs = batch(family, model)
    dense = logits(model, inputs)
    assert_same_model(load_again(model, tmp_path / "whole"), model, inputs)

    small = shrink(model, inputs)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < before
    assert (logits(small, inputs) - dense).abs().max() <= 1e-5 * max(1, dense.abs().max())
    save_shrunk(small, tmp_path / "small")
    assert_same_model(load_shrunk(tmp_path / "small"), small, inputs)


@pytest.mark.parametrize("family", ["cifar_vgg", "maxvit", "deeplabv3", "segformer", "t5"])
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_weights_and_patterns_too(family: str, granularity: str, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path, granularity)
    trainer.train()
    masks, results = trainer.method.masks, trainer.results
    exact = round(0.5 * masks.num_weights)
    assert masks.num_pruned == exact == sum(int((w == 0).sum()) for w in masks.weights.values())
    assert results["sparsity"]["prunable"] == exact / masks.num_weights and results["theoretical_speedup"] > 1
    inputs = batch(family, trainer.model)
    assert_same_model(load_again(trainer.model, tmp_path), trainer.model, inputs)
