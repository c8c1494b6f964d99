"""Networks for phones in linen, all with batch norm: MobileNetV3, EfficientNet, ShuffleNet v1 and v2."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num

from experiments.common.networks import scaled
from experiments.common.zoo.convolutional import Maps, batch_norm

Activation = Callable[[Array], Array]


class SqueezeExcite(nn.Module):
    """Multiplies channels by gate(W2 act(W1 mean(x))), the mean over places (Hu, Shen, Sun, CVPR 2018)."""

    hidden: int
    act: Activation
    gate: Activation

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        y = self.act(nn.Conv(self.hidden, (1, 1))(jnp.mean(x, axis=(1, 2), keepdims=True)))
        return x * self.gate(nn.Conv(x.shape[-1], (1, 1))(y))


class MBConv(nn.Module):
    """An inverted residual: 1x1 to ``expanded`` channels, depthwise, squeeze-excite, and a linear 1x1 bottleneck.

    The expansion is left out where it would not expand. After the last batch norm stands no activation.

    Attributes:
      kernel: side of the depthwise kernel.
      expanded: channels of the depthwise convolution.
      features: channels of the output.
      strides: of the depthwise convolution.
      act: after expansion and depthwise convolution.
      excite: the squeeze-excite layer, if there is one.
    """

    kernel: int
    expanded: int
    features: int
    strides: int
    act: Activation
    excite: SqueezeExcite | None = None

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Maps:
        conv, y = functools.partial(nn.Conv, use_bias=False), x
        if self.expanded != x.shape[-1]:
            y = self.act(batch_norm(train)(conv(self.expanded, (1, 1))(y)))
        y = conv(self.expanded, (self.kernel, self.kernel), self.strides, feature_group_count=self.expanded)(y)
        y = self.act(batch_norm(train)(y))
        if self.excite:
            y = self.excite(y)
        y = batch_norm(train)(conv(self.features, (1, 1))(y))
        return x + y if x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """MobileNetV3: four of the small version's inverted residuals, hard-swish, squeeze-excite with hard-sigmoid.

    The first block keeps its size and has no strides, since the images are small; the head has a tenth of the
    published one's channels.

    References:
      Howard et al., "Searching for MobileNetV3", ICCV 2019, table 2.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        """Logits of a batch of images; with ``train``, batch norm normalises by the batch."""
        conv = functools.partial(nn.Conv, use_bias=False)
        excite = functools.partial(SqueezeExcite, act=nn.relu, gate=nn.hard_sigmoid, parent=None)
        x = nn.hard_swish(batch_norm(train)(conv(16, (3, 3), 2)(scaled(images))))
        x = MBConv(3, 16, 16, 1, nn.relu, excite(8))(x, train)
        x = MBConv(3, 72, 24, 2, nn.relu)(x, train)
        x = MBConv(3, 88, 24, 1, nn.relu)(x, train)
        x = MBConv(5, 96, 40, 1, nn.hard_swish, excite(24))(x, train)
        x = nn.hard_swish(batch_norm(train)(conv(120, (1, 1))(x)))
        x = nn.hard_swish(nn.Dense(96)(jnp.mean(x, axis=(1, 2))))
        return nn.Dense(10)(x)


class EfficientNet(nn.Module):
    """EfficientNet: four MBConv blocks, of expansion 1, 6, 6 and 6, with swish and squeeze-excite by sigmoid.

    A squeeze has a quarter of the block's input channels, as published. Stochastic depth and dropout are left out.

    References:
      Tan, Le, "EfficientNet: rethinking model scaling for convolutional neural networks", ICML 2019, table 1.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        """Logits of a batch of images; with ``train``, batch norm normalises by the batch."""
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.silu(batch_norm(train)(conv(16, (3, 3), 2)(scaled(images))))
        for kernel, expansion, features, strides in ((3, 1, 16, 1), (3, 6, 24, 2), (3, 6, 24, 1), (5, 6, 40, 1)):
            width = x.shape[-1]
            excite = SqueezeExcite(width // 4, nn.silu, nn.sigmoid, parent=None)
            x = MBConv(kernel, expansion * width, features, strides, nn.silu, excite)(x, train)
        x = nn.silu(batch_norm(train)(conv(160, (1, 1))(x)))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def shuffle(x: Maps, groups: int) -> Maps:
    """Deals the channels of each group out to all: channel i of group g becomes channel i * groups + g."""
    *places, channels = x.shape
    return x.reshape(*places, groups, channels // groups).swapaxes(-2, -1).reshape(x.shape)


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; with strides 2, the input's mean is concatenated, not added.

    Attributes:
      features: channels of the output, four times those of the bottleneck.
      strides: 1 or 2.
      first_groups: groups of the first 1x1 convolution, one where the input has few channels.
      groups: of the second one, and of the shuffle.
    """

    features: int
    strides: int
    first_groups: int
    groups: int = 3

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Maps:
        conv, narrow = functools.partial(nn.Conv, use_bias=False), self.features // 4
        residual = self.features - (x.shape[-1] if self.strides == 2 else 0)
        y = nn.relu(batch_norm(train)(conv(narrow, (1, 1), feature_group_count=self.first_groups)(x)))
        y = conv(narrow, (3, 3), self.strides, feature_group_count=narrow)(shuffle(y, self.groups))
        y = conv(residual, (1, 1), feature_group_count=self.groups)(batch_norm(train)(y))
        y = batch_norm(train)(y)
        if self.strides == 1:
            return nn.relu(x + y)
        return nn.relu(jnp.concatenate([nn.avg_pool(x, (3, 3), (2, 2), "SAME"), y], axis=-1))


class ShuffleNetV1(nn.Module):
    """ShuffleNet v1 with three groups and the published widths 24, 240 and 480; two units in each of two stages.

    The stem has strides, but no pooling.

    References:
      Zhang, Zhou, Lin, Sun, "ShuffleNet: an extremely efficient convolutional neural network for mobile devices",
      CVPR 2018, table 1.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        """Logits of a batch of images; with ``train``, batch norm normalises by the batch."""
        x = nn.relu(batch_norm(train)(nn.Conv(24, (3, 3), 2, use_bias=False)(scaled(images))))
        for features, first_groups in ((240, 1), (480, 3)):
            x = ShuffleUnitV1(features, 2, first_groups)(x, train)
            x = ShuffleUnitV1(features, 1, 3)(x, train)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class ShuffleUnitV2(nn.Module):
    """Half of the channels pass unchanged, the others through 1x1, depthwise 3x3, 1x1; then concatenation and shuffle.

    With strides 2, both branches see all channels, and the first one is a depthwise and a 1x1 convolution.
    """

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> Maps:
        conv, half = functools.partial(nn.Conv, use_bias=False), self.features // 2

        def pointwise(x: Maps) -> Maps:
            return nn.relu(batch_norm(train)(conv(half, (1, 1))(x)))

        def depthwise(x: Maps) -> Maps:
            y = conv(x.shape[-1], (3, 3), self.strides, feature_group_count=x.shape[-1])(x)
            return batch_norm(train)(y)

        if self.strides == 1:
            kept, changed = jnp.split(x, 2, axis=-1)
        else:
            kept, changed = pointwise(depthwise(x)), x
        changed = pointwise(depthwise(pointwise(changed)))
        return shuffle(jnp.concatenate([kept, changed], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNet v2 with the published widths 24, 48 and 96 of its half-size version; two units in each of two stages.

    The last convolution has 192 channels, not 1,024; the stem has strides, but no pooling.

    References:
      Ma, Zhang, Zheng, Sun, "ShuffleNet v2: practical guidelines for efficient CNN architecture design", ECCV 2018,
      table 5.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        """Logits of a batch of images; with ``train``, batch norm normalises by the batch."""
        x = nn.relu(batch_norm(train)(nn.Conv(24, (3, 3), 2, use_bias=False)(scaled(images))))
        for features in (48, 96):
            x = ShuffleUnitV2(features, 2)(x, train)
            x = ShuffleUnitV2(features, 1)(x, train)
        x = nn.relu(batch_norm(train)(nn.Conv(192, (1, 1), use_bias=False)(x)))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))
