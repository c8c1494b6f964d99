"""The model and its training: what one would write without masks, too."""

import functools
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flwr.app import Array, ArrayRecord

from smark_jax import data, models, training

BATCH_SIZE = 32


class Digits(nn.Module):
    """Two convolutions, two dense layers, as smark_jax.models.CNN with a width to choose."""

    hidden: int = 128

    @nn.compact
    def __call__(self, images: Any) -> Any:
        x = images.astype(np.float32) / 255
        for features in (32, 64):
            x = models.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def initial(config: Any) -> dict[str, Any]:
    return models.init(Digits(int(config["hidden"])), jax.random.key(int(config["seed"])), (28, 28, 1))


def to_record(params: Any) -> ArrayRecord:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return ArrayRecord(
        {jax.tree_util.keystr(path, simple=True, separator="/"): Array(np.asarray(leaf)) for path, leaf in leaves}
    )


def named(arrays: list[np.ndarray], like: ArrayRecord) -> ArrayRecord:
    """A list of arrays, as Flower's former API has them, with the names of a record."""
    return ArrayRecord({name: Array(array) for name, array in zip(like, arrays, strict=True)})


def from_record(record: ArrayRecord, config: Any) -> Any:
    like = initial(config)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return jax.tree.unflatten(structure, [record[name].numpy() for name in names])


@functools.cache
def _digits() -> data.Dataset:
    return data.load("mnist_5k", "train")


def partition(index: int, config: Any) -> tuple[np.ndarray, np.ndarray]:
    digits = _digits()
    images, labels = training.partition(digits.images, digits.labels, int(config["clients"]), int(config["seed"]))
    return images[index], labels[index]


@functools.cache
def _stepper(hidden: int, learning_rate: float) -> tuple[optax.GradientTransformation, Any]:
    apply_fn, optimizer = models.apply_fn(Digits(hidden)), optax.adam(learning_rate)

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        def loss_fn(p: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(apply_fn(p, x), y).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return optimizer, step


def train(record: ArrayRecord, index: int, round_: int, config: Any) -> tuple[ArrayRecord, int, float]:
    """Some epochs of Adam on the participant's own digits; arrays, examples and the mean loss."""
    images, labels = partition(index, config)
    optimizer, step = _stepper(int(config["hidden"]), float(config["learning-rate"]))
    params = from_record(record, config)
    state, losses = optimizer.init(params), []
    rng = np.random.default_rng([int(config["seed"]), index, round_])
    for _ in range(int(config["epochs"])):
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            params, state, loss = step(params, state, images[chosen], labels[chosen])
            losses.append(loss)
    return to_record(params), len(labels), float(np.mean(losses))


def accuracy(record: ArrayRecord, config: Any) -> float:
    held_out = data.load("mnist_5k", "test")
    apply_fn = models.apply_fn(Digits(int(config["hidden"])))
    return models.accuracy(apply_fn, from_record(record, config), held_out.images, held_out.labels)
