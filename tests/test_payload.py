import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from smark_jax import blackbox, carriers, keys
from smark_jax.blackbox import payload as module

KEY = keys.from_bytes(bytes(32))
RNG = np.random.default_rng(0)
BITS = RNG.integers(0, 2, (4, 304))
NATURAL = np.clip(
    RNG.integers(20, 236, (4, 5, 5, 3)).repeat(8, axis=1).repeat(8, axis=2) + RNG.normal(0, 6, (4, 40, 40, 3)), 0, 255
).astype(np.uint8)


@pytest.mark.parametrize("shape", [(28, 28, 1), (25, 25, 1), (32, 32, 3), (224, 224, 3)])
def test_payloads_come_back_and_pixels_hardly_move(shape):
    images = RNG.integers(0, 256, (3, *shape), dtype=np.uint8)
    images[0] = 0  # black: nowhere to go but up
    images[1] = 255
    marked = blackbox.mark_images(images, BITS[:3], KEY)
    assert marked.dtype == np.uint8 and marked.shape == images.shape
    found = blackbox.read_images(marked, KEY)
    np.testing.assert_array_equal(found.payload, BITS[:3])
    assert (found.confidence > 0.5).all()
    error = np.square(marked.astype(np.float64) - images).mean(axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error) > 40).all()


def test_read_out_in_float64():
    """The lattice distances from dense matrices of the carrier and of the cosine transform, and the bits by hand."""
    images = NATURAL[:2, :24, :32]
    marked = blackbox.mark_images(images, BITS[0], KEY)
    places, mark, dither = module._secrets(KEY, 24, 32)
    secret = np.stack([np.asarray(carriers.spread(row, mark), np.float64) for row in jnp.eye(511)])
    waves = [
        np.outer(np.cos(np.pi * u * (2 * np.arange(24) + 1) / 48), np.cos(np.pi * v * (2 * np.arange(32) + 1) / 64))
        for u, v in zip(*np.divmod(np.asarray(places), 32), strict=True)
    ]
    waves = np.stack([(wave / np.linalg.norm(wave)).ravel() for wave in waves])
    matrix = secret @ waves
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(511), atol=1e-5)
    step = 1.2 * np.sqrt(12 * 768 / 511)
    luma = marked.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    place = luma.reshape(2, -1) @ matrix.T / step - np.asarray(dither, np.float64)
    bits = (np.abs(place - np.round(place)) > 0.25)[:, :304]  # the code is systematic
    assert (bits == BITS[0]).mean() > 0.98


def test_an_image_survives_a_file_and_noise_by_strength():
    marked = blackbox.mark_images(NATURAL, BITS, KEY, strength=3)
    files = []
    for image in marked:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(np.asarray(Image.open(file)))
    np.testing.assert_array_equal(blackbox.read_images(np.stack(files), KEY, 3).payload, BITS)
    noisy = np.clip(np.round(marked + RNG.normal(0, 2, marked.shape)), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(blackbox.read_images(noisy, KEY, 3).payload, BITS)


@pytest.mark.parametrize(("size", "strength"), [(40, 5.0), (224, 2.5)])
def test_payloads_survive_jpeg_where_there_is_room(size, strength):
    images = np.resize(NATURAL, (4, 40, 40, 3)).repeat(-(-size // 40), axis=1).repeat(-(-size // 40), axis=2)
    images = images[:, :size, :size]
    for at, survives in ((strength, True), (strength / 8, False)):
        files = []
        for image in blackbox.mark_images(images, BITS, KEY, at):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=90)
            files.append(np.asarray(Image.open(file)))
        found = blackbox.read_images(np.stack(files), KEY, at).payload
        assert (found == BITS).all() == survives


def test_without_payload_or_key_nothing_is_read():
    marked = blackbox.mark_images(NATURAL, BITS, KEY)
    for found in (blackbox.read_images(NATURAL, KEY), blackbox.read_images(marked, keys.from_bytes(bytes([1]) * 32))):
        assert not found.payload.any() and not found.confidence.any()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"mark_images: expected uint8 images .*float32"):
        blackbox.mark_images(NATURAL.astype(np.float32), BITS, KEY)
    with pytest.raises(ValueError, match="at least 511 pixels, but got 256"):
        blackbox.read_images(np.zeros((1, 16, 16, 1), np.uint8), KEY)
    with pytest.raises(ValueError, match="a payload of shape"):
        blackbox.mark_images(NATURAL, BITS[:2], KEY)
    with pytest.raises(ValueError, match="bits of 0 and 1"):
        blackbox.mark_images(NATURAL, 2 * BITS - 1, KEY)
    with pytest.raises(ValueError, match="strength"):
        blackbox.mark_images(NATURAL, BITS, KEY, strength=0)
