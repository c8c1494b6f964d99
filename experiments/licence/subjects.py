"""The networks whose copies are licensed: a CNN trained on digits, and EfficientNet-Lite0 with its ImageNet weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import networks, real, sections
from experiments.licence.parties import Leaves
from experiments.robustness import rebuilding
from smark_jax import _batches, _trees, alignment, attacks, carriers, embedding, models
from smark_jax._types import PyTree
from smark_jax.carriers import inputs

Attack = Callable[[PyTree], PyTree]
CNN, EFFICIENTNET = "CNN", "EfficientNet-Lite0"
_JITTER = {"Conv": 0.3}
MOST_ATTACKS = 6
_SHAPE_IMAGES = 48


class Subject(NamedTuple):
    """A network, its mark, and what leakers do to copies.

    Attributes:
      name: of the network.
      tree: of the base, in the network's structure.
      base: its leaves by name.
      mark: at its calibrated strength.
      logits: of the images that judge, by the weights.
      accuracy: of the weights; None without labels.
      attacks: by name; each takes a copy in the network's structure, and gives the suspect as it is read.
      rebuild: R0, where the network has it.
    """

    name: str
    tree: PyTree
    base: Leaves
    mark: carriers.Mark
    logits: Callable[[PyTree], np.ndarray]
    accuracy: Callable[[PyTree], float] | None
    attacks: dict[str, Attack]
    rebuild: Attack | None


@functools.lru_cache(maxsize=2)
def load(name: str, config: Any, seed: int) -> Subject:
    """One of the two networks; the last ones are kept, since guilt and price use the same.

    Args:
      name: of the network.
      config: an :class:`experiments.licence.guilt.Config`.
      seed: of training and keys.
    """
    return (_cnn if name == CNN else _efficientnet)(config, seed)


def _marked(tree: PyTree, key_of: str, shape: carriers.Shape, run: Any, images: Any, config: Any, seed: int) -> Any:
    """The mark, at the strength with which a copy's logits change by the default of ``calibrate``."""
    key = sections.secret(seed, "experiments.licence", "carrier", key_of)
    mark = carriers.mark(key, tree, config.num_chips, shape=shape)
    return mark._replace(strength=embedding.calibrate(tree, mark, run, images).strength)


def _named(tree: PyTree) -> Leaves:
    return {name: np.asarray(leaf) for name, leaf in _trees.named("experiments", tree).items()}


def _cnn(config: Any, seed: int) -> Subject:
    found = networks.train(models.CNN(), seed, config.epochs, train_images=config.train_images)
    key, run, images = jax.random.key(seed + 1), found.apply_fn, found.images
    graph = alignment.trace_graph(run, found.base, images[:1])

    def realigned(copy: PyTree) -> PyTree:
        return alignment.align(attacks.rewrite(copy, graph, key), found.base, run, images[:1]).params

    def tuned(copy: PyTree) -> PyTree:
        return attacks.fine_tune(copy, run, images, found.labels, epochs=config.tuning_epochs, seed=seed + 1)

    def rebuild(copy: PyTree) -> PyTree:
        return rebuilding.jitter_and_project(copy, run, images[:1000], key, _JITTER)

    suspects: dict[str, Attack] = {
        "none": lambda copy: copy,
        "int8": functools.partial(attacks.quantise, bits=8),
        "prune 50 %": functools.partial(attacks.prune, fraction=0.5),
        f"fine-tune, {config.tuning_epochs} epochs": tuned,
        "rewritten and aligned": realigned,
        "R0": rebuild,
    }
    few = images[:: max(1, len(images) // 500)]
    mark = _marked(found.base, CNN, networks.shape(found), run, few, config, seed)
    jitted = jax.jit(run)
    logits = lambda params: _batches.apply(functools.partial(jitted, params), 250, found.test_images)  # noqa: E731
    return Subject(CNN, found.base, _named(found.base), mark, logits, found.accuracy, suspects, rebuild)


def _efficientnet(config: Any, seed: int) -> Subject:
    network = real.efficientnet_lite0()
    run = functools.partial(inputs.interpret, network.apply_fn)
    jitted, key = jax.jit(run), jax.random.key(seed)
    crops = lambda use, number: network.preprocess(real.natural_images(use, number).images)  # noqa: E731
    shape_images, strength = crops("shape", _SHAPE_IMAGES), crops("strength", config.strength_images)
    judging = crops("judging", config.judging_images)
    graph = alignment.trace_graph(network.apply_fn, network.params, shape_images[:1])
    shape = carriers.shape(network.params, network.apply_fn, shape_images)
    mark = _marked(network.params, EFFICIENTNET, shape, network.apply_fn, strength, config, seed)

    def realigned(copy: PyTree) -> PyTree:
        changed = attacks.rewrite(copy, graph, key)
        return alignment.align(changed, network.params, network.apply_fn, shape_images[:1]).params

    suspects: dict[str, Attack] = {
        "none": lambda copy: copy,
        "int8": functools.partial(attacks.quantise, bits=8),
        "prune 50 %": functools.partial(attacks.prune, fraction=0.5),
        "PCA 99 %": lambda copy: attacks.project_inputs(copy, network.apply_fn, shape_images, key, 0.99),
        "rewritten and aligned": realigned,
    }

    def logits(params: PyTree) -> np.ndarray:
        return np.asarray(_batches.apply(functools.partial(jitted, params), 16, judging), np.float64)

    tree = {name: jnp.asarray(leaf) for name, leaf in network.params.items()}
    return Subject(EFFICIENTNET, tree, network.params, mark, logits, None, suspects, None)
