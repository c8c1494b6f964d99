"""Writing and reading through a carrier when a mesh of devices holds a model that is too large for one device.

Each device works through the blocks that its shards touch, a few at a time. To write, it transforms a block and adds to
the weights that it holds. To read, it transforms a block, with zeros for weights that it does not hold, and the devices
sum their chips, which is right because reading is linear. So only m chips cross between devices, and no array of the
model's length is ever made.

A leaf split along its first axis lies on each device as one run, and the work is divided by the number of devices. A
leaf split along another axis lies in short runs that touch almost every block, and every device transforms almost every
block of the leaf: memory is divided, but time is not. Besides the model, each device holds the whole carrier.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, Num

from smark_jax import _validate
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import hadamard, shapes, shifts
from smark_jax.carriers.marks import Mark
from smark_jax.carriers.selection import Leaf, Spec, carrying, replace

# Places in a leaf are counted in int32, and a block may extend beyond the leaf on either side.
_MAX_LEAF = 2**31 - 2**24
# Blocks are transformed this many weights at a time, on each device.
_PASS_WEIGHTS = 1 << 16
_ALL = PartitionSpec()


class Layout(NamedTuple):
    """How a mesh holds a model's carrying leaves. Hashable, so it is a static argument under jit.

    Attributes:
      mesh: the devices.
      specs: for each carrying leaf, the mesh axes along which it is split; empty for a leaf that all devices hold.
    """

    mesh: Mesh
    specs: tuple[PartitionSpec, ...]


def layout(who: str, params: PyTree, spec: Spec) -> Layout | None:
    """How ``params`` lies on a mesh, or None when no carrying leaf is split by a ``NamedSharding`` (or under jit).

    Raises:
      SmarkError: when leaves are split over different meshes, or a split leaf has close to 2^31 weights or more.
    """
    leaves = carrying(who, params, spec)
    split = [_split(leaf) for leaf in leaves]
    meshes = {sharding.mesh for sharding in split if sharding is not None and isinstance(sharding.mesh, Mesh)}
    if not meshes:
        return None
    if len(meshes) > 1:
        cause = "Move them to one mesh with jax.device_put."
        raise _validate.fail(who, "carrying leaves split over one mesh", f"{len(meshes)} meshes", cause)
    for leaf in spec.leaves:
        if leaf.size > _MAX_LEAF:
            cause = "Split the leaf in two, or leave it out of the selection."
            raise _validate.fail(
                who, f"leaves of at most {_MAX_LEAF:,} weights", f"{leaf.path!r} of {leaf.size:,}", cause
            )
    specs = tuple(PartitionSpec() if sharding is None else sharding.spec for sharding in split)
    return Layout(meshes.pop(), specs)


def automatic(where: Layout) -> Layout:
    """The same layout, on a mesh whose axes the compiler may reason about, as a shape's arithmetic needs."""
    return where._replace(mesh=Mesh(where.mesh.devices, where.mesh.axis_names))


def _split(leaf: Any) -> NamedSharding | None:
    if not isinstance(leaf, jax.Array) or _validate.is_traced(leaf):
        return None
    sharding = leaf.sharding
    return sharding if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated else None


def add_spread(params: PyTree, mark: Mark, where: Layout, code: Num[AnyArray, " m"], size: float | Array) -> PyTree:
    """The weights plus the change that carries ``size * spread(code, mark)``, on a mesh; each leaf stays in place."""
    spec, carrier, given = mark.spec, mark.carrier, where
    where = where if mark.shape is None else automatic(where)
    leaves = placed(carrying("add_spread", params, spec), where)
    common = _everywhere((jnp.asarray(code, jnp.float32), carrier, jnp.float32(size)), where)
    starts, marked = _starts(mark, where), []
    for number, (x, start, axes) in enumerate(zip(leaves, starts, where.specs, strict=True)):
        if mark.shape is None:
            scale = _everywhere(np.float32(spec.scales[number]), where)
            marked.append(_add_to_leaf(x, start, scale, *common, axes, where.mesh))
            continue
        leaf, one = mark.shape.leaves[number], mark.shape.scales[number]
        if one.basis is None:
            scale = _sizes(one, leaf, NamedSharding(where.mesh, axes))
            marked.append(_add_to_leaf(x, start, scale, *common, axes, where.mesh))
        else:
            scale = _sizes(one, leaf, NamedSharding(where.mesh, _ALL))
            moved = _add_to_leaf(jnp.zeros_like(scale), start, scale, *common, _ALL, where.mesh)
            marked.append(_add_directions(x, moved, _everywhere(one, where), leaf))
    return replace(params, spec, placed(marked, given))  # since jit rewrites P("x") as P("x", None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sizes(one: shapes.Scales, leaf: Leaf, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(one.sizes(leaf), sharding)


@functools.partial(jax.jit, static_argnums=3)
def _add_directions(x: Array, moved: Array, one: shapes.Scales, leaf: Leaf) -> Array:
    return (x.astype(jnp.float32) + one.weights(moved, leaf)).astype(x.dtype)


def despread_parts(values: list[Array], mark: Mark, where: Layout) -> Float[Array, " m"]:
    """The chips in a vector in a shape's coordinates, given leaf by leaf; they are split as their leaves are."""
    assert mark.shape is not None
    axes = [split if one.basis is None else _ALL for one, split in zip(mark.shape.scales, where.specs, strict=True)]
    where = Layout(where.mesh, tuple(axes))
    one, limit, carrier = _everywhere((np.float32(1), np.float32(np.inf), mark.carrier), where)
    inputs = zip(placed(values, where), _starts(mark, where), where.specs, strict=True)
    read = [
        _despread_leaf(x, jnp.zeros_like(x), start, one, limit, carrier, split, where.mesh)[0]
        for x, start, split in inputs
    ]
    return jnp.stack(read).sum(axis=0)


def despread_difference(
    found: PyTree, base: PyTree, mark: Mark, where: Layout
) -> tuple[Float[Array, " m"], Bool[Array, ""]]:
    """The chips in the bounded shifts (:mod:`smark_jax.carriers.shifts`) of a model on a mesh; is the base finite?

    A leaf that does not lie as ``where`` says is moved first.
    """
    spec, carrier = mark.spec, mark.carrier
    pair = [placed(carrying("despread_difference", params, spec), where) for params in (found, base)]
    starts, carrier = _starts(mark, where), _everywhere(carrier, where)
    factors = _everywhere([np.float32(factor) for factor in spec.factors], where)
    limit = _everywhere(shifts.bound_of(*pair, factors), where)
    inputs = zip(*pair, starts, factors, where.specs, strict=True)
    read = [
        _despread_leaf(x, y, start, factor, limit, carrier, axes, where.mesh) for x, y, start, factor, axes in inputs
    ]
    chips, finite = zip(*read, strict=True)
    return jnp.stack(chips).sum(axis=0), jnp.stack(finite).all()


class _Start(NamedTuple):
    """Where a leaf begins in the carrier: in which block, and at which weight of that block; and how many it has."""

    block: AnyArray
    offset: AnyArray
    size: AnyArray


def _starts(mark: Mark, where: Layout) -> list[_Start]:
    _, length = mark.carrier.blocks
    counts = [leaf.size for leaf in mark.spec.leaves]
    if mark.shape is not None:
        counts = shapes.kept(mark.shape, mark.carrier.num_weights)
    starts, at = [], 0
    for count in counts:
        starts.append(_Start(*(np.asarray(number, np.int32) for number in (at // length, at % length, count))))
        at += count
    return _everywhere(starts, where)


def placed(leaves: list[Any], where: Layout) -> list[Array]:
    """The leaves placed as the layout says; those that are already in place are not touched."""
    return [jax.device_put(x, NamedSharding(where.mesh, axes)) for x, axes in zip(leaves, where.specs, strict=True)]


def _everywhere(tree: PyTree, where: Layout) -> PyTree:
    return jax.device_put(tree, NamedSharding(where.mesh, _ALL))


# Compiled per shape and placement of a leaf, of which a model has few: one program for all leaves would take minutes to
# compile.
@functools.partial(jax.jit, static_argnames=("axes", "mesh"))
def _add_to_leaf(
    leaf: Array,
    start: _Start,
    scale: Array,
    code: Array,
    carrier: hadamard.Carrier,
    size: Array,
    axes: PartitionSpec,
    mesh: Mesh,
) -> Array:
    """Adds the mark to a leaf, on each device to its shard."""
    n, length = carrier.blocks

    def on_device(shard: Array, start: _Start, scale: Array, code: Array, carrier: hadamard.Carrier, size: Array):
        part = _part(leaf.shape, axes, mesh)
        touched = _touched(part, start, length)
        a_pass = min(touched.most, max(1, _PASS_WEIGHTS // length))
        spread = jax.vmap(functools.partial(hadamard.spread_block, code * n**-0.5, length))

        def one_pass(number: Array, flat: Array) -> Array:
            blocks = touched.first + number * a_pass + jnp.arange(a_pass, dtype=jnp.int32)
            numbers, index = _held(part, start, blocks, n, length)
            old = flat.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)
            here = scale.reshape(-1).at[index].get(mode="fill", fill_value=0) if scale.ndim else scale
            new = old + size * spread(*(rows[numbers] for rows in carrier.arrays)) * here
            return flat.at[index].set(new.astype(flat.dtype), mode="drop")

        flat = jax.lax.fori_loop(0, -(-touched.most // a_pass), one_pass, shard.reshape(-1))
        return flat.reshape(shard.shape)

    inputs = (leaf, start, scale, code, carrier, size)
    return _on_mesh(on_device, mesh, (axes, _ALL, axes if scale.ndim else _ALL, *[_ALL] * 3), axes)(*inputs)


@functools.partial(jax.jit, static_argnames=("axes", "mesh"))
def _despread_leaf(
    found: Array,
    base: Array,
    start: _Start,
    factor: Array,
    limit: Array,
    carrier: hadamard.Carrier,
    axes: PartitionSpec,
    mesh: Mesh,
) -> tuple[Float[Array, " m"], Bool[Array, ""]]:
    """A leaf's contribution to the chips. Devices with the same shard divide its blocks, so that none counts twice."""
    n, length = carrier.blocks
    shape = found.shape

    def on_device(found: Array, base: Array, start: _Start, factor: Array, limit: Array, carrier: hadamard.Carrier):
        part = _part(shape, axes, mesh)
        touched = _touched(part, start, length)
        turn = -(-touched.most // part.twins)
        a_pass = min(turn, max(1, _PASS_WEIGHTS // length))
        found, base = found.reshape(-1), base.reshape(-1)

        def one_pass(number: Array, chips: Array) -> Array:
            turns = number * a_pass + jnp.arange(a_pass, dtype=jnp.int32)
            numbers, index = _held(part, start, touched.first + part.twin * turn + turns, n, length)
            index = jnp.where((turns < turn)[:, None], index, found.size)
            x, y = (flat.at[index].get(mode="fill", fill_value=0) for flat in (found, base))
            blocks = (rows[numbers] for rows in carrier.arrays)
            shift = jnp.clip(shifts.shift(x, y, factor), -limit, limit)
            return chips + jax.vmap(hadamard.despread_block)(shift, *blocks).sum(axis=0)

        chips = jax.lax.fori_loop(0, -(-turn // a_pass), one_pass, jnp.zeros(carrier.num_chips))
        broken = jnp.any(~jnp.isfinite(base)).astype(jnp.int32)
        return jax.lax.psum((chips * n**-0.5, broken), mesh.axis_names)

    inputs = (found, base, start, factor, limit, carrier)
    chips, broken = _on_mesh(on_device, mesh, (axes, axes, *[_ALL] * 4), (_ALL, _ALL))(*inputs)
    return chips, broken == 0


def _on_mesh(f: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    # Unchecked: results that depend on a device's place are nevertheless the same on all devices with the same shard.
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Part(NamedTuple):
    """This device's part of a leaf: a box in its index space, where each axis is merged with unsplit ones after it.

    Attributes:
      sizes: lengths of the leaf's axes.
      held: lengths of the box's axes.
      origin: the box's corner.
      twin: this device's number among those that hold the same box.
      twins: the number of devices that hold the same box.
    """

    sizes: tuple[int, ...]
    held: tuple[int, ...]
    origin: tuple[Array | int, ...]
    twin: Array | int
    twins: int


def _part(shape: tuple[int, ...], axes: PartitionSpec, mesh: Mesh) -> _Part:
    """This device's part of a leaf; call it under shard_map."""
    sizes, held, used = [1], [1], set()
    origin: list[Array | int] = [0]
    for size, names in itertools.zip_longest(shape, axes):
        names = () if names is None else (names,) if isinstance(names, str) else names
        shards = math.prod(mesh.shape[name] for name in names)
        if shards == 1:
            sizes[-1], held[-1], origin[-1] = sizes[-1] * size, held[-1] * size, origin[-1] * size
        else:
            sizes.append(size)
            held.append(size // shards)
            origin.append(jax.lax.axis_index(names) * (size // shards))
        used.update(names)
    others = tuple(name for name in mesh.axis_names if name not in used)
    twin = jax.lax.axis_index(others) if others else 0
    return _Part(tuple(sizes), tuple(held), tuple(origin), twin, math.prod(mesh.shape[name] for name in others))


class _Blocks(NamedTuple):
    """Blocks that a shard touches: the first, counted from the leaf's first block, and an upper bound on the number."""

    first: Array
    most: int


def _touched(part: _Part, start: _Start, length: int) -> _Blocks:
    strides = [math.prod(part.sizes[axis + 1 :]) for axis in range(len(part.sizes))]
    begin = sum(at * stride for at, stride in zip(part.origin, strides, strict=True))
    span = 1 + sum((some - 1) * stride for some, stride in zip(part.held, strides, strict=True))
    return _Blocks((jnp.asarray(start.offset) + begin) // length, (span - 1) // length + 2)


def _held(
    part: _Part, start: _Start, blocks: Int32[Array, " p"], n: int, length: int
) -> tuple[Int32[Array, " p"], Int32[Array, "p L"]]:
    """Blocks' numbers in the carrier, and the places of their weights in the flattened shard: past its end if absent.

    Args:
      part: the shard.
      start: where the leaf begins.
      blocks: counted from the leaf's first block.
      n: how many blocks the carrier has.
      length: of a block.
    """
    numbers = start.block + blocks
    rest = blocks[:, None] * length - start.offset + jnp.arange(length, dtype=jnp.int32)[None]
    here = (rest >= 0) & (rest < start.size) & (numbers < n)[:, None]
    index, stride = jnp.zeros_like(rest), 1
    for axis in reversed(range(len(part.sizes))):
        place = rest
        if axis:  # the first axis takes the rest
            rest, place = jnp.divmod(rest, part.sizes[axis])
        place -= part.origin[axis]
        here &= (place >= 0) & (place < part.held[axis])
        index, stride = index + place * stride, stride * part.held[axis]
    return jnp.minimum(numbers, n - 1), jnp.where(here, index, stride)
