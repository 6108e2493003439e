"""Wide ResNets (Zagoruyko & Komodakis, 2016)."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .base import CIFAR100, CifarModel, conv


class PreActBlock(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions, dropout between: shapes as in `BasicBlock`."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, drop_rate: float):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_chans), conv(in_chans, out_chans, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_chans), conv(out_chans, out_chans)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(drop_rate)
        same = stride == 1 and in_chans == out_chans
        self.shortcut = None if same else conv(in_chans, out_chans, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        # A projection sees the normalised input, as in the authors' code; where shapes agree, x passes untouched.
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(self.relu(self.bn2(self.conv1(y))))
        return self.conv2(y) + shortcut


class WideResNet(CifarModel):
    """Three stages of `widen` * 16, 32 and 64 channels in `depth` layers; halves the size between stages.

    Takes images of any size. `drop_rate` is that between the convolutions of a block. Raises `ValueError` where
    `depth` is not 6 n + 4 or `widen` below 1.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        num_classes: int = 100,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ):
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth}: give 6 n + 4 layers for n blocks a stage, that is 10, 16, 22, 28 ...")
        if widen < 1:
            raise ValueError(f"widen={widen}: give a whole number from 1, the multiple of the ResNet's channels.")
        width = 16
        layers: dict[str, nn.Module] = {"conv": conv(in_chans, width)}
        for number, channels in enumerate((16, 32, 64), start=1):
            out = channels * widen
            first = PreActBlock(width, out, 1 if number == 1 else 2, drop_rate)
            others = (PreActBlock(out, out, 1, drop_rate) for _ in range(blocks - 1))
            layers[f"stage{number}"] = nn.Sequential(first, *others)
            width = out
        layers |= {"bn": nn.BatchNorm2d(width), "relu": nn.ReLU(inplace=True)}
        super().__init__(layers, width, num_classes, in_chans)


default_cfgs = generate_default_cfgs({"cifar_wrn28_10": CIFAR100})


@register_model
def cifar_wrn28_10(pretrained: bool = False, **kwargs) -> WideResNet:
    """WideResNet-28-10: 36.5 M parameters; `depth` and `widen` build smaller ones."""
    return build_model_with_cfg(WideResNet, "cifar_wrn28_10", pretrained, **kwargs)
