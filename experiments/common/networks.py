"""The networks under attack, trained on digits, and the functions on them that all sections need."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets  # noqa: F401  # first: while it is imported, __import__ is replaced, and progress displays fail
from jax import Array, lax

from experiments.common import sections
from smark_jax import carriers, data, embedding, keys, models, parallel, training
from smark_jax._types import ApplyFn, PyTree

CUSTOMERS = 10**6
ALPHA = 1e-6
_SHAPE_IMAGES = 64
_ADAM = optax.adam(1e-3)


def scaled(images: Array) -> Array:
    """Images as the networks of :mod:`smark_jax.models` see them: uint8 is scaled to [0, 1], floats stay."""
    return images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)


class ConcatNet(nn.Module):
    """Every convolution's output is appended to its input, as in DenseNet (Huang et al. 2017): 49,962 weights."""

    growth: int = 16

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Logits of a batch of images."""
        x = nn.relu(nn.Conv(2 * self.growth, (3, 3), 2)(scaled(images)))
        for _ in range(2):
            for _ in range(3):
                x = jnp.concatenate([x, nn.relu(nn.Conv(self.growth, (3, 3))(x))], axis=-1)
            x = nn.avg_pool(nn.relu(nn.Conv(2 * self.growth, (1, 1))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Functional(NamedTuple):
    """A network as pure functions: what :func:`train` needs of one that is not of linen.

    Attributes:
      init: ``init(key, image_shape)``, a tree of weights, or linen's variables with their key ``"params"``.
      apply_fn: for inference, by stored statistics.
      any_width: the same, with channels counted from the weights.
      train_fn: ``train_fn(params, rest, images) -> (logits, rest)``, where ``rest`` is what gradients do not train.
    """

    init: Callable[[Array, tuple[int, int, int]], PyTree]
    apply_fn: ApplyFn
    any_width: ApplyFn
    train_fn: Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]


def ungrouped(x: Array, kernel: Array, *settings: Any, feature_group_count: int, **named: Any) -> Array:
    """``lax.conv_general_dilated`` on [B, H, W, C] with the kernels of groups as blocks of a dense kernel, else zeros.

    XLA's gradient of a grouped convolution is slow on CPUs, so that training takes this form and inference the grouped
    one. Groups of a single channel, depthwise convolutions, stay as they are.
    """
    groups, (*sides, inputs, outputs) = feature_group_count, kernel.shape
    if groups > 1 and inputs > 1:
        blocks = kernel.reshape(*sides, 1, inputs, groups, outputs // groups)
        blocks = blocks * jnp.eye(groups).reshape(*[1] * len(sides), groups, 1, groups, 1)
        kernel, groups = blocks.reshape(*sides, groups * inputs, outputs), 1
    return lax.conv_general_dilated(x, kernel, *settings, feature_group_count=groups, **named)


def quick_gradients(apply_fn: ApplyFn) -> ApplyFn:
    """The same function, with linen's grouped convolutions computed by :func:`ungrouped`."""

    def apply(params: PyTree, images: Array) -> Array:
        with nn.intercept_methods(_ungroup):
            return apply_fn(params, images)

    return apply


def _ungroup(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Has linen's grouped convolutions computed by :func:`ungrouped`."""
    if isinstance(context.module, nn.Conv):
        object.__setattr__(context.module, "conv_general_dilated", ungrouped)
    return call(*args, **kwargs)


@functools.lru_cache(maxsize=32)
def functional(network: nn.Module | Functional) -> Functional:
    """The pure functions of a network; the same ones for equal networks, so that their steps are compiled once."""
    if isinstance(network, Functional):
        return network

    def train_fn(params: PyTree, rest: PyTree, images: Array) -> tuple[Array, PyTree]:
        with nn.intercept_methods(_ungroup):
            if "batch_stats" not in rest:
                return network.apply({"params": params}, images), rest  # pyright: ignore[reportReturnType]
            return network.apply({"params": params, **rest}, images, train=True, mutable=["batch_stats"])

    return Functional(
        functools.partial(models.init, network),
        models.apply_fn(network),
        models.apply_fn(network, any_width=True),
        train_fn,
    )


class Subject(NamedTuple):
    """A trained network and its data; labels are class numbers."""

    apply_fn: ApplyFn
    any_width: ApplyFn
    base: PyTree
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def accuracy(self, params: PyTree) -> float:
        return models.accuracy(self.any_width, params, self.test_images, self.test_labels)


def networks() -> dict[str, nn.Module]:
    return {"CNN": models.CNN(), "ResNet-18": models.ResNet18(width=8, norm="batch"), "concatenating": ConcatNet()}


@functools.cache
def loaded(dataset: str = "mnist_5k") -> tuple[data.Dataset, data.Dataset]:
    """Training and test images, decoded once for all sections."""
    return data.load(dataset, "train"), data.load(dataset, "test")


@functools.lru_cache(maxsize=8)
def _loss(network: nn.Module | Functional) -> Callable[..., tuple[Array, PyTree]]:
    """The loss of :func:`train`; the same function for equal networks."""
    train_fn = functional(network).train_fn

    def loss(params: PyTree, rest: PyTree, x: Array, y: Array) -> tuple[Array, PyTree]:
        logits, new = train_fn(params, rest, x)
        return parallel.cross_entropy(logits, y), new

    return loss


def train(
    network: nn.Module | Functional,
    seed: int,
    epochs: int,
    on_progress: training.OnProgress | None = None,
    train_images: int | None = None,
    dataset: str = "mnist_5k",
) -> Subject:
    """Trains with Adam, batch statistics included."""
    train, test = loaded(dataset)
    images, labels = np.asarray(train.images)[:train_images], np.asarray(train.labels)[:train_images]
    functions = functional(network)
    start = functions.init(jax.random.key(seed), images.shape[1:])
    variables = dict(start) if "params" in start else {"params": start}
    params, rest = variables.pop("params"), variables
    state, _ = training.minimise(
        _loss(network),
        _ADAM,
        training.begin(params, _ADAM, carried=rest),
        training.minibatches((images, labels), batch_size=64, epochs=epochs, seed=seed),
        total=training.num_batches(len(images), 64, epochs),
        on_progress=on_progress,
    )
    params, rest = state.params, state.carried
    base = {"params": params, **rest} if "batch_stats" in rest else params
    return Subject(
        functions.apply_fn,
        functions.any_width,
        base,
        images,
        labels,
        np.asarray(test.images),
        np.asarray(test.labels),
    )


def steps(epochs: int, images: int = 4000) -> int:
    return epochs * (images // 64)


def secret(seed: int, *names: str) -> keys.SecretKey:
    return sections.secret(seed, "experiments.robustness", *names)


def shape(subject: Subject) -> carriers.Shape:
    """The shape of the base, from its last images; images that nobody trains on would be better, but digits are few."""
    return carriers.shape(subject.base, subject.apply_fn, subject.images[-_SHAPE_IMAGES:])


def bearable(subject: Subject, mark: carriers.Mark, max_drop: float) -> embedding.Calibration:
    """The strength that costs at most ``max_drop`` of the accuracy on the training images, whatever else changes."""
    return embedding.calibrate(
        subject.base,
        mark,
        subject.apply_fn,
        subject.images,
        max_change=None,
        max_drop=max_drop,
        labels=subject.labels,
        num_copies=5,
    )
