"""Two image classifiers in Flax, and the pure functions through which all other modules use a network.

A network is passed around as a pair: a parameter pytree from :func:`init`, and a pure function from :func:`apply_fn`.
If a network has only weights, the tree is the plain dict of its layers. If it has more, such as the running statistics
of batch norm, the tree is the whole variables dict, ``{"params": ..., "batch_stats": ...}``, so that no code that
copies, fingerprints or compares the model can lose half of it. A tree with a key ``"params"`` is such a dict.

Images are uint8 from 0 to 255, which the networks scale, or floats already scaled to [0, 1].
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Num

from smark_jax import _batches, _validate
from smark_jax._types import ApplyFn, PyTree


class CNN(nn.Module):
    """Two convolutions, two dense layers: 421,642 weights for 28x28x1 images and ten classes.

    Attributes:
      num_classes: length of the logits.
      width: channels of the first convolution; the second has twice as many, and the hidden dense layer four times.

    Examples:
      >>> import jax
      >>> from smark_jax import models
      >>> model = models.CNN()
      >>> params = models.init(model, jax.random.key(0), (28, 28, 1))
      >>> models.apply_fn(model)(params, jax.numpy.zeros((5, 28, 28, 1), "uint8")).shape
      (5, 10)
    """

    num_classes: int = 10
    width: int = 32

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits of a batch of images."""
        x = _scaled(images)
        for features in (self.width, 2 * self.width):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = max_pool(x)
        x = nn.relu(nn.Dense(4 * self.width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3x3 stem without pooling; 11,173,962 weights for 32x32x3 and ten classes.

    With group norm, the default, an image's logits do not depend on the other images in its batch, and there are no
    running statistics, which parties that train together would have to share. Both norms give the same number of
    weights.

    To train with batch norm, take the updated statistics from Flax:
    ``logits, new = model.apply(variables, images, train=True, mutable=["batch_stats"])``.

    Attributes:
      num_classes: length of the logits.
      norm: ``"group"`` or ``"batch"``.
      width: channels of the first stage, any positive number; later stages have 2, 4 and 8 times as many.

    Raises:
      SmarkError: when initialized or applied with another ``norm``.

    Examples:
      >>> import jax
      >>> from smark_jax import models
      >>> model = models.ResNet18(width=8)
      >>> params = models.init(model, jax.random.key(0), (32, 32, 3))
      >>> models.apply_fn(model)(params, jax.numpy.zeros((2, 32, 32, 3), "uint8")).shape
      (2, 10)

    References:
      He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2 for the small stem.
      Wu, He, "Group normalization", ECCV 2018.
    """

    num_classes: int = 10
    norm: str = "group"
    width: int = 64

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"], train: bool = False) -> Float[Array, "B classes"]:
        """Logits of a batch of images; ``train`` only affects batch norm, which then normalizes by the batch itself."""
        _validate.positive("ResNet18", "width", self.width)
        norm = _norm(self.norm, train)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.relu(norm(self.width)(conv(self.width, (3, 3))(_scaled(images))))
        for stage in range(4):
            features = self.width * 2**stage
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(norm(features)(conv(features, (3, 3), strides)(x)))
                y = norm(features)(conv(features, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm(features)(conv(features, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


@jax.custom_jvp
def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """The maximum of each 2x2 window, like ``flax.linen.max_pool(x, (2, 2), strides=(2, 2))``.

    The gradient is also the same: it goes to the first maximum in a window. XLA would derive a select-and-scatter for
    it, which takes most of a small network's training step on CPUs. Here it is one pass over the activations.

    Args:
      x: activations; a last odd row or column is left out.

    Returns:
      Shape [B, H // 2, W // 2, C].

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import models
      >>> models.max_pool(jnp.arange(8.0).reshape(1, 2, 4, 1))[0, 0, :, 0].tolist()
      [5.0, 7.0]
    """
    return nn.max_pool(x, (2, 2), strides=(2, 2))


@max_pool.defjvp
def _max_pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    top = max_pool(x)
    batch, height, width, channels = top.shape

    def windows(x: Array) -> Array:
        return x[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)

    is_top = windows(x) == top[:, :, None, :, None]
    place = jnp.full(top.shape, 3, jnp.int8)
    for number in (2, 1, 0):  # the first place wins
        place = jnp.where(is_top[:, :, number // 2, :, number % 2], jnp.int8(number), place)
    places = jnp.arange(4, dtype=jnp.int8).reshape(1, 1, 2, 1, 2, 1)
    chosen = jnp.where(place[:, :, None, :, None] == places, windows(dx), 0)
    return top, chosen.sum(axis=(2, 4))


def init(model: nn.Module, key: Array, image_shape: tuple[int, int, int]) -> PyTree:
    """Draws a network's initial weights.

    Args:
      model: any Flax network that maps images to logits.
      key: a ``jax.random.key``; the same key gives the same weights.
      image_shape: ``(height, width, channels)`` of one image.

    Returns:
      The plain dict of layers if the network has only weights, otherwise the whole variables dict.

    Raises:
      SmarkError: when ``image_shape`` is not the shape of one image.
    """
    if len(image_shape) != 3 or any(size < 1 for size in image_shape):
        raise _validate.fail(
            "models.init", "image_shape (height, width, channels)", repr(image_shape), "Leave out the batch."
        )
    variables = _draw(model, key, tuple(image_shape))
    return variables["params"] if set(variables) == {"params"} else variables


@functools.partial(jax.jit, static_argnums=(0, 2))
def _draw(model: nn.Module, key: Array, image_shape: tuple[int, int, int]) -> PyTree:
    return model.init(key, jnp.zeros((1, *image_shape)))


@dataclasses.dataclass(frozen=True)
class _Apply:
    """A callable that is equal for equal networks, so that jit compiles once per network and not once per call."""

    model: nn.Module
    any_width: bool

    def __call__(self, params: PyTree, images: Num[Array, "B H W C"]) -> Float[Array, "B classes"]:
        variables = params if "params" in params else {"params": params}
        with nn.intercept_methods(_widen) if self.any_width else contextlib.nullcontext():
            return self.model.apply(variables, images)  # pyright: ignore[reportReturnType]


def _widen(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Sets the number of features of a dense or convolutional layer from its kernel, before the layer runs."""
    layer = context.module
    if isinstance(layer, nn.Dense | nn.Conv) and context.method_name == "__call__":
        object.__setattr__(layer, "features", layer.get_variable("params", "kernel").shape[-1])
    return call(*args, **kwargs)


def apply_fn(model: nn.Module, any_width: bool = False) -> ApplyFn:
    """The pure ``apply_fn(params, images) -> logits`` of a Flax network, for inference.

    It takes what :func:`init` returns: the dict of layers, or a variables dict, known by its key ``"params"``. Batch
    norm uses its running statistics. Two calls with equal networks return functions that are equal and hash alike.

    Args:
      model: any Flax network that maps images to logits.
      any_width: take the channels of ``nn.Dense`` and ``nn.Conv`` from the weights, not from the network. This runs
        suspects that were widened by neurons without effect; by default, wider weights are an error.

    Examples:
      >>> import jax
      >>> from smark_jax import models
      >>> apply = jax.jit(models.apply_fn(models.CNN(num_classes=3)))
      >>> params = models.init(models.CNN(num_classes=3), jax.random.key(0), (8, 8, 1))
      >>> apply(params, jax.numpy.ones((4, 8, 8, 1))).shape
      (4, 3)
    """
    return _Apply(model, any_width)


def accuracy(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Num[ArrayLike, "N H W C"],
    labels: Int[ArrayLike, " N"],
    batch_size: int = 500,
) -> float:
    """The share of images whose largest logit is at their label.

    Compiled once per ``apply_fn`` and shape: the last batch is padded, and the padding is not counted.

    Args:
      apply_fn: pure, hashable; the one from :func:`apply_fn` for a Flax network.
      params: the first argument of ``apply_fn``.
      images: shape [N H W C].
      labels: shape [N], class numbers from 0.
      batch_size: images per step, which bounds the memory in use.

    Raises:
      SmarkError: when there are no images, or not one whole-number label for each.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 0 or len(images) == 0:
        raise _validate.fail("models.accuracy", "at least one image", f"shape {images.shape}", "Is the split empty?")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise _validate.fail(
            "models.accuracy",
            f"one whole-number label for each of {len(images):,} images",
            f"labels of shape {labels.shape}, dtype {labels.dtype}",
            "Are images and labels of the same split? One-hot labels need an argmax first.",
        )
    _validate.positive("models.accuracy", "batch_size", batch_size)

    answers = _batches.apply(functools.partial(_answers, apply_fn, params), batch_size, images)
    return float(np.mean(answers == labels))


@functools.partial(jax.jit, static_argnums=0)
def _answers(apply_fn: ApplyFn, params: PyTree, images: Array) -> Array:
    return jnp.argmax(apply_fn(params, images), axis=-1)


def _scaled(images: Num[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Applies the convention for pixels: uint8 is scaled to [0, 1], floats are left unchanged."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise _validate.fail(
            "models", "images as uint8, or as floats in [0, 1]", f"dtype {images.dtype}", "Cast them to uint8?"
        )
    return images


def _norm(kind: str, train: bool) -> Callable[[int], Any]:
    """Maps a number of channels to the normalization layer for it."""
    if kind == "group":
        return lambda channels: nn.GroupNorm(num_groups=_num_groups(channels))
    if kind == "batch":
        return lambda channels: nn.BatchNorm(use_running_average=not train, momentum=0.9)
    raise _validate.fail("ResNet18", "norm 'group' or 'batch'", repr(kind), "Is norm misspelt?")


def _num_groups(channels: int) -> int:
    """The number of equal groups: at most 32, with at least four channels each if possible, to preserve contrast."""
    return max(g for g in range(1, min(32, max(1, channels // 4)) + 1) if channels % g == 0)
