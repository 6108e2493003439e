"""The paper's CIFAR models, registered with timm: import hf_bimp.models, then timm.create_model('cifar_resnet56')."""

from . import resnet, vgg, wide_resnet

__all__ = ["resnet", "vgg", "wide_resnet"]
