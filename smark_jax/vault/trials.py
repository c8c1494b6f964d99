"""Runs copies beside their base before they are delivered: are outputs finite, and how often do they agree?"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from smark_jax import _validate, files
from smark_jax._types import ApplyFn, PyTree

# The most images that a copy is run on.
_IMAGES = 256
_OF_BASE = "Nothing is marked yet: does the network belong to this base, and are the images as it takes them?"
_OF_COPY = "Nothing was written of it. Mark fewer leaves or less: add the model again with --match or --strength."


class Network(NamedTuple):
    """How to run copies: ``apply_fn(params, images) -> logits``, images, and their labels if known."""

    apply_fn: ApplyFn
    images: Any
    labels: Any = None


class Trial(NamedTuple):
    """How the copies that were run answered.

    Attributes:
      copies: the number of copies.
      images: the number of images that each was run on.
      agreement: share of images for which a copy gives the base's class, averaged over all copies.
      least: the agreement of the copy that agrees least.
      accuracy: mean accuracy of the copies, if labels are known.
      base_accuracy: accuracy of the base on the same images, if labels are known.
    """

    copies: int
    images: int
    agreement: float
    least: float
    accuracy: float | None
    base_accuracy: float | None


def run(who: str, apply_fn: ApplyFn, params: PyTree, images: Any) -> np.ndarray:
    """Runs an owner's network and returns its logits.

    Raises:
      SmarkError: when the network refuses the parameters or the images.
    """
    try:
        return np.asarray(apply_fn(params, images))
    except Exception as error:  # the owner's code, or JAX called by it, may raise anything
        got = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        cause = f"The images have the shape {np.shape(images)}: does the network belong to this base?"
        raise _validate.fail(who, "a network that takes the base and the images", got, cause) from error


class Running:
    """Runs copies beside the base, and counts how they answer."""

    def __init__(self, network: Network, base: Mapping[str, np.ndarray]) -> None:
        self._run = jax.jit(network.apply_fn)
        self._images = np.asarray(network.images)[:_IMAGES]
        self._labels = None if network.labels is None else np.asarray(network.labels)[:_IMAGES]
        self._base, self._copies = self._answers("the base", base, _OF_BASE), list[np.ndarray]()

    def _answers(self, who: str, leaves: Mapping[str, np.ndarray], cause: str) -> np.ndarray:
        logits = run("issue", self._run, files.nest(leaves), self._images)
        if not np.isfinite(logits).all():
            raise _validate.fail("issue", "finite outputs", f"NaN or infinite ones from {who}", cause)
        return logits.argmax(axis=-1)

    def add(self, who: str, leaves: Mapping[str, np.ndarray]) -> None:
        """Runs a copy.

        Raises:
          SmarkError: when it answers NaN or infinite values.
        """
        self._copies.append(self._answers(who, leaves, _OF_COPY))

    def found(self) -> Trial | None:
        """How the copies answered; None when there were none."""
        if not self._copies:
            return None
        agreement = [float((answers == self._base).mean()) for answers in self._copies]
        accuracy = base_accuracy = None
        if self._labels is not None:
            accuracy = float(np.mean([(answers == self._labels).mean() for answers in self._copies]))
            base_accuracy = float((self._base == self._labels).mean())
        mean = sum(agreement) / len(agreement)
        return Trial(len(agreement), len(self._images), mean, min(agreement), accuracy, base_accuracy)
