"""The vector that chips are read from, for other carriers in the same coordinates."""

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
    marks.check("shifts", mark, base)
    found, original = (
        [part[leaf.path] for leaf in mark.spec.leaves] for part in reading.carried("shifts", suspect, base, mark.spec)
    )
    if mark.shape is None:
        vector = _scores(found, original, mark.spec.factors)
    else:
        vector, _ = weighting.vector(found, original, mark)
    finite = all(bool(np.isfinite(np.asarray(leaf, np.float32)).all()) for leaf in original)
    _validate.all_finite("shifts", "carrying weights in the base", finite)
    return np.asarray(vector)


@jax.jit
def _scores(found: list[Array], base: list[Array], factors: tuple[float | Array, ...]) -> Float[Array, " D"]:
    parts = [bounds.shift(*part) for part in zip(found, base, factors, strict=True)]
    return rectification.scores(found, base, factors, bounds.bound(parts))
