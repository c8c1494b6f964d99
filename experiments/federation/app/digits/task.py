"""The model and its training, just as without masks."""

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
def _descent(hidden: int, learning_rate: float) -> tuple[Any, optax.GradientTransformation]:
    apply_fn = models.apply_fn(Digits(hidden))

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()

    return loss_fn, optax.adam(learning_rate)


def train(record: ArrayRecord, index: int, round_: int, config: Any) -> tuple[ArrayRecord, int, float]:
    """Some epochs of Adam on the participant's own digits; arrays, examples and the mean loss."""
    images, labels = partition(index, config)
    loss_fn, optimizer = _descent(int(config["hidden"]), float(config["learning-rate"]))
    seed, epochs = [int(config["seed"]), index, round_], int(config["epochs"])
    batches = training.minibatches((images, labels), batch_size=BATCH_SIZE, epochs=epochs, seed=seed)
    start = training.begin(from_record(record, config), optimizer)
    state, info = training.minimise(loss_fn, optimizer, start, batches)
    return to_record(state.params), len(labels), float(info.losses.mean())


def accuracy(record: ArrayRecord, config: Any) -> float:
    held_out = data.load("mnist_5k", "test")
    apply_fn = models.apply_fn(Digits(int(config["hidden"])))
    return models.accuracy(apply_fn, from_record(record, config), held_out.images, held_out.labels)
