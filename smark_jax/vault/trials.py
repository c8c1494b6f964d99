"""Running copies beside their base before they are handed over: they answer, and how often as the base does."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from smark_jax import _validate, files
from smark_jax._types import ApplyFn

# A copy is run on at most so many images.
_IMAGES = 256


class Network(NamedTuple):
    """How to run copies: ``apply_fn(params, images) -> logits``, images, and their labels where they are known."""

    apply_fn: ApplyFn
    images: Any
    labels: Any = None


class Trial(NamedTuple):
    """How copies answered that were run.

    Attributes:
      copies: how many.
      images: on how many images each.
      agreement: share of images that a copy puts into the base's class, over all copies.
      least: that of the copy that agrees least.
      accuracy: of the copies, over all, where labels are known.
      base_accuracy: of the base on the same images.
    """

    copies: int
    images: int
    agreement: float
    least: float
    accuracy: float | None
    base_accuracy: float | None


class Running:
    """Runs copies beside the base, and counts how they answer."""

    def __init__(self, network: Network, base: Mapping[str, np.ndarray]) -> None:
        self._run = jax.jit(network.apply_fn)
        self._images = np.asarray(network.images)[:_IMAGES]
        self._labels = None if network.labels is None else np.asarray(network.labels)[:_IMAGES]
        self._base, self._copies = self._answers("the base", base), list[np.ndarray]()

    def _answers(self, who: str, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        logits = np.asarray(self._run(files.nest(leaves), self._images))
        if not np.isfinite(logits).all():
            cause = (
                "Nothing was written of it. Mark fewer leaves or less: add the model again with --match or --strength."
            )
            raise _validate.fail("issue", "finite outputs", f"NaN or infinite ones from {who}", cause)
        return logits.argmax(axis=-1)

    def add(self, who: str, leaves: Mapping[str, np.ndarray]) -> None:
        """Runs a copy.

        Raises:
          ValueError: when it answers NaN or infinite values.
        """
        self._copies.append(self._answers(who, leaves))

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
