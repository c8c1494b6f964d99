"""ViT and ConvNeXt in flax nnx, as the pure functions that the functional interface of nnx makes of them.

Parameters are an ``nnx.State``, whose leaves jax finds below ``value``. Sizes and names of layers are those of the
linen networks, so that weights can move between the two.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Num

from experiments.common.networks import Functional, scaled
from smark_jax._types import PyTree


class Block(nnx.Module):
    """An encoder block of ViT: LayerNorm before attention and before the MLP."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = MLP(width, True, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MLP(nnx.Module):
    """Four times as many hidden units as channels."""

    def __init__(self, width: int, tanh_gelu: bool, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, rngs=rngs)
        self.tanh_gelu = tanh_gelu

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.out(nnx.gelu(self.hidden(x), approximate=self.tanh_gelu))


class ViT(nnx.Module):
    """The ViT of :class:`experiments.common.zoo.transformers.ViT` with a broadcast class token."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        width = 48
        self.patches = nnx.Conv(1, width, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 50, width)))
        self.blocks = nnx.List([Block(width, 4, rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: Num[Array, "B 28 28 1"]) -> Float[Array, "B 10"]:
        """Logits of a batch of images."""
        x = self.patches(scaled(images))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ConvNeXtBlock(nnx.Module):
    """x + scale * out(gelu(hidden(norm(depthwise(x)))))."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.depthwise = nnx.Conv(width, width, (7, 7), feature_group_count=width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full(width, 1e-6, jnp.float32))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = self.out(nnx.gelu(self.hidden(self.norm(self.depthwise(x))), approximate=False))
        return x + self.layer_scale[None, None, None] * y


class ConvNeXt(nnx.Module):
    """The ConvNeXt of :class:`experiments.common.zoo.convolutional.ConvNeXt`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        halved = functools.partial(nnx.Conv, kernel_size=(2, 2), strides=(2, 2), padding="VALID", rngs=rngs)
        self.stem = halved(1, 24)
        self.stem_norm = nnx.LayerNorm(24, rngs=rngs)
        self.blocks = nnx.List([ConvNeXtBlock(width, rngs) for width in (24, 24, 48, 48)])
        self.downsample_norm = nnx.LayerNorm(24, rngs=rngs)
        self.downsample = halved(24, 48)
        self.norm = nnx.LayerNorm(48, rngs=rngs)
        self.head = nnx.Linear(48, 10, rngs=rngs)

    def __call__(self, images: Num[Array, "B 28 28 1"]) -> Float[Array, "B 10"]:
        """Logits of a batch of images."""
        x = self.stem_norm(self.stem(scaled(images)))
        for number, block in enumerate(self.blocks):
            if number == 2:
                x = self.downsample(self.downsample_norm(x))
            x = block(x)
        return self.head(self.norm(jnp.mean(x, axis=(1, 2))))


@functools.cache
def pure(network: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """The pure functions of an nnx network that has only weights; one pair for each class, so that jit knows it again.

    Args:
      network: makes the module, for images of 28x28x1.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: network(nnx.Rngs(0))))

    @jax.jit
    def draw(key: Array) -> PyTree:
        return nnx.split(network(nnx.Rngs(params=key)))[1]

    def apply_fn(params: PyTree, images: Array) -> Array:
        return nnx.merge(graph, params)(images)

    def train_fn(params: PyTree, rest: PyTree, images: Array) -> tuple[Array, PyTree]:
        return apply_fn(params, images), rest

    return Functional(lambda key, _: draw(key), apply_fn, apply_fn, train_fn)
