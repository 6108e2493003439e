"""What the CIFAR models share: timm's methods, the head, the initialisation and the data's statistics."""

from collections import OrderedDict

from torch import Tensor, nn

_DATA = {"input_size": (3, 32, 32), "crop_pct": 1.0, "first_conv": "features.conv", "classifier": "fc"}
CIFAR10 = _DATA | {"num_classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
CIFAR100 = _DATA | {"num_classes": 100, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


class CifarModel(nn.Module):
    """Convolutional `layers` by name, then global average pooling and a linear classifier.

    Images (B, in_chans, H, W) become logits (B, num_classes), or features (B, num_features) if `num_classes` is 0.
    `hidden` puts a linear layer with ReLU before the classifier, `drop_rate` a dropout.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        num_features: int,
        num_classes: int,
        in_chans: int,
        hidden: bool = False,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = num_features
        self.features = nn.Sequential(OrderedDict(layers))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU()) if hidden else nn.Identity()
        self.dropout = nn.Dropout(drop_rate)
        self.fc = self._classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier in place of the old; 0 classes: none. Raises `ValueError` for other pooling."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}: this model only averages; leave it out or give 'avg'.")
        weight = next(self.parameters())
        self.num_classes = num_classes
        self.fc = self._classifier(num_classes).to(weight.device, weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) become feature maps (B, num_features, h, w)."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps become logits, or with `pre_logits` what the classifier would have seen."""
        x = self.dropout(self.hidden(self.pool(x)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def conv(in_chans: int, out_chans: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1; without bias, as a normalisation follows."""
    return nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, bias=False)
