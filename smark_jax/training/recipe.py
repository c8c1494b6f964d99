"""Sets up a training: deals the data to the parties, builds the step, and adds the owner's own mark to the base."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import optax
from jaxtyping import Array, Int8

from smark_jax import aggregation, carriers, codes, data, embedding, keys, losses, parallel, tracing
from smark_jax._types import ApplyFn, PyTree
from smark_jax.training import rounds

OWNER_MARGIN = 1.0  # the margin that training demands of each chip of the owner's mark


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
      parties: data holders that train together.
      epochs: passes over the training data.
      batch: examples per party and round.
      learning_rate: Adam's at the start; it falls to zero along a cosine.
      clip: bound on the norm of a party's gradient.
      seed: of the split between the parties, and of the shuffles.
    """

    parties: int
    epochs: int
    batch: int
    learning_rate: float
    clip: float
    seed: int


class Owner(NamedTuple):
    """The owner's own mark.

    Attributes:
      base: the weights that training starts from; the mark is read relative to them.
      mark: the carrying leaves and directions.
      word: the owner's codeword, shape [m].
    """

    base: PyTree
    mark: carriers.Mark
    word: Int8[Array, " m"]


class Training(NamedTuple):
    """A training that is ready to run.

    Attributes:
      step: the training step of a round.
      parties: how many train together.
      rounds: how many rounds there are.
      batches: ``batches(start)`` gives the batches of all rounds from number ``start`` on.
    """

    step: parallel.TrainStep
    parties: int
    rounds: int
    batches: Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]


def prepare(recipe: Recipe, apply_fn: ApplyFn, train: data.Dataset, owner: Owner | None) -> Training:
    """Deals the examples to the parties and sets up the rounds."""
    images, labels = rounds.partition(train.images, train.labels, recipe.parties, recipe.seed)

    def batches(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return rounds.batches(images, labels, recipe.batch, recipe.epochs, recipe.seed + 1, start=start)

    batches(0)  # refuses a batch that is too large before anything is compiled
    count = rounds.num_batches(labels.shape[1], recipe.batch, recipe.epochs)
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, count))
    if owner is not None:
        loss_fn = functools.partial(losses.sign_hinge, margin=OWNER_MARGIN)
        optimizer = optax.chain(embedding.add_fingerprint_gradient(loss_fn, owner.mark, owner.word), optimizer)
    step = parallel.train_step(apply_fn, optimizer, aggregation.FixedPoint(recipe.clip, recipe.parties))
    return Training(step, recipe.parties, count, batches)


def owner_mark(start: PyTree, key: keys.SecretKey) -> Owner:
    """The owner's own mark, read relative to the weights that training starts from."""
    mark = carriers.mark(keys.derive(key, "carrier"), start)
    return Owner(start, mark, codes.codebook(keys.derive(key, "code"), [0])[0])


def owner_log10_p(params: PyTree, owner: Owner) -> float:
    """Logarithm to base 10 of the p-value of the owner's mark in ``params``; 0 where it cannot be read."""
    now, before = (carriers.coordinates(tree, owner.mark) for tree in (params, owner.base))
    verdict = tracing.trace(carriers.despread(now - before, owner.mark), owner.word[None])
    return verdict.accused[0].log10_p if verdict.accused else 0.0
