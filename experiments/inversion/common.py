"""Shared by the sections: networks, data, and similarity measures for images."""

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import optimize
from skimage import metrics

from smark_jax import attacks, data, models, parallel
from smark_jax._types import ApplyFn, PyTree

IMAGE_SHAPE = (28, 28, 1)
_TRAIN_EPOCHS = 5


class LeNet(nn.Module):
    """The network of the DLG paper: sigmoids and strides, so that its gradient is smooth in the images."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        for strides in (2, 2, 1):
            conv = nn.Conv(12, (5, 5), strides, kernel_init=_uniform, bias_init=_uniform)
            x = nn.sigmoid(conv(x))
        return nn.Dense(10, kernel_init=_uniform, bias_init=_uniform)(x.reshape(x.shape[0], -1))


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -0.5, 0.5)  # the initialisation of Zhu et al.


NETWORKS = {"LeNet": LeNet(), "CNN": models.CNN()}
_LAST_LAYER = {"LeNet": "Dense_0", "CNN": "Dense_1"}


class Victim(NamedTuple):
    """A network at the moment when its parties send their gradients."""

    apply_fn: ApplyFn
    params: PyTree
    accuracy: float

    def gradient(self, images: np.ndarray, labels: np.ndarray) -> PyTree:
        return _gradient(self.apply_fn, self.params, jnp.asarray(images), jnp.asarray(labels))


def victim(network: str, weights: str, seed: int) -> Victim:
    """The network with its first weights, or trained on with Adam on the training digits."""
    model = NETWORKS[network]
    apply_fn, params = models.apply_fn(model), models.init(model, jax.random.key(seed), IMAGE_SHAPE)
    if weights == "trained":
        train = data.load("mnist_5k", "train")
        params = attacks.fine_tune(params, apply_fn, train.images, train.labels, epochs=_TRAIN_EPOCHS, seed=seed)
    test = data.load("mnist_5k", "test")
    return Victim(apply_fn, params, models.accuracy(apply_fn, params, test.images, test.labels))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(apply_fn: ApplyFn, params: PyTree, images: Array, labels: Array) -> PyTree:
    return jax.grad(lambda p: parallel.cross_entropy(apply_fn(p, images), labels))(params)


def inferred_label(network: str, gradient: PyTree) -> Array:
    return attacks.infer_label(gradient[_LAST_LAYER[network]]["bias"])[None]


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The test digits in [0, 1] in an order that looks random, their labels, and the mean training digit."""
    train, test = data.load("mnist_5k", "train"), data.load("mnist_5k", "test")
    mean = (train.images.astype(np.float64).mean(axis=0) / 255).astype(np.float32)
    return test.images.astype(np.float32) / 255, test.labels, mean


class Likeness(NamedTuple):
    mse: float
    psnr: float
    ssim: float


def likeness(found: np.ndarray, original: np.ndarray) -> Likeness:
    """Of two images in [0, 1], shape [H, W, C]: mean squared error, PSNR in dB, structural similarity."""
    return Likeness(
        float(metrics.mean_squared_error(original, found)),
        float(metrics.peak_signal_noise_ratio(original, found, data_range=1)),
        float(cast(float, metrics.structural_similarity(original, found, data_range=1, channel_axis=-1))),
    )


def matched(found: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The reconstructions in the order of the originals: the assignment of least total squared error."""
    errors = np.square(originals[:, None] - found[None]).mean(axis=(2, 3, 4))
    return found[optimize.linear_sum_assignment(errors)[1]]


def summary(scores: list[Likeness]) -> dict[str, Any]:
    """Means over images, the median and extremes in dB, and each image's PSNR."""
    mse, psnr, ssim = np.array(scores).T
    return {
        "mse": float(mse.mean()),
        "psnr": float(psnr.mean()),
        "psnr_median": float(np.median(psnr)),
        "psnr_lowest": float(psnr.min()),
        "psnr_highest": float(psnr.max()),
        "ssim": float(ssim.mean()),
        "ssim_highest": float(ssim.max()),
        "psnr_each": [round(float(value), 3) for value in psnr],
    }
