"""Vision transformers in linen: ViT in the forms that public code has, and Swin."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Num

from experiments.common.networks import scaled

_MASKED = -100.0  # the published code's logit between tokens that were not neighbours before the shift


class MLP(nn.Module):
    """Four times as many hidden units as channels; ``tanh_gelu`` is Google's form of gelu, PyTorch's uses erf."""

    tanh_gelu: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        hidden = nn.Dense(4 * x.shape[-1], name="hidden")(x)
        return nn.Dense(x.shape[-1], name="out")(nn.gelu(hidden, approximate=self.tanh_gelu))


def split_heads(qkv: Float[Array, "B T D3"], heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values, [B, H, T, d] each, of one product with a fused kernel, by reshape and transposition."""
    batch, tokens, width = qkv.shape
    parts = qkv.reshape(batch, tokens, 3, heads, width // 3 // heads).transpose(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


class FusedAttention(nn.Module):
    """Self-attention as in timm: one dense layer ``qkv`` of 3 D outputs, reshaped to [B, T, 3, H, d]."""

    heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q, k, v = split_heads(nn.Dense(3 * x.shape[-1], name="qkv")(x), self.heads)
        weights = nn.softmax((q * q.shape[-1] ** -0.5) @ k.swapaxes(-2, -1))
        return nn.Dense(x.shape[-1], name="out")((weights @ v).transpose(0, 2, 1, 3).reshape(x.shape))


class Encoder(nn.Module):
    """A block with its LayerNorms before attention and MLP: x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    fused: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        attention = FusedAttention if self.fused else nn.MultiHeadDotProductAttention
        x = x + attention(self.heads, name="attention")(nn.LayerNorm(name="norm1")(x))
        return x + MLP(not self.fused, name="mlp")(nn.LayerNorm(name="norm2")(x))


class ViT(nn.Module):
    """Vision transformer with learned positions: by default three encoder blocks of width 48 with four heads.

    Attributes:
      width: D, of the stream.
      heads: of each block.
      blocks: how many there are.
      patch: rows and columns of a patch.
      classes: how many logits there are.
      fused: queries, keys and values in one dense layer and gelu by erf, as in PyTorch's timm, instead of
        ``nn.MultiHeadDotProductAttention`` with its kernels [D, H, d] and gelu by tanh, as in Google's code.
      summary: what the head reads: ``"tile"``, a class token repeated by ``jnp.tile`` (Google); ``"broadcast"``, one
        repeated by ``jnp.broadcast_to`` (timm); or ``"mean"``, the mean over tokens (Zhai et al. 2022).

    References:
      Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021.
      Zhai, Kolesnikov, Houlsby, Beyer, "Scaling vision transformers", CVPR 2022.
    """

    width: int = 48
    heads: int = 4
    blocks: int = 3
    patch: int = 4
    classes: int = 10
    fused: bool = False
    summary: str = "tile"

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits of a batch of images."""
        width, window = self.width, (self.patch, self.patch)
        x = nn.Conv(width, window, strides=window, padding="VALID", name="patches")(scaled(images))
        x = x.reshape(x.shape[0], -1, width)
        if self.summary != "mean":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, width))
            repeats = (x.shape[0], 1, 1)
            many = (
                jnp.tile(token, repeats) if self.summary == "tile" else jnp.broadcast_to(token, (*repeats[:2], width))
            )
            x = jnp.concatenate([many, x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for block in range(self.blocks):
            x = Encoder(self.heads, self.fused, name=f"blocks_{block}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=1) if self.summary == "mean" else x[:, 0])


def relative_position_index(window: int) -> np.ndarray:
    """The row of the bias table for each pair of a window's tokens, [window^2, window^2]: by rows and columns apart."""
    places = np.stack(np.meshgrid(*[np.arange(window)] * 2, indexing="ij")).reshape(2, -1)
    apart = places[:, :, None] - places[:, None, :] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


def windows(x: Float[Array, "B rows columns D"], window: int) -> Float[Array, "N T D"]:
    """Cuts token maps into windows of ``window`` x ``window`` tokens."""
    batch, rows, columns, width = x.shape
    x = x.reshape(batch, rows // window, window, columns // window, window, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, width)


def shift_mask(rows: int, columns: int, window: int, shift: int) -> np.ndarray:
    """What is added to the logits of shifted windows, [windows, T, T]: 0, or -100 across the edge of the image."""
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    regions = np.zeros((1, rows, columns, 1), np.float32)
    for number, (down, right) in enumerate((down, right) for down in cuts for right in cuts):
        regions[:, down, right] = number
    regions = regions.reshape(rows // window, window, columns // window, window)
    regions = regions.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return np.where(regions[:, :, None] == regions[:, None, :], 0, _MASKED).astype(np.float32)


class WindowAttention(nn.Module):
    """Attention within windows, which ``shift`` moves by a cyclic roll, with a bias per relative position and head."""

    heads: int
    window: int
    shift: int

    @nn.compact
    def __call__(self, x: Float[Array, "B rows columns D"]) -> Float[Array, "B rows columns D"]:
        batch, rows, columns, width = x.shape
        size, tokens = self.window, self.window**2
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
        q, k, v = split_heads(nn.Dense(3 * width, name="qkv")(windows(x, size)), self.heads)
        table = self.param(
            "relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * size - 1) ** 2, self.heads),
        )
        bias = table[relative_position_index(size).reshape(-1)].reshape(tokens, tokens, self.heads).transpose(2, 0, 1)
        scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-2, -1) + bias[None]
        if self.shift:
            mask = jnp.asarray(shift_mask(rows, columns, size, self.shift))
            scores = scores.reshape(batch, -1, self.heads, tokens, tokens) + mask[None, :, None]
            scores = scores.reshape(-1, self.heads, tokens, tokens)
        y = (nn.softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(-1, tokens, width)
        y = nn.Dense(width, name="out")(y).reshape(batch, rows // size, columns // size, size, size, width)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, width)
        return jnp.roll(y, (self.shift, self.shift), axis=(1, 2)) if self.shift else y


class Swin(nn.Module):
    """Swin transformer: windows of 7x7, shifted in every second block, on 14x14 patches of width 24, then 7x7 of 48.

    Between the stages, the channels of four neighbours are concatenated, normalised and mapped from 4C to 2C. As in the
    published code, a map of a single window is not shifted. Stochastic depth is left out.

    References:
      Liu et al., "Swin transformer: hierarchical vision transformer using shifted windows", ICCV 2021.
    """

    @nn.compact
    def __call__(self, images: Num[Array, "B H W C"]) -> Float[Array, "B classes"]:
        """Logits of a batch of images, 28x28."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5)
        x = norm()(nn.Conv(24, (2, 2), strides=(2, 2), padding="VALID", name="patches")(scaled(images)))
        for stage, heads in enumerate((2, 4)):
            if stage:
                corners = [x[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
                x = norm()(jnp.concatenate(corners, axis=-1))
                x = nn.Dense(x.shape[-1] // 2, use_bias=False, name="merge")(x)
            for block in range(2):
                shift = 3 if block and min(x.shape[1:3]) > 7 else 0
                x = x + WindowAttention(heads, 7, shift, name=f"attention_{stage}_{block}")(norm()(x))
                x = x + MLP(False, name=f"mlp_{stage}_{block}")(norm()(x))
        return nn.Dense(10, name="head")(jnp.mean(norm()(x), axis=(1, 2)))
