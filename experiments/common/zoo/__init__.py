"""Ten architectures of image classifiers, small but built as published, for 28x28x1 digits.

Widths, depths and strides are scaled down, and each docstring says what else differs. What decides which rewrites leave
the function alone is kept: where norms, activations, groups, heads, shuffles, shifts and concatenations stand.
``python -m experiments.common.zoo`` trains them.
"""

from typing import NamedTuple

import flax.linen as nn

from experiments.common.networks import Functional
from experiments.common.zoo import convolutional, functional, mobile, transformers


class Entry(NamedTuple):
    """A network of the zoo.

    Attributes:
      network: what ``experiments.common.networks.train`` and ``functional`` take.
      weights: how many there are, running statistics not counted.
      about: one line on its structure.
      paper: authors and year.
    """

    network: nn.Module | Functional
    weights: int
    about: str
    paper: str


def networks() -> dict[str, Entry]:
    """The zoo by name."""
    vit, convnext = "Dosovitskiy et al. 2021", "Liu et al. 2022"
    return {
        "ViT": Entry(transformers.ViT(), 88_666, "q, k, v of [D, H, d], tiled class token", vit),
        "ViT, fused": Entry(
            transformers.ViT(fused=True, summary="broadcast"), 88_666, "one qkv of [D, 3 D], broadcast class token", vit
        ),
        "ViT, mean": Entry(
            transformers.ViT(summary="mean"), 88_570, "q, k, v of [D, H, d], mean over tokens", "Zhai et al. 2022"
        ),
        "ViT, nnx": Entry(functional.pure(functional.ViT), 88_666, "flax nnx, broadcast class token", vit),
        "Swin": Entry(
            transformers.Swin(), 78_574, "shifted windows, relative position bias, patch merging", "Liu et al. 2021"
        ),
        "ConvNeXt": Entry(convolutional.ConvNeXt(), 59_890, "depthwise 7x7, LayerNorm, layer scale", convnext),
        "ConvNeXt, nnx": Entry(functional.pure(functional.ConvNeXt), 59_890, "the same in flax nnx", convnext),
        "ResNeXt": Entry(convolutional.ResNeXt(), 61_162, "3x3 convolutions in eight groups", "Xie et al. 2017"),
        "DenseNet": Entry(
            convolutional.DenseNet(), 46_318, "batch norm before relu, concatenation", "Huang et al. 2017"
        ),
        "ResNet, group norm": Entry(
            convolutional.GroupNormResNet(), 77_754, "group norm of four channels each", "He et al. 2016; Wu, He 2018"
        ),
        "MobileNetV3": Entry(
            mobile.MobileNetV3(), 41_562, "linear bottlenecks, squeeze-excite, hard-swish", "Howard et al. 2019"
        ),
        "EfficientNet": Entry(
            mobile.EfficientNet(), 41_182, "MBConv: linear bottlenecks, squeeze-excite, swish", "Tan, Le 2019"
        ),
        "ShuffleNet v1": Entry(
            mobile.ShuffleNetV1(), 85_066, "grouped 1x1 convolutions, channel shuffle", "Zhang et al. 2018"
        ),
        "ShuffleNet v2": Entry(
            mobile.ShuffleNetV2(), 38_506, "channel split, concatenation, channel shuffle", "Ma et al. 2018"
        ),
    }
