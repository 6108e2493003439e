"""The CIFAR models: sizes, shapes, timm's methods, and saved models that another process restores."""

import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import hf_bimp.models  # noqa: F401
from processes import output_of

# Smallest variant of each architecture.
TINY = [
    ("cifar_resnet20", {}),
    ("cifar_vgg16_bn", {"width": 0.125}),
    ("cifar_wrn28_10", {"depth": 10, "widen": 1}),
]
tiny = pytest.mark.parametrize("name, options", TINY, ids=[name for name, _ in TINY])

RESTORE = """
import sys, warnings
warnings.simplefilter("error")
import hf_bimp.models
import hf_bimp.models
import timm
from safetensors.torch import load_file, save_file
folder, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
save_file({"logits": model(load_file(f"{folder}/images")["images"])}, out)
"""


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, pretrained=False, **options)


@pytest.mark.parametrize(
    "name, num_classes, low, high",
    [
        ("cifar_resnet20", 10, 0.27, 0.28),
        ("cifar_resnet56", 10, 0.85, 0.86),
        ("cifar_resnet18", 10, 11.165, 11.175),
        ("cifar_vgg16_bn", 10, 14.7, 15.3),
        ("cifar_wrn28_10", 100, 36.45, 36.55),
    ],
)
def test_parameter_counts(name, num_classes, low, high):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.num_classes == num_classes
    assert low <= sum(p.numel() for p in model.parameters()) / 1e6 <= high


def test_wide_resnet_has_28_convolutions():
    with torch.device("meta"):
        model = timm.create_model("cifar_wrn28_10")
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 28  # its depth counts the projections


@tiny
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [8, 32, 48])
def test_logits_for_every_number_of_channels_and_size(name, options, in_chans, size):
    model = build(name, num_classes=7, in_chans=in_chans, **options).eval()
    images = torch.randn(2, in_chans, size, size)
    if name == "cifar_vgg16_bn" and size < 32:
        with pytest.raises(ValueError, match=r"\(8, 8\) pixels, and VGG-16 needs 32 x 32"):
            model(images)
        return
    features = model.forward_features(images)
    assert features.shape[:2] == (2, model.num_features)
    assert model(images).shape == (2, 7)
    assert torch.equal(model.forward_head(features), model(images))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@tiny
def test_reset_classifier_changes_the_classes_and_removes_them(name, options):
    model = build(name, **options).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    model.reset_classifier(5)
    assert model.num_classes == 5 and model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"])
    assert model(images).shape == (2, 5)
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, model.num_features)
    assert build(name, num_classes=0, **options).eval()(images.float()).shape == (2, model.num_features)
    with pytest.raises(ValueError, match="global_pool='max'"):
        model.reset_classifier(5, "max")


@tiny
def test_saved_models_are_restored_by_another_process(name, options, tmp_path):
    model = build(name, num_classes=3, in_chans=1, **options).eval()
    model.reset_classifier(4)
    images = torch.randn(2, 1, 32, 32)
    save_for_hf(model, tmp_path, safe_serialization=True)
    save_file({"images": images}, tmp_path / "images")
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "config.json").is_file()
    output_of(sys.executable, "-c", RESTORE, tmp_path, tmp_path / "logits")
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], model(images))


@tiny
def test_one_seed_gives_one_model(name, options):
    first, same, other = (build(name, seed, **options).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@tiny
def test_every_parameter_gets_a_gradient(name, options):
    model = build(name, **options)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


@tiny
def test_first_convolution_and_classifier_are_where_the_configuration_says(name, options):
    model = build(name, **options)
    first = model.get_submodule(model.pretrained_cfg["first_conv"])
    assert first is next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)) and first.in_channels == 3
    assert isinstance(model.get_submodule(model.pretrained_cfg["classifier"]), torch.nn.Linear)


@tiny
def test_dropout_is_drawn_only_in_training(name, options):
    model = build(name, drop_rate=0.5, **options)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cifar_vgg16_bn", {"width": 0}, "width=0: give a positive multiplier"),
        ("cifar_wrn28_10", {"depth": 11}, "depth=11: give 6 n"),
        ("cifar_wrn28_10", {"depth": 4}, "depth=4"),
        ("cifar_wrn28_10", {"widen": 0}, "widen=0"),
    ],
)
def test_impossible_sizes_raise(name, options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **options)
