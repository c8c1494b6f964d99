"""Convolutional networks of full width in linen: ConvNeXt, ResNeXt, DenseNet, and a ResNet with group norm."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num

from experiments.common.networks import scaled

Maps = Float[Array, "B H W C"]


def batch_norm(train: bool) -> nn.BatchNorm:
    """Batch norm that normalises by its stored statistics, in training by the batch."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)


class ConvNeXtBlock(nn.Module):
    """x + scale * out(gelu(hidden(norm(depthwise(x))))): the layer scale starts at 1e-6."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        width = x.shape[-1]
        y = nn.Conv(width, (7, 7), feature_group_count=width, name="depthwise")(x)
        y = nn.Dense(4 * width, name="hidden")(nn.LayerNorm(name="norm")(y))
        y = nn.Dense(width, name="out")(nn.gelu(y, approximate=False))
        scale = self.param("layer_scale", nn.initializers.constant(1e-6), (width,))
        return x + scale[None, None, None] * y


class ConvNeXt(nn.Module):
    """ConvNeXt: depthwise 7x7, LayerNorm, MLP of four times the width and layer scale; two blocks of 24, two of 48.

    The stem's patches are 2x2, not 4x4, since the images are small. Between the stages stand a LayerNorm and a 2x2
    convolution with strides. Stochastic depth is left out.

    References:
      Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, "A ConvNet for the 2020s", CVPR 2022.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits of a batch of images."""
        halved = functools.partial(nn.Conv, kernel_size=(2, 2), strides=(2, 2), padding="VALID")
        x = nn.LayerNorm(name="stem_norm")(halved(24, name="stem")(scaled(images)))
        for block in range(4):
            if block == 2:
                x = halved(48, name="downsample")(nn.LayerNorm(name="downsample_norm")(x))
            x = ConvNeXtBlock(name=f"blocks_{block}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(jnp.mean(x, axis=(1, 2))))


class ResNeXtBlock(nn.Module):
    """A bottleneck with a grouped 3x3 convolution of half the output's width."""

    features: int
    strides: int
    groups: int = 8

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Maps:
        conv = functools.partial(nn.Conv, use_bias=False)
        y = nn.relu(batch_norm(train)(conv(self.features // 2, (1, 1))(x)))
        y = conv(self.features // 2, (3, 3), self.strides, feature_group_count=self.groups)(y)
        y = batch_norm(train)(conv(self.features, (1, 1))(nn.relu(batch_norm(train)(y))))
        if x.shape != y.shape:
            x = batch_norm(train)(conv(self.features, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNeXt(nn.Module):
    """ResNeXt: four bottlenecks of 64, 64, 128 and 128 channels, whose 3x3 convolutions have eight groups.

    The stem is a 3x3 convolution with strides, without pooling.

    References:
      Xie, Girshick, Dollár, Tu, He, "Aggregated residual transformations for deep neural networks", CVPR 2017.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        """Logits of a batch of images; with ``train``, batch norm normalises by the batch."""
        x = nn.relu(batch_norm(train)(nn.Conv(32, (3, 3), 2, use_bias=False)(scaled(images))))
        for features, strides in ((64, 1), (64, 1), (128, 2), (128, 1)):
            x = ResNeXtBlock(features, strides)(x, train)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class DenseNet(nn.Module):
    """DenseNet-BC: two blocks of three layers with growth 12, and a transition that halves the channels.

    Batch norm and relu stand before each convolution; a layer is a 1x1 convolution to 48 channels and a 3x3 one to 12,
    which are appended to its input.

    References:
      Huang, Liu, van der Maaten, Weinberger, "Densely connected convolutional networks", CVPR 2017.
    """

    growth: int = 12

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        """Logits of a batch of images; with ``train``, batch norm normalises by the batch."""
        conv = functools.partial(nn.Conv, use_bias=False)
        x = conv(2 * self.growth, (3, 3), 2)(scaled(images))
        for block in range(2):
            if block:
                x = conv(x.shape[-1] // 2, (1, 1))(nn.relu(batch_norm(train)(x)))
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for _ in range(3):
                y = conv(4 * self.growth, (1, 1))(nn.relu(batch_norm(train)(x)))
                y = conv(self.growth, (3, 3))(nn.relu(batch_norm(train)(y)))
                x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(10)(jnp.mean(nn.relu(batch_norm(train)(x)), axis=(1, 2)))


class GroupNormResNet(nn.Module):
    """ResNet with group norm: blocks of two 3x3 convolutions with 16, 32 and 64 channels, in groups of four channels.

    References:
      He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016.
      Wu, He, "Group normalization", ECCV 2018.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits of a batch of images."""
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.GroupNorm, num_groups=None, group_size=4)
        x = nn.relu(norm()(conv(16, (3, 3), 2)(scaled(images))))
        for features in (16, 32, 64):
            strides = 1 if features == x.shape[-1] else 2
            y = nn.relu(norm()(conv(features, (3, 3), strides)(x)))
            y = norm()(conv(features, (3, 3))(y))
            if x.shape != y.shape:
                x = norm()(conv(features, (1, 1), strides)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))
