"""Shared by the sections: data sets and their networks, intervals, secrets, and the evaluation of read-outs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from experiments.common import networks, sections
from smark_jax import codes, keys, models, statistics, tracing, training

ALPHA = 1e-6


class NormNet(nn.Module):
    """Three convolutions of stride 2, each followed by a norm over all its channels, and two dense layers.

    For methods that write into a norm's scales, and for training with differential privacy, which wants few weights:
    356,458 of them and 224 scales at width 32, 89,770 and 112 at width 16 (28x28x1 images).
    """

    width: int = 32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Logits of a batch of images."""
        x = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
        for times in (1, 2, 4):
            x = nn.Conv(self.width * times, (3, 3), 2, use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(num_groups=1)(x))
        x = nn.relu(nn.Dense(4 * self.width)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class DataSet(NamedTuple):
    """The networks for a data set, and how many times the epochs of MNIST-5k it takes."""

    network: nn.Module
    with_norms: nn.Module
    for_parties: nn.Module
    longer: int


DATA = {
    "mnist_5k": DataSet(models.CNN(), NormNet(), NormNet(width=16), 1),
    "cifar10": DataSet(models.ResNet18(), models.ResNet18(), models.ResNet18(), 4),
}


def steps(dataset: str, epochs: int, train_images: int | None) -> int:
    """How many steps :func:`experiments.common.networks.train` makes."""
    return networks.steps(epochs, len(networks.loaded(dataset)[0].labels[:train_images]))


def train(
    network: nn.Module, config: Any, seed: int, on_progress: training.OnProgress | None = None
) -> networks.Subject:
    """A base model on the data set, for the epochs and with the images that the section's configuration says."""
    return networks.train(network, seed, config.epochs, on_progress, config.train_images, config.data)


def secret(seed: int, *names: str) -> keys.SecretKey:
    return sections.secret(seed, "experiments.paper", *names)


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and half the width of its 95 % t-interval, with n; one value gives no interval, and half is None."""
    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else None
    return {"mean": float(np.mean(values)), "half": half, "n": n}


def show_interval(found: dict[str, Any], places: int = 1, factor: float = 1.0) -> str:
    """``97.3 ± 0.4`` of a fraction and factor 100; without an interval, the mean alone."""
    mean = f"{factor * found['mean']:.{places}f}"
    return mean if found["half"] is None else f"{mean} ± {factor * found['half']:.{places}f}"


def show_p(log10_p: float) -> str:
    return f"< 1e{math.floor(log10_p) + 1}" if log10_p < 0 else "1"


class Reading(NamedTuple):
    """One copy's read-out against its customer: wrong chips, the corrected p-value, who is accused.

    The p-value is that of the customer's own statistic, whether it accuses or not.
    """

    bit_errors: int
    T: float
    log10_p: float
    traced: bool
    innocents: int


def read(chips: np.ndarray, book: codes.Codebook, serial: int, word: np.ndarray) -> Reading:
    verdict = tracing.trace(chips, book, ALPHA, keep_statistics=False)
    accused = {accusation.serial for accusation in verdict.accused}
    statistic = float(statistics.direction(chips) @ np.asarray(word, np.float64))
    log_p = float(statistics.log_p_value(statistic, chips)) + math.log(book.num_customers)
    wrong = int(np.sum(np.asarray(chips) * np.asarray(word) <= 0))
    return Reading(wrong, statistic, min(0.0, log_p / math.log(10)), serial in accused, len(accused - {serial}))
