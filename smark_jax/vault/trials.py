"""Runs copies beside their base before they are delivered: are outputs finite, and what does a copy cost?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from smark_jax import _validate, embedding, errors, files
from smark_jax._types import ApplyFn, PyTree

# The most images that a copy is run on.
_IMAGES = 256
_OF_BASE = "Nothing is marked yet: does the network belong to this base, and are the images as it takes them?"
_OF_COPY = (
    "That copy was not written; its customer keeps the serial. Mark fewer leaves or more weakly: add the model again "
    "under another name with --match, or with a smaller --change or --strength."
)


class Network(NamedTuple):
    """How to run copies: ``apply_fn(params, images) -> logits``, images, and their labels if known."""

    apply_fn: ApplyFn
    images: Any
    labels: Any = None


class Tried(NamedTuple):
    """What one copy costs.

    Attributes:
      customer: who gets it.
      agreement: share of images for which it gives the base's class.
      kl: divergence of its answers from the base's in nats, mean over images.
      change: relative change of the logits.
      accuracy: on these images, if labels are known.
    """

    customer: str
    agreement: float
    kl: float
    change: float
    accuracy: float | None


class Trial(NamedTuple):
    """Summary of how copies answered.

    Attributes:
      copies: the number of copies.
      images: the number of images that each was run on.
      agreement: share of images for which a copy gives the base's class, averaged over all copies.
      least: the agreement of the copy that agrees least.
      kl: divergence of the copies' answers from the base's in nats, averaged over all copies.
      change: relative change of the logits, averaged over all copies.
      accuracy: mean accuracy of the copies, if labels are known.
      base_accuracy: accuracy of the base on the same images, if labels are known.
      each: what each copy costs, in the order in which they were run.
    """

    copies: int
    images: int
    agreement: float
    least: float
    kl: float
    change: float
    accuracy: float | None
    base_accuracy: float | None
    each: tuple[Tried, ...]


def network(apply_fn: ApplyFn, images: Any, labels: Any = None) -> Network:
    """How to run copies.

    Raises:
      SmarkError: when there are no images, there is another number of labels, or either is not an array.
    """
    try:
        number = len(images) if np.ndim(images) else 0
        counted = (number,) if labels is None else np.shape(labels)
    except ValueError:  # nested lists of different lengths
        cause = "Convert them with numpy.asarray, or save them as arrays."
        raise _validate.fail("network", "images and labels as arrays", "lists of different lengths", cause) from None
    if not number:
        got = "none" if np.ndim(images) else f"a {type(images).__name__}"
        cause = "Return them as one array, whose first axis runs over images."
        raise _validate.fail("network", "an array of at least one image", got, cause)
    if counted != (number,):
        cause = "Do images and labels belong to the same split?"
        raise _validate.fail("network", f"one label for each of {number:,} images", f"shape {counted}", cause)
    return Network(apply_fn, images, labels)


def run(who: str, apply_fn: ApplyFn, params: PyTree, images: Any) -> np.ndarray:
    """Runs an owner's network and returns its logits.

    Raises:
      SmarkError: when the network refuses the parameters or the images.
    """
    try:
        return np.asarray(apply_fn(params, images))
    except errors.SmarkError:  # a network's file says itself what it takes
        raise
    except Exception as error:  # the owner's code, or JAX called by it, may raise anything
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        cause = f"The images have the shape {np.shape(images)}: does the network belong to this base?"
        raise _validate.fail(who, "a network that takes the base and the images", got, cause) from error


class Running:
    """Runs copies beside the base, and measures what they cost.

    Args:
      network: how to run them.
      base: the leaves of the base.
      spared: the number of images at the start that the model's shape was made from: copies are run on the others, if
        there are any.
    """

    def __init__(self, network: Network, base: Mapping[str, np.ndarray], spared: int = 0) -> None:
        part = slice(spared if spared < len(network.images) else 0, None)
        images = np.asarray(network.images)[part][-_IMAGES:]
        labels = None if network.labels is None else np.asarray(network.labels)[part][-_IMAGES:]
        tree = files.nest(base)
        run("issue", lambda params, some: jax.jit(network.apply_fn)(params, some), tree, images[:2])
        try:
            self._base = embedding.answers(tree, network.apply_fn, images, labels)
        except errors.NotFinite:
            raise _not_finite("the base", _OF_BASE) from None
        self._tried = list[Tried]()

    def add(self, customer: str, leaves: Mapping[str, np.ndarray]) -> None:
        """Runs a customer's copy.

        Raises:
          NotFinite: when it answers NaN or infinite values.
        """
        try:
            cost = self._base.cost(files.nest(leaves))
        except errors.NotFinite:
            raise _not_finite(f"the copy of {customer}", _OF_COPY) from None
        before = self._base.accuracy
        accuracy = None if before is None else before - cost.drop
        self._tried.append(Tried(customer, cost.agreement, cost.kl, cost.change, accuracy))

    def found(self) -> Trial | None:
        """The summary over all copies; None when there were none."""
        if not self._tried:
            return None
        _, agreement, kl, change, accuracy = zip(*self._tried, strict=True)
        before = self._base.accuracy
        return Trial(
            copies=len(self._tried),
            images=len(self._base.images),
            agreement=_mean(agreement),
            least=min(agreement),
            kl=_mean(kl),
            change=_mean(change),
            accuracy=None if before is None else _mean(accuracy),
            base_accuracy=before,
            each=tuple(self._tried),
        )


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def _not_finite(who: str, cause: str) -> errors.NotFinite:
    got = f"NaN or infinite ones from {who}"
    return _validate.fail("issue", "finite outputs", got, cause, kind=errors.NotFinite)
