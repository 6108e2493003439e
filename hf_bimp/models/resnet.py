"""ResNets for CIFAR (He et al., 2015, section 4.2), and ResNet-18 with a stem for small images."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CIFAR10, CifarModel, conv


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: (B, in_chans, H, W) to (B, out_chans, H / stride, W / stride)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(in_chans, out_chans, stride), nn.BatchNorm2d(out_chans)
        self.conv2, self.bn2 = conv(out_chans, out_chans), nn.BatchNorm2d(out_chans)
        self.relu = nn.ReLU(inplace=True)
        # He's option B. Option A pads with zero channels, across which torch-pruning cannot tell which channels
        # belong together; a projection it traces. The price is 3 k of 0.85 M weights in ResNet-56.
        same = stride == 1 and in_chans == out_chans
        projection = [] if same else [conv(in_chans, out_chans, stride, kernel=1), nn.BatchNorm2d(out_chans)]
        self.shortcut = nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(CifarModel):
    """A 3x3 stem, then stages of `blocks` basic blocks with `widths` channels each; halves the size between stages.

    Takes images of any size.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ):
        width = widths[0]
        layers: dict[str, nn.Module] = {
            "conv": conv(in_chans, width),
            "bn": nn.BatchNorm2d(width),
            "relu": nn.ReLU(inplace=True),
        }
        for number, out in enumerate(widths, start=1):
            first = BasicBlock(width, out, stride=1 if number == 1 else 2)
            layers[f"stage{number}"] = nn.Sequential(first, *(BasicBlock(out, out, 1) for _ in range(blocks - 1)))
            width = out
        super().__init__(layers, width, num_classes, in_chans, drop_rate=drop_rate)


default_cfgs = generate_default_cfgs({"cifar_resnet20": CIFAR10, "cifar_resnet56": CIFAR10, "cifar_resnet18": CIFAR10})


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20: 0.27 M parameters."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet20", pretrained, widths=(16, 32, 64), blocks=3, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-56: 0.86 M parameters."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet56", pretrained, widths=(16, 32, 64), blocks=9, **kwargs)


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 that does not shrink the image before its first stage: 11.17 M parameters."""
    widths = (64, 128, 256, 512)
    return build_model_with_cfg(CifarResNet, "cifar_resnet18", pretrained, widths=widths, blocks=2, **kwargs)
