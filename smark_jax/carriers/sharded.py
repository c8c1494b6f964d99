"""Writing and reading through a carrier where a mesh of devices holds the model and none could hold it alone.

Each device works through the blocks that its shards touch, a few at a time. To write, it transforms a block and adds to
the weights that it holds. To read, it transforms a block with zeros where it holds none, and the devices sum their
chips, which is right because reading is linear. So nothing crosses between devices but m chips, and nothing of the
model's length is made anywhere.

A leaf split along its first axis lies on each device as one run, and the work is divided by the number of devices.
Split along another axis, it lies in short runs, one of them in almost every block, and every device transforms almost
every block of the leaf: memory is divided, time is not.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32, Num

from smark_jax import _validate
from smark_jax._types import AnyArray, PyTree
from smark_jax.carriers import hadamard
from smark_jax.carriers.selection import Leaf, Spec, carrying, replace

# Places in a leaf are counted in int32, and a block may stand out on either side.
_MAX_LEAF = 2**31 - 2**24
# Blocks are transformed this many weights at a time, on each device.
_PASS_WEIGHTS = 1 << 16
_ALL = PartitionSpec()


class Layout(NamedTuple):
    """How a mesh holds a model's carrying leaves. Hashable, so it is a static argument under jit.

    Attributes:
      mesh: the devices.
      specs: for each carrying leaf the mesh axes along which it is split; empty for one that all devices hold.
    """

    mesh: Mesh | AbstractMesh
    specs: tuple[PartitionSpec, ...]


def layout(who: str, params: PyTree, spec: Spec) -> Layout | None:
    """How ``params`` lies on a mesh, or None where no carrying leaf is split by a ``NamedSharding`` (or under jit).

    Raises:
      ValueError: when leaves are split over different meshes, or a split leaf has 2^31 weights or about so many.
    """
    leaves = carrying(who, params, spec)
    split = [_split(leaf) for leaf in leaves]
    meshes = {sharding.mesh for sharding in split if sharding is not None}
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


def _split(leaf: Any) -> NamedSharding | None:
    if not isinstance(leaf, jax.Array) or _validate.is_traced(leaf):
        return None
    sharding = leaf.sharding
    return sharding if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated else None


def add_spread(
    params: PyTree, spec: Spec, where: Layout, code: Num[AnyArray, " m"], carrier: hadamard.Carrier, size: float | Array
) -> PyTree:
    """``write(params, spec, size * spread(code, carrier))`` for a model on a mesh; each leaf stays where it lies."""
    leaves = _placed(carrying("add_spread", params, spec), where)
    code, size = jnp.asarray(code, jnp.float32), jnp.asarray(size, jnp.float32)
    return replace(params, spec, _add_spread(leaves, *_everywhere((code, carrier, size), where), spec, where))


def despread_difference(
    found: PyTree, base: PyTree, spec: Spec, where: Layout, carrier: hadamard.Carrier
) -> tuple[Float[Array, " m"], Bool[Array, ""]]:
    """``despread(read(found) - read(base))`` of models on a mesh, and whether that difference is finite throughout.

    A leaf that lies otherwise than ``where`` says is moved first.
    """
    pair = [_placed(carrying("despread_difference", params, spec), where) for params in (found, base)]
    return _despread_difference(*pair, _everywhere(carrier, where), spec, where)


def _placed(leaves: list[Any], where: Layout) -> list[Array]:
    """The leaves as the layout has them; those that lie so already are not touched."""
    return [jax.device_put(x, NamedSharding(where.mesh, axes)) for x, axes in zip(leaves, where.specs, strict=True)]


def _everywhere(tree: PyTree, where: Layout) -> PyTree:
    return jax.device_put(tree, NamedSharding(where.mesh, _ALL))


@functools.partial(jax.jit, static_argnames=("spec", "where"))
def _add_spread(
    leaves: list[Array], code: Array, carrier: hadamard.Carrier, size: Array, spec: Spec, where: Layout
) -> list[Array]:
    def on_device(leaves: list[Array], code: Array, carrier: hadamard.Carrier, size: Array) -> list[Array]:
        return [
            _add_to_shard(shard, part, code, carrier, lambda block, scale=leaf.scale: size * block * scale)
            for shard, leaf, part in zip(leaves, spec.leaves, _parts(spec, where), strict=True)
        ]

    specs = list(where.specs)
    return _on_mesh(on_device, where, (specs, _ALL, _ALL, _ALL), specs)(leaves, code, carrier, size)


@functools.partial(jax.jit, static_argnames=("spec", "where"))
def _despread_difference(
    found: list[Array], base: list[Array], carrier: hadamard.Carrier, spec: Spec, where: Layout
) -> tuple[Array, Array]:
    def on_device(found: list[Array], base: list[Array], carrier: hadamard.Carrier) -> tuple[Array, Array]:
        chips, broken = jnp.zeros(carrier.num_chips), jnp.int32(0)
        for x, y, leaf, part in zip(found, base, spec.leaves, _parts(spec, where), strict=True):
            scaled = functools.partial(_scaled, scale=leaf.scale)
            chips += _despread_shards(x, y, part, carrier, scaled)
            broken += jnp.any(~jnp.isfinite(scaled(x) - scaled(y)))
        return jax.lax.psum((chips, broken), where.mesh.axis_names)

    specs = list(where.specs)
    chips, broken = _on_mesh(on_device, where, (specs, specs, _ALL), (_ALL, _ALL))(found, base, carrier)
    return chips, broken == 0


def _scaled(weights: Array, scale: float) -> Array:
    return weights.astype(jnp.float32) * (1 / scale)


def _on_mesh(f: Callable[..., Any], where: Layout, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    # Unchecked, because what depends on a device's place is the same on all devices that hold the same shard.
    return jax.shard_map(f, mesh=where.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Part(NamedTuple):
    """What this device holds of a leaf: a box of its index space, of which an axis is merged with whole ones after it.

    Attributes:
      start: of the leaf in the vector of weights.
      sizes: the leaf's axes.
      held: the box's.
      origin: the box's corner.
      twin: this device's number among those that hold the same box.
      twins: how many those are.
    """

    start: int
    sizes: tuple[int, ...]
    held: tuple[int, ...]
    origin: tuple[Array | int, ...]
    twin: Array | int
    twins: int


def _parts(spec: Spec, where: Layout) -> list[_Part]:
    parts, start = [], 0
    for leaf, axes in zip(spec.leaves, where.specs, strict=True):
        parts.append(_part(start, leaf, axes, where.mesh))
        start += leaf.size
    return parts


def _part(start: int, leaf: Leaf, axes: PartitionSpec, mesh: Mesh | AbstractMesh) -> _Part:
    sizes, held, used = [1], [1], set()
    origin: list[Array | int] = [0]
    for size, names in itertools.zip_longest(leaf.shape, axes):
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
    return _Part(start, tuple(sizes), tuple(held), tuple(origin), twin, math.prod(mesh.shape[name] for name in others))


class _Blocks(NamedTuple):
    """Blocks of the carrier that a shard touches: the first, counted from the leaf's first, and at most how many."""

    first: Array | int
    most: int


def _touched(part: _Part, n: int, length: int) -> _Blocks:
    strides = [math.prod(part.sizes[axis + 1 :]) for axis in range(len(part.sizes))]
    begin = sum(at * stride for at, stride in zip(part.origin, strides, strict=True))
    span = 1 + sum((some - 1) * stride for some, stride in zip(part.held, strides, strict=True))
    lead, size = part.start % length, math.prod(part.sizes)
    most = min((span - 1) // length + 2, (lead + size - 1) // length + 1, max(0, n - part.start // length))
    return _Blocks((lead + begin) // length, most)


def _held(
    part: _Part, blocks: Int32[Array, " p"], n: int, length: int
) -> tuple[Int32[Array, " p"], Int32[Array, "p L"]]:
    """Where the carrier has these blocks, and where the shard, flattened, has their weights: past its end if nowhere.

    Args:
      part: the shard.
      blocks: counted from the leaf's first.
      n: how many blocks the carrier has.
      length: of a block.
    """
    numbers = part.start // length + blocks
    rest = blocks[:, None] * length - part.start % length + jnp.arange(length, dtype=jnp.int32)[None]
    here = (rest >= 0) & (rest < math.prod(part.sizes)) & (numbers < n)[:, None]
    index, stride = jnp.zeros_like(rest), 1
    for axis in reversed(range(len(part.sizes))):
        place = rest
        if axis:  # the first axis takes what is left
            rest, place = jnp.divmod(rest, part.sizes[axis])
        place -= part.origin[axis]
        here &= (place >= 0) & (place < part.held[axis])
        index, stride = index + place * stride, stride * part.held[axis]
    return jnp.minimum(numbers, n - 1), jnp.where(here, index, stride)


def _add_to_shard(
    shard: Array, part: _Part, code: Array, carrier: hadamard.Carrier, scaled: Callable[[Array], Array]
) -> Array:
    n, length = hadamard.cut(carrier.num_weights, carrier.num_chips)
    touched = _touched(part, n, length)
    a_pass = max(1, min(touched.most, _PASS_WEIGHTS // length))
    spread = jax.vmap(functools.partial(hadamard.spread_block, code * n**-0.5, length))

    def one_pass(number: Array, flat: Array) -> Array:
        blocks = touched.first + number * a_pass + jnp.arange(a_pass, dtype=jnp.int32)
        numbers, index = _held(part, blocks, n, length)
        old = flat.at[index].get(mode="fill", fill_value=0)
        new = old.astype(jnp.float32) + scaled(spread(*(rows[numbers] for rows in carrier.arrays)))
        return flat.at[index].set(new.astype(flat.dtype), mode="drop")

    return jax.lax.fori_loop(0, -(-touched.most // a_pass), one_pass, shard.reshape(-1)).reshape(shard.shape)


def _despread_shards(
    found: Array, base: Array, part: _Part, carrier: hadamard.Carrier, scaled: Callable[[Array], Array]
) -> Float[Array, " m"]:
    """Devices that hold the same shard take turns at its blocks, so that none is counted twice."""
    n, length = hadamard.cut(carrier.num_weights, carrier.num_chips)
    touched = _touched(part, n, length)
    turn = -(-touched.most // part.twins)
    a_pass = max(1, min(turn, _PASS_WEIGHTS // length))
    found, base = found.reshape(-1), base.reshape(-1)

    def one_pass(number: Array, chips: Array) -> Array:
        turns = number * a_pass + jnp.arange(a_pass, dtype=jnp.int32)
        numbers, index = _held(part, touched.first + part.twin * turn + turns, n, length)
        index = jnp.where((turns < turn)[:, None], index, found.size)
        x, y = (scaled(flat.at[index].get(mode="fill", fill_value=0)) for flat in (found, base))
        return chips + jax.vmap(hadamard.despread_block)(x - y, *(rows[numbers] for rows in carrier.arrays)).sum(axis=0)

    chips = jax.lax.fori_loop(0, -(-turn // a_pass), one_pass, jnp.zeros(carrier.num_chips))
    return chips * n**-0.5
