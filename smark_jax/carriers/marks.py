"""A mark: all that embedding and extraction need besides the base model and a codeword."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from smark_jax import _validate
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import drawing, hadamard, selection, shapes

_FOREIGN = "Was it drawn for another model? (Dummy neurons: run alignment.align first.)"
WHITE, SHAPED = 0.03, 0.01
"""Default strengths: RMS change of a weight in units of its leaf's RMS; predicted relative change of the logits."""


class Mark(NamedTuple):
    """Where a model carries chips, and in which directions. A pytree: jit, vmap and device_put accept it.

    Without a shape, its coordinates are the carrying weights in the order of the spec, in units of their leaves' RMS.
    With one, they are the shape's coordinates in units of its scales.

    Attributes:
      spec: the carrying leaves, with their RMS.
      carrier: the directions of the chips; secret.
      shape: how far each coordinate moves; None for a white mark, which moves all weights alike.
      strength: with which :func:`smark_jax.embedding.embed` marks unless told otherwise.
    """

    spec: selection.Spec
    carrier: hadamard.Carrier
    shape: shapes.Shape | None = None
    strength: float | Array = WHITE

    @property
    def num_chips(self) -> int:
        """The number of chips m."""
        return self.carrier.num_chips


def mark(
    key: drawing.Keys,
    base: PyTree,
    num_chips: int = 304,
    *,
    match: str | Callable[[str], object] | None = None,
    shape: shapes.Shape | None = None,
) -> Mark:
    """The mark of a model: which leaves carry, how far their weights move, and the directions of the chips.

    The same key, base and settings always give the same mark.

    Args:
      key: the model's carrier key; or the keys of the carrier's pieces (:func:`smark_jax.carriers.piece_keys`). With
        some of these alone, the mark is what they open, and the rest reads as zero.
      base: the model that copies are made from.
      num_chips: m, at most the number of coordinates.
      match: as for :func:`select`: a regular expression searched in each leaf's path, or a predicate on the path.
      shape: the shape of the model, from :func:`smark_jax.carriers.shape`, whose leaves carry. Without one the mark is
        white: :func:`select` chooses the leaves, and :func:`draw` the carrier.

    Returns:
      The mark, at strength 0.03 without a shape and 0.01 with one.

    Raises:
      SmarkError: as :func:`select` and :func:`draw`, or when the shape does not fit the base.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, keys
      >>> base = {"bias": jnp.zeros(30), "kernel": jnp.sin(jnp.arange(9000.0)).reshape(300, 30)}
      >>> mark(keys.from_bytes(bytes(32)), base, num_chips=64).carrier
      Carrier(num_chips=64, num_weights=9000)
    """
    if shape is None:
        spec = selection.select(base, match)
        return Mark(spec, drawing.draw(key, spec, num_chips))
    paths, wanted = {leaf.path for leaf in shape.leaves}, selection.predicate(match)
    spec = selection.select(base, lambda path: path in paths and wanted(path))
    shape = shape.of(spec)
    return Mark(spec, drawing.draw_even(key, shape.num_coordinates, num_chips), shape, SHAPED)


def spread(chips: Num[AnyArray, " m"], mark: Mark) -> Float[Array, " D"]:
    """``X^T chips``: the vector in the mark's coordinates that carries these chips, shape [D].

    Linear, keeps the Euclidean norm, and :func:`despread` inverts it: ``despread(spread(c, mark), mark) == c`` up to
    rounding (1e-6).

    Raises:
      SmarkError: when ``chips`` is not one value for each of the mark's chips.
    """
    _validate.vector("spread", "chips", chips, mark.num_chips, "Was the codeword made with another num_chips?")
    return hadamard.spread(jnp.asarray(chips, jnp.float32), mark.carrier)


def despread(vector: Float[AnyArray, " D"], mark: Mark) -> Float[Array, " m"]:
    """``X vector``: the soft chips in a vector in the mark's coordinates, shape [m].

    Raises:
      SmarkError: when ``vector`` does not have one entry for each coordinate.
    """
    _validate.vector("despread", "vector", vector, mark.carrier.num_weights, _FOREIGN)
    return hadamard.despread(jnp.asarray(vector, jnp.float32), mark.carrier)


def coordinates(params: PyTree, mark: Mark) -> Float[Array, " D"]:
    """The carrying weights in the mark's coordinates, shape [D]: linear in ``params``.

    Raises:
      SmarkError: when a carrying leaf is missing from ``params`` or has another shape.
    """
    return coordinates_of(selection.carrying("coordinates", params, mark.spec), mark)


@jax.jit
def coordinates_of(leaves: Sequence[Any], mark: Mark) -> Float[Array, " D"]:
    """:func:`coordinates` for carrying leaves given in order."""
    if mark.shape is None:
        return selection.read_leaves(leaves, mark.spec.factors)
    wide = [jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves]
    return shapes.join(shapes.shifts(wide, mark.shape), mark.shape, mark.carrier.num_weights)


def check(who: str, mark: Mark, base: PyTree) -> None:
    """Refuses, in the name of ``who``, a mark whose parts do not belong together or that does not fit the base.

    Raises:
      SmarkError: with both numbers of weights; or with the leaf, the mark's shape and the shape found.
    """
    spec, carrier, shape = mark.spec, mark.carrier, mark.shape
    if shape is None and carrier.num_weights != spec.num_weights:
        expected = f"a carrier for the {spec.num_weights:,} weights of the spec"
        raise _validate.fail(who, expected, f"one drawn for {carrier.num_weights:,} weights", _FOREIGN)
    if shape is not None:
        names = [(leaf.path, leaf.shape) for leaf in spec.leaves]
        if names != [(leaf.path, leaf.shape) for leaf in shape.leaves]:
            cause = "Was it made for another model? carriers.mark takes both from one model."
            raise _validate.fail(who, "a mark whose shape is for the leaves of its spec", f"{shape}", cause)
        length = hadamard.even(shape.num_coordinates, mark.num_chips)
        if (carrier.num_weights, carrier.length) != (length[0] * length[1], length[1]):
            expected = f"a carrier for the {shape.num_coordinates:,} coordinates of the shape"
            raise _validate.fail(who, expected, f"one drawn for {carrier.num_weights:,}", _FOREIGN)
    selection.check_params(f"{who}: base", base, spec)
