r"""The shape of a mark: how far each coordinate may move, in proportion to what the network does with it.

A white mark moves each weight by the same share of its leaf's RMS. A shape moves coordinate (i, j) of a kernel, i over
what the layer sums and j over its outputs, by ``strength`` times

.. math:: s_{ij} = \min\left((R_i C_j + e)^{-1/2}, c_i\right)

where R and C are the sensitivities of the logits by row and by column, e is a floor of 3 % of the kernel's mean
sensitivity, and c is a cap in units of the kernel's RMS. So each coordinate costs the same change of the logits, and so
does its erasure. Only vectors are stored. A kernel with many more inputs than directions in use has the coordinates of
those directions: its change is :math:`U (s \circ Z)` with orthonormal columns U.

A leaf that is a vector (a norm's gain, a bias) has a scale for each entry. It is marked, but it is not evidence: usual
attacks leave such leaves alone, which would flatter a trace.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smark_jax import _validate
from smark_jax._types import AnyArray
from smark_jax.carriers.selection import Leaf, Spec

_FIELDS = ("rows", "columns", "floor", "cap", "basis")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=("axes",))
@dataclasses.dataclass(frozen=True, eq=False)
class Scales:
    """How far each coordinate of one leaf moves. All arrays are float32 and broadcast to the coordinates.

    Attributes:
      rows: sensitivity R by row.
      columns: sensitivity C by column.
      floor: e.
      cap: c, the largest scale.
      basis: U, shape [inputs, k], where the coordinates are directions, of shape [k, outputs]; None where the
        coordinates are the weights themselves, of the leaf's shape.
      axes: the leaf's axes over which its layer sums; their entries are the rows, those of the other axes the columns.
    """

    rows: AnyArray
    columns: AnyArray
    floor: AnyArray
    cap: AnyArray
    basis: AnyArray | None
    axes: tuple[int, ...]

    def sizes(self, leaf: Leaf) -> Float[Array, "..."]:
        """The scales s, of the shape of the coordinates."""
        sizes = jnp.minimum(jax.lax.rsqrt(self.rows * self.columns + self.floor), self.cap)
        return jnp.broadcast_to(sizes, self.coordinates(leaf))

    def coordinates(self, leaf: Leaf) -> tuple[int, ...]:
        """The shape of the coordinates."""
        if self.basis is None:
            return leaf.shape
        inputs, directions = self.basis.shape
        return directions, leaf.size // inputs

    def sides(self, leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the coordinates that run over rows, and those over columns; a vector has neither."""
        if self.basis is not None:
            return (0,), (1,)
        if is_vector(leaf):
            return (), ()
        return self.axes, tuple(axis for axis in range(len(leaf.shape)) if axis not in self.axes)

    def coefficients(self, change: Array) -> Array:
        """A change of the leaf's weights by its coordinates, in the weights' unit: the transpose of :meth:`weights`."""
        if self.basis is None:
            return change
        first = jnp.moveaxis(change, self.axes, range(len(self.axes))).reshape(self.basis.shape[0], -1)
        return jnp.matmul(self.basis.T, first, precision=jax.lax.Precision.HIGHEST)

    def weights(self, coefficients: Array, leaf: Leaf) -> Array:
        """The change of the leaf's weights that has these coefficients."""
        if self.basis is None:
            return coefficients
        change = jnp.matmul(self.basis, coefficients, precision=jax.lax.Precision.HIGHEST)
        others = [size for axis, size in enumerate(leaf.shape) if axis not in self.axes]
        change = change.reshape(*(leaf.shape[axis] for axis in self.axes), *others)
        return jnp.moveaxis(change, range(len(self.axes)), self.axes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("scales",), meta_fields=("leaves",))
@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    """How far each coordinate of a model may move. A pytree; made by :func:`smark_jax.carriers.shape`.

    Attributes:
      leaves: the leaves that carry, in the order of the base; static.
      scales: of each leaf.
    """

    leaves: tuple[Leaf, ...]
    scales: tuple[Scales, ...]

    def __repr__(self) -> str:
        return f"Shape({len(self.leaves)} leaves, {self.num_coordinates:,} coordinates)"

    @property
    def num_coordinates(self) -> int:
        """The number of coordinates of all leaves."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of coordinates of each leaf."""
        return tuple(math.prod(one.coordinates(leaf)) for leaf, one in self)

    @property
    def num_stored(self) -> int:
        """How many float32 values the shape takes."""
        return sum(array.size for array in self.to_arrays().values() if array.dtype == np.float32)

    def __iter__(self) -> Iterator[tuple[Leaf, Scales]]:
        return iter(zip(self.leaves, self.scales, strict=True))

    def digest(self) -> str:
        """Hex SHA-256 of all that the shape holds: leaves by name, and their arrays as little-endian float32.

        Examples:
          >>> import jax.numpy as jnp
          >>> from smark_jax import carriers
          >>> shape = carriers.shape({"kernel": jnp.ones((3, 4)), "out": jnp.eye(4, 5)})
          >>> len(shape.digest())
          64
        """
        arrays = self.to_arrays()
        found = hashlib.sha256()
        for name in sorted(arrays):
            array = arrays[name].astype(arrays[name].dtype.newbyteorder("<"))
            found.update(json.dumps([name, str(array.dtype), array.shape]).encode() + b"\n" + array.tobytes())
        return found.hexdigest()

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All that the shape holds, as arrays by name, for a file; :meth:`from_arrays` is the inverse."""
        found = {}
        for leaf, one in self:
            found[f"{leaf.path}:shape"] = np.asarray(leaf.shape, np.int32)
            found[f"{leaf.path}:axes"] = np.asarray(one.axes, np.int32)
            named = {name: getattr(one, name) for name in _FIELDS}
            found |= {f"{leaf.path}:{name}": np.asarray(x, np.float32) for name, x in named.items() if x is not None}
        return found

    @staticmethod
    def from_arrays(arrays: Mapping[str, AnyArray]) -> "Shape":
        """The shape that :meth:`to_arrays` gave, whatever the order of the names.

        Raises:
          SmarkError: when an array is missing, is of another kind, does not fit its leaf, or has a value that a scale
            cannot have.
        """
        by_leaf: dict[str, dict[str, np.ndarray]] = {}
        for name, array in arrays.items():
            path, _, field = name.rpartition(":")
            by_leaf.setdefault(path, {})[field] = np.asarray(array)
        leaves, scales = [], []
        for path in sorted(by_leaf):
            fields = by_leaf[path]
            try:
                leaf = Leaf(path, tuple(fields.pop("shape").tolist()))
                axes = tuple(fields.pop("axes").tolist())
                if not set(axes) <= set(range(len(leaf.shape))):
                    raise ValueError(f"axes {axes} of a leaf of shape {leaf.shape}")
                one = Scales(**{"basis": None, **{k: np.float32(x) for k, x in fields.items()}}, axes=axes)  # pyright: ignore[reportArgumentType]
                jax.eval_shape(lambda leaf=leaf, one=one: one.weights(one.sizes(leaf), leaf).reshape(leaf.shape))
                _check_values(one)
            except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
                cause = "Is the file damaged, or not a shape?"
                raise _validate.fail("Shape.from_arrays", f"the arrays of leaf {path!r}", str(error), cause) from None
            leaves.append(leaf)
            scales.append(one)
        return Shape(tuple(leaves), tuple(scales))

    def of(self, spec: Spec) -> "Shape":
        """The part for the leaves of ``spec``, in its order.

        Raises:
          SmarkError: when the shape lacks one of them, or has it in another shape.
        """
        by_path = {leaf.path: (leaf, one) for leaf, one in self}
        for leaf in spec.leaves:
            found = by_path.get(leaf.path)
            if found is None or found[0].shape != leaf.shape:
                got = "none" if found is None else f"one of shape {found[0].shape}"
                cause = "Was the shape made from another model? Make it from this one: carriers.shape."
                raise _validate.fail("mark", f"scales for leaf {leaf.path!r} of shape {leaf.shape}", got, cause)
        pairs = [by_path[leaf.path] for leaf in spec.leaves]
        return Shape(tuple(leaf for leaf, _ in pairs), tuple(one for _, one in pairs))


def _check_values(one: Scales) -> None:
    """Refuses values that no scale has, and more directions than inputs, which would take memory without bound."""
    values = [one.rows, one.columns, one.floor, one.cap, *([] if one.basis is None else [one.basis])]
    if not all(np.isfinite(array).all() for array in values):
        raise ValueError("NaN or infinite values")
    if any((array < 0).any() for array in values[:3]) or (values[3] < 0).any():
        raise ValueError("negative sensitivities or caps")
    if one.basis is not None and one.basis.shape[1] > one.basis.shape[0]:
        raise ValueError(f"{one.basis.shape[1]:,} directions of {one.basis.shape[0]:,} inputs")


def is_vector(leaf: Leaf) -> bool:
    """Whether a leaf has one entry for each channel, as a norm's gain or a bias has: it is not counted as evidence."""
    return leaf.size == max(leaf.shape, default=1)


def unnamed(leaf: Leaf) -> Leaf:
    """A leaf without its name, so that what is compiled for it serves all leaves of its shape."""
    return Leaf("", leaf.shape)


def join(parts: Sequence[Array], shape: Shape, total: int) -> Float[Array, " D"]:
    """The coordinates of all leaves as one vector of ``total`` entries.

    What ``total`` lacks is left out at the end of each leaf, in proportion to the leaf's size: so a carrier without a
    tail leaves out no leaf.
    """
    counts = kept(shape, total)
    flat = [part.reshape(-1)[:count] for part, count in zip(parts, counts, strict=True)]
    # The barrier keeps XLA from fusing what made the parts into the concatenation, and computing it entry by entry.
    return jnp.concatenate(jax.lax.optimization_barrier(flat))


def kept(shape: Shape, total: int) -> list[int]:
    """How many of each leaf's coordinates are kept of ``total``, as evenly as whole numbers allow."""
    found, end = [], 0
    for count in shape.counts:
        start, end = end, end + count
        found.append(end * total // shape.num_coordinates - start * total // shape.num_coordinates)
    return found


def change(vector: Array, start: int | Array, count: int, leaf: Leaf, one: Scales) -> Float[Array, "..."]:
    """The change of a leaf's weights, for the vector of :func:`join` in which its ``count`` entries begin at ``start``.

    Where a coordinate was left out, the coefficient is -0: adding it leaves every weight unchanged.
    """
    sizes = one.coordinates(leaf)
    part = jax.lax.dynamic_slice(vector, (start,), (count,))
    part = jnp.pad(part, (0, math.prod(sizes) - count), constant_values=-0.0).reshape(sizes)
    return one.weights(one.sizes(leaf) * part, leaf)


def shifts(changes: Sequence[Array], shape: Shape) -> list[Float[Array, "..."]]:
    """Changes of the weights by the shape's coordinates, in units of their scales: the inverse of :func:`change`."""
    parts = zip(shape, changes, strict=True)
    return [one.coefficients(change) / one.sizes(leaf) for (leaf, one), change in parts]
