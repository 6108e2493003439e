"""VGG-16 with batch normalisation for CIFAR, its 4096-unit layers replaced by one of 512 (Li et al., 2017)."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CIFAR10, CifarModel, conv

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MIN_SIZE = 2 ** len(STAGES)


class CifarVgg(CifarModel):
    """Five stages of 3x3 convolutions, each before a max pooling, then a hidden layer; `width` scales all channels.

    Takes images of at least 32 x 32 pixels, else the pooling would leave nothing and `ValueError` is raised.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: float = 1.0, drop_rate: float = 0.0):
        if not width > 0:
            raise ValueError(f"width={width}: give a positive multiplier of the channel counts, 1.0 for VGG-16.")
        layers: dict[str, nn.Module] = {}
        channels = in_chans
        for number, stage in enumerate(STAGES, start=1):
            for place, full in enumerate(stage, start=1):
                out = max(1, round(width * full))
                layers[f"conv{number}_{place}"] = conv(channels, out)
                layers[f"bn{number}_{place}"] = nn.BatchNorm2d(out)
                layers[f"relu{number}_{place}"] = nn.ReLU(inplace=True)
                channels = out
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        super().__init__(layers, channels, num_classes, in_chans, hidden=True, drop_rate=drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) become feature maps (B, num_features, H // 32, W // 32)."""
        if min(x.shape[-2:]) < MIN_SIZE:
            raise ValueError(
                f"The images are {tuple(x.shape[-2:])} pixels, and VGG-16 needs {MIN_SIZE} x {MIN_SIZE} or more: "
                "resize them, or take a cifar_resnet."
            )
        return super().forward_features(x)


default_cfgs = generate_default_cfgs({"cifar_vgg16_bn": CIFAR10 | {"first_conv": "features.conv1_1"}})


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs) -> CifarVgg:
    """VGG-16 with batch normalisation: 14.98 M parameters at `width` 1."""
    return build_model_with_cfg(CifarVgg, "cifar_vgg16_bn", pretrained, **kwargs)
