r"""Hides 304 bits invisibly in an image, and reads them back without the original.

The payload is coded by BCH(511, 304), which corrects 25 wrong bits. The brightness x of an image, 0 to 255, has 511
secret coordinates :math:`y = X C x`: C gives the lowest frequencies of the orthonormal cosine transform of the whole
image, an eighth of them or 512 if that is more, for these are what compression keeps; X has the orthonormal rows of a
:mod:`smark_jax.carriers` carrier. Dither modulation (Chen and Wornell, "Quantization index modulation", IEEE Trans.
Information Theory 47, 2001) moves each coordinate to the nearest point of the lattice that its coded bit names,

.. math:: y_i' \in d_i + \Delta (\mathbb{Z} + b_i / 2),

with secret dither :math:`d_i`. The error is uniform over :math:`\pm \Delta / 2`, so that the RMS change in brightness
of n pixels is :math:`\Delta \sqrt{511 / 12 n}`: this is ``strength``, and the step follows from it. A coordinate reads
right as long as noise moves it by less than :math:`\Delta / 4`. All colours of a pixel move with its brightness, which
compression keeps best. The larger the image, the longer the step at the same strength: 224 by 224 pixels withstand
noise that 28 by 28 pixels do not.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, UInt8

from smark_jax import _batches, _validate, carriers, chacha, keys
from smark_jax._types import AnyArray
from smark_jax.blackbox import bch

PAYLOAD_BITS = 304
_CODED = 511
# Share of the frequencies that is used, but at least _CODED + 1 of them, which fill a block of the carrier.
_LOWEST = 1 / 8
_ROUNDS = 12
_code = functools.partial(bch.code, 9, 25)
_IMAGES_PER_PASS = 64


class _Secrets(NamedTuple):
    """The secret coordinates of images of one size; ``dither`` is a fraction of a step, in [0, 1)."""

    places: Int[Array, " K"]
    mark: carriers.Mark
    dither: Float[Array, " 511"]


class Reading(NamedTuple):
    """The result of :func:`read_images`.

    Attributes:
      payload: bits in {0, 1}, shape [B, 304]; zeros where nothing could be decoded.
      confidence: shape [B]: 1 where every coordinate lies on its lattice, about 0 in images without a payload of this
        key, and exactly 0 where decoding failed (more than 25 of 511 bits are wrong; without a payload, decoding
        succeeds with probability below 1e-19).
    """

    payload: Int[np.ndarray, "B 304"]
    confidence: Float[np.ndarray, " B"]


def mark_images(
    images: UInt8[AnyArray, "B H W C"],
    payload: Int[AnyArray, "304"] | Int[AnyArray, "B 304"],
    key: keys.SecretKey,
    strength: float = 1.2,
) -> UInt8[np.ndarray, "B H W C"]:
    """Hides 304 bits in each image.

    Args:
      images: pixels of 0 to 255, shape [B, H, W, C], at least 511 pixels each.
      payload: bits in {0, 1}, one payload for all images, shape [304], or one for each, shape [B, 304].
      key: needed to read the payload; images of one size share their secret coordinates.
      strength: RMS change of a pixel, in grey levels; 1.2 is a PSNR of 43 dB on digits. The stronger, the more noise
        and compression the payload survives.

    Returns:
      Marked images of the same shape and type.

    Raises:
      SmarkError: when images are not uint8 of four axes and at least 511 pixels, the payload is not of bits in one of
        the two shapes, or the strength is not positive.

    Examples:
      >>> import numpy as np
      >>> from smark_jax import blackbox, keys
      >>> images = np.random.default_rng(0).integers(40, 200, (2, 32, 32, 3), dtype=np.uint8)
      >>> payload = np.arange(304) % 2
      >>> key = keys.from_bytes(bytes(32))
      >>> marked = blackbox.mark_images(images, payload, key)
      >>> bool((blackbox.read_images(marked, key).payload == payload).all())
      True
    """
    _check("mark_images", images, strength)
    images, bits = np.asarray(images), np.asarray(payload)
    count = len(images)
    if bits.shape not in {(PAYLOAD_BITS,), (count, PAYLOAD_BITS)}:
        cause = "Pad shorter payloads with zeros; hash longer ones."
        expected = f"a payload of shape ({PAYLOAD_BITS},) or ({count}, {PAYLOAD_BITS})"
        raise _validate.fail("mark_images", expected, f"shape {bits.shape}", cause)
    if not np.isin(bits, (0, 1)).all():
        raise _validate.fail("mark_images", "bits of 0 and 1", "other entries", "Chips become bits by (1 - chips) / 2.")
    coded = np.broadcast_to(bch.encode(_code(), np.atleast_2d(bits)), (count, _CODED))
    secrets, step = _secrets(key, *images.shape[1:3]), _step(strength, images[0, ..., 0].size)
    mark = lambda x, b: _mark(x, b, secrets, step, strength)  # noqa: E731
    return _batches.apply(mark, _IMAGES_PER_PASS, images, coded)


def read_images(images: UInt8[AnyArray, "B H W C"], key: keys.SecretKey, strength: float = 1.2) -> Reading:
    """Reads the payloads back, without the unmarked images.

    Args:
      images: pixels of 0 to 255, shape [B, H, W, C].
      key: the key with which they were marked.
      strength: the strength with which they were marked.

    Returns:
      Payloads and confidence, one of each for each image.

    Raises:
      SmarkError: when images are not uint8 of four axes and at least 511 pixels, or the strength is not positive.
    """
    _check("read_images", images, strength)
    images = np.asarray(images)
    secrets, step = _secrets(key, *images.shape[1:3]), _step(strength, images[0, ..., 0].size)
    phases = _batches.apply(lambda x: _phase(x, secrets, step), _IMAGES_PER_PASS, images)
    # The phase is near 0 for a 0, near one half for a 1.
    coded = (np.abs(phases) > 0.25).astype(np.uint8)
    payload, ok = bch.decode(_code(), coded)
    closeness = np.cos(4 * np.pi * phases).mean(axis=1)
    return Reading(payload, np.where(ok, closeness, 0.0))


def _check(who: str, images: Any, strength: float) -> None:
    shape = np.shape(images)
    if len(shape) != 4 or 0 in shape or np.asarray(images).dtype != np.uint8:
        got = f"shape {shape}, dtype {np.asarray(images).dtype}"
        raise _validate.fail(
            who, "uint8 images of shape [B, H, W, C]", got, "One image is a batch of one: image[None]."
        )
    pixels = shape[1] * shape[2]
    if pixels < _CODED:
        cause = "Take larger images: 23 by 23 grey pixels are enough."
        raise _validate.fail(who, f"images of at least {_CODED} pixels", f"{pixels} pixels", cause)
    _validate.finite_number(who, "strength", strength)


def _step(strength: float, pixels: int) -> float:
    return strength * (12 * pixels / _CODED) ** 0.5


@functools.lru_cache(maxsize=8)
def _secrets(key: keys.SecretKey, height: int, width: int) -> _Secrets:
    squares = np.square(np.arange(height) / height)[:, None] + np.square(np.arange(width) / width)
    count = min(max(int(_LOWEST * squares.size), _CODED + 1), squares.size)
    places = np.sort(np.argsort(squares, axis=None, kind="stable")[:count])
    key = keys.derive(key, "payload in images", str(height), str(width))
    spec = carriers.Spec((carriers.Leaf("frequencies", (count,)),), (1.0,))
    words = chacha.keystream(keys.derive(key, "dither").to_words(), np.zeros(3, np.uint32), _CODED)
    mark = carriers.Mark(spec, carriers.draw(keys.derive(key, "coordinates"), spec, _CODED))
    return _Secrets(jnp.asarray(places), mark, words.astype(jnp.float32) * 2.0**-32)


def _coordinates(image: Float[Array, "H W C"], secrets: _Secrets) -> Float[Array, " 511"]:
    frequencies = jax.scipy.fft.dctn(_luma(image), norm="ortho")
    return carriers.despread(frequencies.reshape(-1)[secrets.places], secrets.mark)


@jax.jit
def _mark(images: Array, coded: Array, secrets: _Secrets, step: Array, room: Array) -> Array:
    """Projects in turns onto the lattice and onto the pixel range, starting at least ``room`` from black and white.

    Otherwise, in images that are mostly black, half of every change would be clipped, and no lattice point be in range.
    """

    def one(image: Array, coded: Array) -> Array:
        original = jnp.clip(image.astype(jnp.float32), room, 255 - room)
        offset = secrets.dither + 0.5 * coded
        wanted = step * (jnp.round(_coordinates(original, secrets) / step - offset) + offset)

        def project(_: int, x: Array) -> Array:
            change = carriers.spread(wanted - _coordinates(x, secrets), secrets.mark)
            frequencies = jnp.zeros(x.shape[0] * x.shape[1]).at[secrets.places].set(change)
            brightness = jax.scipy.fft.idctn(frequencies.reshape(x.shape[:2]), norm="ortho")
            return jnp.clip(x + brightness[..., None], 0, 255)

        marked = jax.lax.fori_loop(0, _ROUNDS, project, original)
        return jnp.round(marked).astype(jnp.uint8)

    return jax.vmap(one)(images, coded)


@jax.jit
def _phase(images: Array, secrets: _Secrets, step: Array) -> Array:
    """How far each coordinate is from the lattice of a 0, in steps, in [-1/2, 1/2]."""

    def one(image: Array) -> Array:
        place = _coordinates(image.astype(jnp.float32), secrets) / step - secrets.dither
        return place - jnp.round(place)

    return jax.vmap(one)(images)


def _luma(image: Float[Array, "H W C"]) -> Float[Array, "H W"]:
    """Brightness as JPEG defines it (ITU-R BT.601); the mean where there are not three channels."""
    weights = (
        jnp.array([0.299, 0.587, 0.114]) if image.shape[-1] == 3 else jnp.full(image.shape[-1], 1 / image.shape[-1])
    )
    return image @ weights
