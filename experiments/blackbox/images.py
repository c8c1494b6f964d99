"""Images of several kinds, and the distortions that they undergo in transit."""

import io

import numpy as np
from PIL import Image

from experiments.common import networks

SHAPES = {"natural-like 32 x 32 x 3": (32, 32, 3), "natural-like 224 x 224 x 3": (224, 224, 3)}


def kinds(counts: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """uint8 images [B, H, W, C] of each kind: held-out digits, faces and non-faces, images with a 1/f spectrum."""
    import skimage.data

    faces = np.round(skimage.data.lfw_subset() * 255).astype(np.uint8)[..., None]
    found = {"digits 28 x 28 x 1": networks.loaded()[1].images, "LFW crops 25 x 25 x 1": faces}
    rng = np.random.default_rng(seed)
    found |= {name: natural(rng, counts[name], *shape) for name, shape in SHAPES.items()}
    return {name: images[: counts[name]] for name, images in found.items()}


def natural(rng: np.random.Generator, count: int, height: int, width: int, channels: int) -> np.ndarray:
    """Noise whose amplitude falls as 1/f, as that of photographs does (Field 1987), its colours alike."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    found = np.empty((count, height, width, channels), np.uint8)
    for image in found:
        spectrum = rng.normal(size=(2, channels, *frequency.shape))
        colours = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) / frequency, s=(height, width))
        colours = 128 + 45 * (colours - colours.mean()) / colours.std()
        image[:] = np.moveaxis(np.clip(np.round(0.3 * colours + 0.7 * colours.mean(axis=0)), 0, 255), 0, -1)
    return found


def through_file(images: np.ndarray, file_format: str, **settings: int) -> np.ndarray:
    """Written to a file of this format and read again."""
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, file_format, **settings)
        found.append(np.asarray(Image.open(file)).reshape(image.shape))
    return np.stack(found)


def noisy(images: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """With normal noise of ``sigma`` grey levels, rounded to 8 bits."""
    return np.clip(np.round(images + rng.normal(0, sigma, images.shape)), 0, 255).astype(np.uint8)


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB, the peak 255."""
    error = np.square(images.astype(np.float64) - others).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / error)
