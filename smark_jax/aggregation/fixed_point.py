r"""Fixed point: unbiased conversion of floats to integers modulo 2^32 and back, with room for the sum of all parties.

With clip C, n parties and Q levels, the resolution is :math:`\Delta = 2C / (Q - 1)` and a value x is sent as

.. math:: q = SR\big(\mathrm{clip}(x, \pm C) / \Delta\big) + (Q - 1) / 2,

where SR rounds up with a probability equal to the fractional part: it is unbiased, with variance at most Delta^2 / 4. Q
is the largest odd number with n (Q - 1) < 2^bits, so that the sum of n messages never wraps, for which the offset
(Q - 1) / 2 is exact in float32.

All integer steps are exact. Float32 enters twice: x / Delta carries one relative rounding error of 2^-24, and so does
the decoded sum.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from smark_jax import _trees, _validate, chacha
from smark_jax._types import PyTree


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """The format in which floats are sent as words. It is hashable, so it is a static argument under jit.

    Attributes:
      clip: C; values beyond +-C are clipped to it.
      num_parties: n, the largest number of parties whose words may be added.
      bits: width of the word that their sum must fit into, at most 32.

    Raises:
      SmarkError: on a clip that is not positive and finite, zero parties, or more parties than the word has room for.
    """

    clip: float
    num_parties: int
    bits: int = 32

    def __post_init__(self) -> None:
        _validate.finite_number("FixedPoint", "clip", self.clip)
        _validate.positive("FixedPoint", "num_parties", self.num_parties)
        _validate.positive("FixedPoint", "bits", self.bits)
        if self.bits > 32:
            raise _validate.fail("FixedPoint", "bits of at most 32", str(self.bits), "Words are uint32.")
        if self.offset < 1:
            raise _validate.fail(
                "FixedPoint",
                f"at most {(2**self.bits - 1) // 2:,} parties for sums of {self.bits} bits",
                f"{self.num_parties:,} parties",
                "Each party needs at least three levels. Use a wider word.",
            )

    @property
    def offset(self) -> int:
        """(Q - 1) / 2, the integer that stands for zero."""
        largest = (2**self.bits - 1) // self.num_parties // 2
        excess = max(0, largest.bit_length() - 24)
        return largest >> excess << excess

    @property
    def num_levels(self) -> int:
        """Q, the number of integers that one party can send."""
        return 2 * self.offset + 1

    @property
    def resolution(self) -> float:
        """Delta, the distance between neighbouring levels."""
        return self.clip / self.offset

    @property
    def mean_standard_error(self) -> float:
        r"""Bound on the standard error that rounding adds to a mean: Delta / (2 sqrt n)."""
        return self.resolution / (2 * math.sqrt(self.num_parties))


def encode(tree: PyTree, fixed_point: FixedPoint, key: Array) -> PyTree:
    """The tree's floats as fixed-point words, stochastically rounded.

    Args:
      tree: pytree of floats.
      fixed_point: the format.
      key: a ``jax.random`` key for the rounding, a fresh one each time. It need not be secret.

    Returns:
      A tree of uint32 of the same shapes.

    Raises:
      SmarkError: when the tree has no leaves, or (outside jit) holds NaN or infinite values.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        raise _validate.fail("encode", "a tree with at least one leaf", "none", "Is the update empty?")
    words, finite = _encode_leaves([jnp.asarray(leaf, jnp.float32) for leaf in leaves], fixed_point, key)
    _validate.all_finite("encode", "update", finite)
    return jax.tree.unflatten(structure, words)


@functools.partial(jax.jit, static_argnames="fixed_point")
def _encode_leaves(leaves: list[Array], fixed_point: FixedPoint, key: Array) -> tuple[list[Array], Array]:
    uniform = _uniform(key, sum(leaf.size for leaf in leaves))
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(uniform, ends)
    words = [_encode_leaf(x, fixed_point, part.reshape(x.shape)) for x, part in zip(leaves, parts, strict=True)]
    return words, jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _uniform(key: Array, count: int) -> Array:
    """Numbers (k + 1/2) / 2^16, two per random word; the bias of a mean is at most 2^-17 of a level.

    The words are ChaCha20's under the key's, which CPUs draw faster than ``jax.random``'s own.
    """
    data = jax.random.key_data(key).reshape(-1)
    words = chacha.keystream(jnp.pad(data, (0, 8 - data.size)), jnp.zeros(3, jnp.uint32), -(-count // 2))
    # The barrier keeps XLA from fusing this into its consumer, which would compute it word by word.
    halves = jax.lax.optimization_barrier(jnp.concatenate([words & 0xFFFF, words >> 16]))
    return (halves[:count].astype(jnp.float32) + 0.5) * 2**-16


def _encode_leaf(x: Array, fixed_point: FixedPoint, uniform: Array) -> Array:
    steps = jnp.clip(x / fixed_point.resolution, -fixed_point.offset, fixed_point.offset)
    floor = jnp.floor(steps)
    up = uniform < steps - floor
    # Exact: float32 has no fractions above 2^24, so nothing is rounded up there, and the offset is exact in float32.
    whole = (floor + up).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(whole, jnp.uint32) + jnp.uint32(fixed_point.offset)


def decode(total: PyTree, fixed_point: FixedPoint, num_survivors: int) -> PyTree:
    """The sum of the parties' floats from the sum of their words, modulo 2^32.

    Args:
      total: tree of uint32, the sum over ``num_survivors`` parties of their words.
      fixed_point: the format.
      num_survivors: how many parties are in the sum; divide by it for the mean.

    Returns:
      A tree of float32 of the same shapes: ``Delta * total - num_survivors * C``, computed on exact integers.

    Raises:
      SmarkError: with no survivors, or with more than the format has room for.
    """
    _validate.positive("decode", "num_survivors", num_survivors)
    if num_survivors > fixed_point.num_parties:
        raise _validate.fail(
            "decode",
            f"a sum of at most {fixed_point.num_parties} parties",
            f"{num_survivors}",
            "The sum may have wrapped around. Make the FixedPoint for as many parties as may take part.",
        )
    zero = jnp.uint32(num_survivors * fixed_point.offset)

    def decode_leaf(words: Array) -> Array:
        return jax.lax.bitcast_convert_type(words - zero, jnp.int32).astype(jnp.float32) * fixed_point.resolution

    return jax.tree.map(decode_leaf, total)


def encode_weighted(
    tree: PyTree, num_examples: int, most_examples: int, fixed_point: FixedPoint, key: Array
) -> tuple[PyTree, Array]:
    """Words of a party's floats, weighted by its number of examples, and of that number: the mask hides both.

    Args:
      tree: pytree of floats.
      num_examples: n_u, the number of examples behind ``tree``; with 0 the party takes part without weight.
      most_examples: the largest number that any party may have, the same for all.
      fixed_point: the format.
      key: a ``jax.random`` key for the rounding.

    Returns:
      Words of ``tree * num_examples / most_examples``, and ``num_examples`` as a uint32 scalar.

    Raises:
      SmarkError: as :func:`encode`; when the number does not lie in 0 to ``most_examples``, or sums could wrap.
    """
    _check_weights("encode_weighted", most_examples, fixed_point)
    if not 0 <= num_examples <= most_examples:
        cause = "Raise most_examples for all parties."
        raise _validate.fail("encode_weighted", f"0 to {most_examples:,} examples", f"{num_examples:,}", cause)
    weight = num_examples / most_examples
    return encode(jax.tree.map(lambda leaf: leaf * weight, tree), fixed_point, key), jnp.uint32(num_examples)


def decode_weighted(
    total: tuple[PyTree, Array], most_examples: int, fixed_point: FixedPoint, num_survivors: int
) -> tuple[PyTree, int]:
    r"""The mean over all examples, :math:`\sum_u n_u x_u / \sum_u n_u`, and how many there were.

    Args:
      total: sum over the parties of what :func:`encode_weighted` returned, modulo 2^32.
      most_examples: as for encoding.
      fixed_point: the format.
      num_survivors: how many parties are in the sum.

    Returns:
      The mean, a tree of float32, and the number of examples.

    Raises:
      SmarkError: as :func:`decode`, or when there were no examples.
    """
    _check_weights("decode_weighted", most_examples, fixed_point)
    words, count = total[0], int(total[1])
    if count == 0:
        raise _validate.fail("decode_weighted", "at least one example", "none", "Did all parties send weight 0?")
    summed = decode(words, fixed_point, num_survivors)
    return jax.tree.map(lambda leaf: leaf * (most_examples / count), summed), count


def _check_weights(who: str, most_examples: int, fixed_point: FixedPoint) -> None:
    _validate.positive(who, "most_examples", most_examples)
    if most_examples * fixed_point.num_parties >= 2**32:
        expected = f"most_examples below {2**32 // fixed_point.num_parties:,} for {fixed_point.num_parties} parties"
        raise _validate.fail(who, expected, f"{most_examples:,}", "Count in hundreds of examples, say.")


def stack(updates: Mapping[int, PyTree] | Sequence[PyTree]) -> PyTree:
    """Stacks parties' updates into one tree whose leaves have a leading axis of P parties, as for pmap and shard_map.

    Args:
      updates: an update for each party, in order, or by party number.

    Returns:
      The stacked tree, parties in the order given.

    Raises:
      SmarkError: with zero parties, or when trees differ in structure, shape or dtype; it names party and leaf.
    """
    _trees.same("stack", updates)
    trees = list(updates.values()) if isinstance(updates, Mapping) else list(updates)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
