"""The vector that chips are read from, for other carriers in the same coordinates."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from smark_jax import _validate, carriers
from smark_jax._types import PyTree
from smark_jax.carriers import marks
from smark_jax.carriers import shifts as bounds
from smark_jax.extraction import reading, rectification, weighting


def shifts(suspect: PyTree, base: PyTree, mark: carriers.Mark) -> Float[np.ndarray, " D"]:
    """A suspect's weighted shifts in the mark's coordinates, before any chip is read from them, shape [D].

    With a shape, they are what :func:`extract` despreads; without one, the scores of its ``rectify``. They depend on
    suspect, base and shape only. Vectors (gains, biases) read as zero where the mark has a shape, and so does whatever
    the suspect lacks.

    Raises:
      SmarkError: as :func:`extract`.
    """
    found, original = _leaves("shifts", suspect, base, mark)
    if mark.shape is None:
        vector = _scores(found, original, mark.spec.factors)
    else:
        vector, _ = weighting.vector(found, original, mark)
    finite = all(bool(np.isfinite(np.asarray(leaf, np.float32)).all()) for leaf in original)
    _validate.all_finite("shifts", "carrying weights in the base", finite)
    return np.asarray(vector)


def extract_parts(
    suspect: PyTree, base: PyTree, mark: carriers.Mark, parts: Sequence[carriers.Carrier], rectify: bool = False
) -> list[Float[Array, " m"]]:
    """What :func:`extract` reads with each of these carriers in place of the mark's; a shaped mark is weighted once.

    Args:
      suspect: the model to read.
      base: the model that the copies were made from.
      mark: the model's mark.
      parts: carriers in its coordinates, such as parts of its own (:meth:`smark_jax.carriers.Carrier.part`).
      rectify: as for :func:`extract`.

    Raises:
      SmarkError: as :func:`extract`.
    """
    if mark.shape is None:
        return [reading.extract(suspect, base, mark._replace(carrier=part), rectify) for part in parts]
    found, original = _leaves("extract_parts", suspect, base, mark)
    chips, ok = weighting.read_each(found, original, mark, parts)
    _validate.all_finite("extract_parts", "carrying weights in the base", ok)
    return chips


def _leaves(who: str, suspect: PyTree, base: PyTree, mark: carriers.Mark) -> tuple[list[Array], list[Array]]:
    marks.check(who, mark, base)
    found, original = reading.carried(who, suspect, base, mark.spec)
    return [found[leaf.path] for leaf in mark.spec.leaves], [original[leaf.path] for leaf in mark.spec.leaves]


@jax.jit
def _scores(found: list[Array], base: list[Array], factors: tuple[float | Array, ...]) -> Float[Array, " D"]:
    parts = [bounds.shift(*part) for part in zip(found, base, factors, strict=True)]
    return rectification.scores(found, base, factors, bounds.bound(parts))
