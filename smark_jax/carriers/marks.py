"""A mark: all that embedding and extraction need besides the base model and a codeword."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from smark_jax import _validate, keys
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import hadamard, selection

_FOREIGN = "Was it drawn for another model? (Dummy neurons: run alignment.align first.)"


class Mark(NamedTuple):
    """Where a model carries chips, and in which directions. A pytree: jit, vmap and device_put accept it.

    Its coordinates are the carrying weights in the order of the spec, in units of their leaves' RMS.

    Attributes:
      spec: the carrying leaves, with their scales.
      carrier: the directions of the chips; secret.
    """

    spec: selection.Spec
    carrier: hadamard.Carrier

    @property
    def num_chips(self) -> int:
        """The number of chips m."""
        return self.carrier.num_chips


def mark(
    key: keys.SecretKey, base: PyTree, num_chips: int = 304, *, match: str | Callable[[str], object] | None = None
) -> Mark:
    """The mark of a model: :func:`select` chooses the leaves that carry, :func:`draw` the directions of the chips.

    The same key, base and settings always give the same mark.

    Args:
      key: the model's carrier key.
      base: the model that copies are made from.
      num_chips: m, at most the number of carrying weights.
      match: as for :func:`select`: a regular expression searched in each leaf's path, or a predicate on the path.

    Returns:
      The mark.

    Raises:
      SmarkError: as :func:`select` and :func:`draw`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import keys
      >>> base = {"bias": jnp.zeros(30), "kernel": jnp.sin(jnp.arange(9000.0)).reshape(300, 30)}
      >>> mark(keys.from_bytes(bytes(32)), base, num_chips=64).carrier
      Carrier(num_chips=64, num_weights=9000)
    """
    spec = selection.select(base, match)
    return Mark(spec, hadamard.draw(key, spec, num_chips))


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
      SmarkError: when ``vector`` does not have one entry for each carrying weight.
    """
    _validate.vector("despread", "vector", vector, mark.carrier.num_weights, _FOREIGN)
    return hadamard.despread(jnp.asarray(vector, jnp.float32), mark.carrier)


def check(who: str, mark: Mark, base: PyTree) -> None:
    """Refuses, in the name of ``who``, a mark whose parts do not belong together or that does not fit the base.

    Raises:
      SmarkError: with both numbers of weights; or with the leaf, the mark's shape and the shape found.
    """
    spec, carrier = mark
    if carrier.num_weights != spec.num_weights:
        expected = f"a carrier for the {spec.num_weights:,} weights of the spec"
        raise _validate.fail(who, expected, f"one drawn for {carrier.num_weights:,} weights", _FOREIGN)
    selection.check_params(f"{who}: base", base, spec)
