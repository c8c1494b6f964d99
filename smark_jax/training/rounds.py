"""Rounds of masked training: dealing the data to parties, drawing their batches, and the loop over them."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Int, UInt32

from smark_jax import _validate, parallel
from smark_jax._types import AnyArray


def partition(
    images: np.ndarray, labels: Int[np.ndarray, " N"], num_parties: int, seed: int
) -> tuple[np.ndarray, Int[np.ndarray, "P n"]]:
    """Deals the examples to parties at random, the same number to each; up to ``num_parties - 1`` are left out.

    Args:
      images: shape [N, ...].
      labels: shape [N].
      num_parties: P.
      seed: of the shuffle.

    Returns:
      Images of shape [P, n, ...] and labels of shape [P, n], n = N // P.

    Raises:
      SmarkError: with zero parties, more parties than examples, or unequal numbers of images and labels.
    """
    _validate.positive("partition", "num_parties", num_parties)
    if len(images) != len(labels):
        got = f"{len(images)} images and {len(labels)} labels"
        raise _validate.fail("partition", "a label for each image", got, "Are they of the same split?")
    count = len(images) // num_parties
    if count == 0:
        got = f"{len(images)} examples for {num_parties} parties"
        raise _validate.fail("partition", "at least one example for each party", got, "Use fewer parties.")
    order = np.random.default_rng(seed).permutation(len(images))[: count * num_parties].reshape(num_parties, count)
    return np.asarray(images)[order], np.asarray(labels)[order]


def num_batches(examples_per_party: int, batch_size: int, epochs: int) -> int:
    """How many batches :func:`batches` yields: the total of a progress bar."""
    return examples_per_party // batch_size * epochs


def batches(
    images: np.ndarray, labels: Int[np.ndarray, "P n"], batch_size: int, epochs: int, seed: int, *, start: int = 0
) -> Iterator[tuple[np.ndarray, Int[np.ndarray, "P B"]]]:
    """Batches for all parties at once; each epoch reshuffles each party's examples and drops a short last batch.

    Args:
      images: every party's images, shape [P, n, ...].
      labels: their labels, shape [P, n].
      batch_size: B, examples per party and batch, at most n.
      epochs: passes over the data.
      seed: of the shuffles.
      start: number of batches to skip without touching their images, to resume an interrupted training.

    Yields:
      Images of shape [P, B, ...] and labels of shape [P, B].

    Raises:
      SmarkError: when the batch size is not between 1 and n, or epochs not at least 1.
    """
    _validate.positive("batches", "batch_size", batch_size)
    _validate.positive("batches", "epochs", epochs)
    count = labels.shape[1]
    if batch_size > count:
        cause = "Use smaller batches or fewer parties."
        raise _validate.fail("batches", f"a batch size of at most {count}, a party's examples", f"{batch_size}", cause)
    return _draw_batches(images, labels, batch_size, epochs, np.random.default_rng(seed), start)


def _draw_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, epochs: int, rng: np.random.Generator, skip: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    num_parties, count = labels.shape
    party = np.arange(num_parties)[:, None]
    for _ in range(epochs):
        order = rng.permuted(np.tile(np.arange(count), (num_parties, 1)), axis=1)
        for start in range(0, count - batch_size + 1, batch_size):
            if skip > 0:
                skip -= 1
                continue
            index = order[:, start : start + batch_size]
            yield images[party, index], labels[party, index]


def fit(
    step: parallel.TrainStep,
    state: parallel.TrainState,
    batches: Iterable[tuple[AnyArray, AnyArray]],
    pair_keys: UInt32[AnyArray, "P P 8"],
    on_round: Callable[[parallel.TrainState, parallel.TrainInfo], None] = lambda state, info: None,
) -> parallel.TrainState:
    """Runs a training step over all batches.

    Args:
      step: from :func:`smark_jax.parallel.train_step`.
      state: the initial state: ``step.init(params)``, or a state saved earlier.
      batches: images [P, B, ...] and labels [P, B] of each round.
      pair_keys: the parties' pair keys, shape [P, P, 8]; never used before with the same round numbers. After an error
        or a crash agree new ones, since the masks of rounds already sent must not cover other gradients. (A run that
        repeats the same rounds bit for bit sends nothing new, and may keep them.)
      on_round: called after each round with its state and info, for a progress bar or a checkpoint; the next round is
        under way by then.

    Returns:
      The last state.

    Raises:
      SmarkError: when parties' gradients are NaN or infinite. States passed to ``on_round`` before that are valid.
    """
    running: tuple[parallel.TrainState, parallel.TrainInfo] | None = None
    for images, labels in batches:
        # The next round is under way while the host looks at the last one.
        following = step.update(running[0] if running else state, images, labels, pair_keys)
        if running:
            _finish(*running, on_round)
        running = following
    if running:
        _finish(*running, on_round)
    return running[0] if running else state


def _finish(
    state: parallel.TrainState,
    info: parallel.TrainInfo,
    on_round: Callable[[parallel.TrainState, parallel.TrainInfo], None],
) -> None:
    """Waits for a round, and shows it."""
    if int(info.diverged) > 0:
        raise _validate.fail(
            "fit",
            "finite gradients from every party",
            f"NaN or infinite ones from {int(info.diverged)} in round {int(state.round) - 1}",
            "Lower the learning rate, or look for NaN in the images.",
        )
    on_round(state, info)
