r"""The two-round block Hadamard carrier: m dense orthonormal rows over D weights, from a few bits per weight.

The weights are cut into n blocks of length L. In each block b,

.. math:: X_b^T = S_2 \, H \, S_1 \, H \, P \, / \sqrt{n}

with H the orthonormal Walsh-Hadamard matrix, fresh keyed sign flips S_1 and S_2, and a fresh keyed placement P of the
m chips on distinct coefficients of the block. Each factor has orthonormal columns, so :math:`X X^T = I` exactly; every
row is dense over all blocks; and the cost is that of a fast transform. No m x D matrix is ever stored: a carrier takes
two bits per weight and m positions per block.

*Why two rounds.* With one round (S H P), the squared difference of two copies would not depend on the signs, and its
Walsh spectrum would show which coefficients are in use. The inner signs S_1 hide them.

*Block length.* L is a power of two, at least 4 m and at least 2,048; the last D mod L weights carry nothing. A model
smaller than that is one block of all its D weights: when D is no power of two, H is replaced by its product over two
overlapping windows (the first and the last 2^k weights), which is orthonormal too. A carrier for a shape
(:func:`smark_jax.carriers.draw_even`) has such longer blocks wherever there are fewer than 64, so that hardly a
coordinate is left out.

*Pieces.* Drawn from keys of pieces (:mod:`smark_jax.carriers.pieces`), block b belongs to piece b mod P with P =
min(n, 64), and its signs and positions come from that piece's key. Blocks of pieces whose keys are not given are
*closed*: they carry nothing and read as zero. Their chips have positions beyond the block, where a transform neither
writes nor reads.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from smark_jax import chacha
from smark_jax.carriers.selection import Spec

_MIN_BLOCK = 2048
# With this many blocks or more, a remainder shorter than a block is at most a 64th of the coordinates.
_MANY_BLOCKS = 64
MOST_PIECES = 64
"""The pieces of a carrier with as many blocks or more; with fewer blocks, each is a piece."""
# Longer blocks are whole words of packed signs.
WORD_BITS = 32
# Blocks are transformed this many weights at a time (1 MiB of float32), which stay in cache between the factors.
_PASS_WEIGHTS = 1 << 18
# H of length 2^k is applied as matmuls with Hadamard factors of at most this size.
_MAX_FACTOR = 64


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inner_signs", "outer_signs", "positions"),
    meta_fields=("num_weights", "length"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Carrier:
    """A secret orthonormal m x D matrix, in the form that its transforms need. A pytree.

    Attributes:
      inner_signs: packed sign bits of S_1, uint32, shape [n, ceil(L / 32)].
      outer_signs: packed sign bits of S_2, likewise.
      positions: the coefficient of each chip in each block, int32, shape [n, m]; L or more in a closed block.
      num_weights: D, static.
      length: L, static; None for :func:`cut`'s.
    """

    inner_signs: UInt32[Array, "n words"]
    outer_signs: UInt32[Array, "n words"]
    positions: Int32[Array, "n m"]
    num_weights: int
    length: int | None = None

    @property
    def num_chips(self) -> int:
        """The number of chips m."""
        return self.positions.shape[-1]

    @property
    def num_carrying(self) -> int:
        """How many weights the rows cover: n L, which is D less a tail shorter than a block."""
        n, length = self.blocks
        return n * length

    @property
    def blocks(self) -> tuple[int, int]:
        """The number of blocks and their length."""
        if self.length is None:
            return cut(self.num_weights, self.num_chips)
        return self.num_weights // self.length, self.length

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """Inner signs, outer signs and positions; the rows of each are blocks."""
        return self.inner_signs, self.outer_signs, self.positions

    @property
    def num_pieces(self) -> int:
        """The number of pieces P, if it was drawn from keys of pieces."""
        return min(self.blocks[0], MOST_PIECES)

    def part(self, pieces: Collection[int]) -> "Carrier":
        """The same carrier with all pieces closed but these: the others' blocks carry nothing and read as zero."""
        n, length = self.blocks
        is_open = np.isin(np.arange(n) % self.num_pieces, list(pieces))
        positions = jnp.where(is_open[:, None], self.positions, closed(n, length, self.num_chips))
        return dataclasses.replace(self, positions=positions)

    def __repr__(self) -> str:  # the arrays are secret
        return f"Carrier(num_chips={self.num_chips}, num_weights={self.num_weights})"


class Coverage(NamedTuple):
    """The part of a selection that a carrier covers.

    Attributes:
      weights: how many weights carry: n L, which is D less a tail shorter than a block.
      leaves: how many leaves contain at least one of them.
    """

    weights: int
    leaves: int


def coverage(spec: Spec, num_chips: int) -> Coverage:
    """How many of the selected weights actually carry ``num_chips`` chips; the last D mod L of them do not.

    Examples:
      >>> from smark_jax.carriers import Leaf, Spec
      >>> spec = Spec((Leaf("hidden", (2048, 10)), Leaf("out", (500,))), (0.1, 0.2))
      >>> coverage(spec, 304)
      Coverage(weights=20480, leaves=1)
    """
    n, length = cut(spec.num_weights, num_chips)
    starts = itertools.accumulate((leaf.size for leaf in spec.leaves), initial=0)
    return Coverage(n * length, sum(start < n * length for start, _ in zip(starts, spec.leaves, strict=False)))


@jax.jit
def spread(chips: Array, carrier: Carrier) -> Float[Array, " D"]:
    """``X^T chips``, unchecked."""
    n, length = carrier.blocks
    block = jax.vmap(functools.partial(spread_block, chips * n**-0.5, length))

    def write(vector: Array, first: int | Array, count: int) -> Array:
        some = block(*(jax.lax.dynamic_slice_in_dim(x, first, count) for x in carrier.arrays))
        return jax.lax.dynamic_update_slice_in_dim(vector, some.reshape(-1), first * length, 0)

    # Only adding -0 leaves every weight unchanged: adding 0 turns -0 into 0.
    return _in_passes(carrier, write, jnp.full(carrier.num_weights, -0.0, jnp.float32))


@jax.custom_jvp
@jax.jit
def despread(vector: Array, carrier: Carrier) -> Float[Array, " m"]:
    """``X vector``, unchecked."""
    n, length = carrier.blocks
    block = jax.vmap(despread_block)

    def add(chips: Array, first: int | Array, count: int) -> Array:
        x = jax.lax.dynamic_slice_in_dim(vector, first * length, count * length).reshape(count, length)
        return chips + block(x, *(jax.lax.dynamic_slice_in_dim(x, first, count) for x in carrier.arrays)).sum(axis=0)

    return _in_passes(carrier, add, jnp.zeros(carrier.num_chips)) * n**-0.5


@despread.defjvp
def _despread_jvp(primals: tuple[Array, Carrier], tangents: tuple[Array, Carrier]) -> tuple[Array, Array]:
    (vector, carrier), (change, _) = primals, tangents
    return despread(vector, carrier), _despread_change(change, carrier)


@jax.jit
def _despread_change(change: Array, carrier: Carrier) -> Float[Array, " m"]:
    """``X change``, by a map: the transpose of a slice in a loop would add a whole vector in each pass."""
    n, length = carrier.blocks
    blocks = (change[: n * length].reshape(n, length), *carrier.arrays)
    chips = jax.lax.map(lambda block: despread_block(*block), blocks, batch_size=_per_pass(carrier))
    return chips.sum(axis=0) * n**-0.5


def _in_passes(carrier: Carrier, step: Callable[[Array, int | Array, int], Array], start: Array) -> Array:
    """Folds ``step(result, first, count)`` over all blocks, some at a time."""
    n, count = carrier.blocks[0], _per_pass(carrier)
    result = jax.lax.fori_loop(0, n // count, lambda i, result: step(result, i * count, count), start)
    return step(result, n - n % count, n % count) if n % count else result


def _per_pass(carrier: Carrier) -> int:
    n, length = carrier.blocks
    return min(n, max(1, _PASS_WEIGHTS // length))


def spread_block(chips: Array, length: int, inner: Array, outer: Array, positions: Array) -> Float[Array, " L"]:
    """The weights of one block, from chips already divided by the square root of the number of blocks."""
    x = jnp.zeros(length).at[positions].set(chips, unique_indices=True, mode="drop")
    return _flip(_mix(_flip(_mix(x), inner)), outer)


def despread_block(x: Array, inner: Array, outer: Array, positions: Array) -> Float[Array, " m"]:
    """The transpose of :func:`spread_block`."""
    x = _mix(_flip(_mix(_flip(x, outer), transpose=True), inner), transpose=True)
    return x.at[positions].get(mode="fill", fill_value=0)


def closed(n: int, length: int, num_chips: int) -> Int32[np.ndarray, "n m"]:
    """Positions beyond the block, each its own: what is written there is dropped, and what is read there is zero."""
    return np.tile(np.arange(length, length + num_chips, dtype=np.int32), (n, 1))


def cut(num_weights: int, num_chips: int) -> tuple[int, int]:
    """The number of blocks and their length."""
    length = max(_MIN_BLOCK, 1 << (4 * num_chips - 1).bit_length())
    return (num_weights // length, length) if num_weights >= length else (1, num_weights)


def even(num_coordinates: int, num_chips: int) -> tuple[int, int]:
    """The number of blocks and their length for :func:`smark_jax.carriers.draw_even`."""
    n, length = cut(num_coordinates, num_chips)
    few = n < _MANY_BLOCKS and length < num_coordinates
    return n, num_coordinates // n // WORD_BITS * WORD_BITS if few else length


def _mix(x: Array, transpose: bool = False) -> Array:
    """H x if the length is a power of two, else H over the first and then the last 2^k entries (or its transpose)."""
    length = x.shape[0]
    window = 1 << (length.bit_length() - 1)
    if window == length:
        return _walsh_hadamard(x)
    windows = [slice(0, window), slice(length - window, length)]
    for part in reversed(windows) if transpose else windows:
        x = x.at[part].set(_walsh_hadamard(x[part]))
    return x


def _walsh_hadamard(x: Array) -> Array:
    """The orthonormal transform of 2^k entries, as H = H_f1 (x) H_f2 (x) ... : small matmuls along each axis."""
    bits = x.shape[0].bit_length() - 1
    num_factors = max(1, -(-bits // (_MAX_FACTOR.bit_length() - 1)))
    left = 1 << bits
    for i in range(num_factors):
        factor = 1 << (bits * (i + 1) // num_factors - bits * i // num_factors)
        left //= factor
        h, y = _hadamard_matrix(factor), x.reshape(-1, factor, left)
        # Accelerators would round a float32 matmul to bfloat16 or TF32 by default, and orthonormality would be lost.
        x = jnp.einsum("ij,bjk->bik", h, y, precision=jax.lax.Precision.HIGHEST)
    return x.reshape(-1)


def _hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's symmetric matrix: entry (i, j) is (-1)^popcount(i and j), over the square root of the size."""
    i = np.arange(size, dtype=np.uint32)
    odd = np.bitwise_count(i[:, None] & i[None, :]) & 1
    return ((1 - 2.0 * odd) / math.sqrt(size)).astype(np.float32)


def _flip(x: Array, packed: Array) -> Array:
    """Negates the entries whose bit is set."""
    return x * (1 - 2 * chacha.bits(packed)[: x.shape[0]].astype(jnp.float32))
