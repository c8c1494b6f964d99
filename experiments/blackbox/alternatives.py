"""Other ways to hide the same bits, for comparison: spread spectrum, and a learned encoder and decoder."""

from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from smark_jax import _batches, carriers, keys, training
from smark_jax._types import PyTree
from smark_jax.blackbox import PAYLOAD_BITS

_BATCH = 64


def _mark(key: keys.SecretKey, pixels: int) -> carriers.Mark:
    spec = carriers.Spec((carriers.Leaf("image", (pixels,)),), (1.0,))
    return carriers.Mark(spec, carriers.draw(keys.derive(key, "spread spectrum"), spec, PAYLOAD_BITS))


def spread_spectrum(images: np.ndarray, payload: np.ndarray, key: keys.SecretKey, rms: float) -> np.ndarray:
    """Adds every bit's sign along its carrier, scaled to ``rms`` grey levels (Cox et al. 1997); grey images only."""
    count, *shape = images.shape
    mark = _mark(key, images[0].size)
    signs = jnp.asarray(1.0 - 2 * payload)
    length = rms * (images[0].size / PAYLOAD_BITS) ** 0.5
    change = jax.vmap(lambda chips: carriers.spread(chips, mark))(signs) * length
    return np.clip(np.round(images + np.asarray(change).reshape(count, *shape)), 0, 255).astype(np.uint8)


def read_spread_spectrum(images: np.ndarray, key: keys.SecretKey) -> np.ndarray:
    """Blind: the image itself is the noise, less what its neighbours predict of each pixel."""
    mark = _mark(key, images[0].size)
    grey = images[..., 0].astype(np.float32)
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), "edge")
    around = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    left = (grey - around / 4).reshape(len(images), -1)
    return np.asarray(jax.vmap(lambda x: carriers.despread(x, mark))(left) < 0).astype(int)


class _Encoder(nn.Module):
    """A change of at most ``limit`` grey levels from image and bits, after HiDDeN (Zhu et al. 2018)."""

    limit: float = 6.0

    @nn.compact
    def __call__(self, images: Array, bits: Array) -> Array:
        height, width = images.shape[1:3]
        plane = nn.Dense(height * width)(2.0 * bits - 1).reshape(-1, height, width, 1)
        x = jnp.concatenate([images / 255, plane], axis=-1)
        for _ in range(2):
            x = nn.relu(nn.Conv(24, (3, 3))(x))
        return self.limit * jnp.tanh(nn.Conv(1, (3, 3))(x) + plane)


class _Decoder(nn.Module):
    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = images / 255
        flat = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Conv(24, (3, 3))(x))
        return nn.Dense(PAYLOAD_BITS)(jnp.concatenate([10 * flat, nn.Conv(2, (1, 1))(x).reshape(len(x), -1)], axis=-1))


def learned(
    training_images: np.ndarray, images: np.ndarray, payload: np.ndarray, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Marked images and the bits read from them, after ``steps`` of joint training on other images."""
    encoder, decoder = _Encoder(), _Decoder()
    shape, bits = jnp.zeros((1, *images.shape[1:])), jnp.zeros((1, PAYLOAD_BITS))
    params = {
        "encoder": encoder.init(jax.random.key(seed), shape, bits),
        "decoder": decoder.init(jax.random.key(seed + 1), shape),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def mark(params: PyTree, x: Array, bits: Array) -> Array:
        return jnp.clip(x + jnp.asarray(encoder.apply(params["encoder"], x, bits)), 0, 255)

    def read(params: PyTree, x: Array) -> Array:
        return jnp.asarray(decoder.apply(params["decoder"], x))

    def loss(params: PyTree, x: Array, bits: Array, rounding: Array) -> Array:
        marked = mark(params, x, bits)
        wrong = optax.sigmoid_binary_cross_entropy(read(params, marked + rounding), bits).mean()
        return wrong + 0.002 * jnp.square(marked - x).mean()

    def drawn() -> Iterator[tuple[np.ndarray, ...]]:
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            x = training_images[rng.choice(len(training_images), _BATCH)].astype(np.float32)
            bits = rng.integers(0, 2, (_BATCH, PAYLOAD_BITS)).astype(np.float32)
            yield x, bits, rng.uniform(-0.5, 0.5, x.shape).astype(np.float32)

    params = training.minimise(loss, optimizer, training.begin(params, optimizer), drawn())[0].params
    marked = _batches.apply(
        jax.jit(lambda x, bits: jnp.round(mark(params, x.astype(jnp.float32), bits)).astype(jnp.uint8)),
        _BATCH,
        images,
        payload,
    )
    read_bits = _batches.apply(jax.jit(lambda x: read(params, x.astype(jnp.float32)) > 0), _BATCH, marked)
    return marked, read_bits.astype(int)
