"""The inputs that a network's kernels multiply, found by interpreting its jaxpr.

Every dot product and convolution with a leaf as one operand is a *contraction*: per group, rows of inputs times a
matrix whose entries are weights of that leaf. The leaf may be transposed, reshaped or sliced on the way, as exported
networks do: an array with the numbers of its weights goes the same way and says which weight stands where.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from smark_jax import _trees
from smark_jax._types import AnyArray, ApplyFn, PyTree

_MOVES = frozenset("transpose reshape squeeze slice rev".split())
_CALLS = frozenset("pjit jit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat remat2".split())
_IMAGES_PER_PASS = 100


class Part(NamedTuple):
    """Entries of a leaf: its path, and their numbers in the flattened leaf."""

    path: str
    entries: Int[np.ndarray, "..."]


@dataclass(frozen=True, eq=False)
class Contraction:
    """A place at which a network multiplies by a leaf.

    Attributes:
      kernel: the weights of each group, entries of shape [groups, inputs, outputs].
      shift: the vector that is added to the outputs, entries of shape [outputs] over all groups; None if there is none.
      sign: -1 where the vector is subtracted, as the running mean of batch norm is.
    """

    kernel: Part
    shift: Part | None
    sign: float


class Inputs(NamedTuple):
    """A contraction's inputs over all rows: images, and the positions of a convolution.

    Attributes:
      contraction: where they enter.
      mean: E[x], shape [groups, inputs].
      power: E[x^2], shape [groups, inputs].
      rows: the inputs themselves, shape [groups, inputs, rows], where there are fewer rows than inputs; else None.
      square: E[x x^T], shape [groups, inputs, inputs], where there are not fewer.
    """

    contraction: Contraction
    mean: Float[np.ndarray, "groups inputs"]
    power: Float[np.ndarray, "groups inputs"]
    rows: Float[np.ndarray, "groups inputs rows"] | None
    square: Float[np.ndarray, "groups inputs inputs"] | None

    def principal(self, centred: bool) -> tuple[Float[np.ndarray, "groups n"], Float[np.ndarray, "groups inputs n"]]:
        """Eigenvalues of the covariance (or of E[x x^T]) in falling order, and the eigenvectors as columns."""
        mean = self.mean[:, :, None] * centred
        if self.rows is None:
            assert self.square is not None
            values, vectors = np.linalg.eigh(self.square - mean * mean.swapaxes(1, 2))
            return np.maximum(values[:, ::-1], 0), vectors[:, :, ::-1]
        rows = (self.rows - mean) / self.rows.shape[2] ** 0.5
        values, vectors = np.linalg.eigh(rows.swapaxes(1, 2) @ rows)
        values, vectors = values[:, ::-1], vectors[:, :, ::-1]
        sure = values > 1e-12 * values[:, :1]  # the others may not be orthogonal to these
        roots = np.sqrt(np.where(sure, values, 1))
        return np.where(sure, values, 0), np.where(sure, 1 / roots, 0)[:, None] * (rows @ vectors)


def contractions(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> list[Contraction]:
    """Every product with a leaf, in the order of the network; of the images, only shape and dtype are used."""
    shape = jax.ShapeDtypeStruct((1, *np.shape(images)[1:]), jnp.result_type(images))
    return [each.contraction for each in jax.eval_shape(functools.partial(_trace, apply_fn), params, shape)]


def enter(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> list[Inputs]:
    """The inputs of every contraction, in the order of the network.

    Contractions inside loops and conditionals of the jaxpr are not found. Memory holds the result, and the inputs of
    100 images at a time.

    Args:
      params: the network's weights.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: shape [N, ...].
    """
    images = np.asarray(images)
    entering = jax.eval_shape(functools.partial(_trace, apply_fn), params, images[:1])
    few = tuple(each.rows.shape[2] * len(images) < each.rows.shape[1] for each in entering)
    passes = []
    for start in range(0, len(images), _IMAGES_PER_PASS):
        found = _summaries(apply_fn, few, params, images[start : start + _IMAGES_PER_PASS])
        passes.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found))
    rows = [each.rows.shape[2] * len(images) for each in entering]
    result = []
    for number, each in enumerate(entering):
        mean, power, inputs = zip(*(found[number] for found in passes), strict=True)
        kept = np.concatenate(inputs, axis=2) if few[number] else None
        square = None if few[number] else sum(inputs) / rows[number]
        result.append(Inputs(each.contraction, sum(mean) / rows[number], sum(power) / rows[number], kept, square))
    return result


class _Value(NamedTuple):
    """A value of the network; ``entries`` numbers the weights of leaf ``path`` if it is one, moved about.

    They may have size 1 on axes along which the value repeats. ``made`` is the contraction that gave the value.
    """

    array: Any
    path: str | None = None
    entries: np.ndarray | None = None
    made: "_Found | None" = None


@dataclass
class _Found:
    """A contraction in the making: its inputs [groups, inputs, rows], and which axes of its output are outputs."""

    rows: Array
    kernel: Part
    axes: tuple[int, ...]
    shift: Part | None = None
    sign: float = 1.0


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows",), meta_fields=("contraction",))
@dataclass(frozen=True)
class _Entering:
    """The inputs [groups, inputs, rows] of a contraction."""

    rows: Array
    contraction: Contraction


def _trace(apply_fn: ApplyFn, params: PyTree, images: Array) -> list[_Entering]:
    """Every contraction of ``apply_fn(params, images)`` with its inputs; to be traced."""
    closed = jax.make_jaxpr(apply_fn)(params, images)
    leaves = [
        _Value(leaf, path, np.arange(jnp.size(leaf)).reshape(jnp.shape(leaf)))
        for path, leaf in _trees.named("attacks", params).items()
    ]
    found: list[_Found] = []
    _run(closed.jaxpr, [_Value(c) for c in closed.consts], [*leaves, _Value(images)], found)
    return [_Entering(f.rows, Contraction(f.kernel, f.shift, f.sign)) for f in found]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summaries(
    apply_fn: ApplyFn, few: tuple[bool, ...], params: PyTree, images: Array
) -> list[tuple[Array, Array, Array]]:
    """For each contraction, the sums of x and x^2 over the rows, and the rows (if few) or the sum of x x^T."""
    return [
        (x.sum(axis=2), jnp.square(x).sum(axis=2), x if keep else jnp.einsum("gir,gjr->gij", x, x))
        for x, keep in zip((each.rows for each in _trace(apply_fn, params, images)), few, strict=True)
    ]


def _run(jaxpr: Any, consts: Sequence[_Value], inputs: Sequence[_Value], found: list[_Found]) -> list[_Value]:
    env: dict[Any, _Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    read = lambda atom: _Value(atom.val) if hasattr(atom, "val") else env[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _equation(eqn, [read(atom) for atom in eqn.invars], found), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, values: list[_Value], found: list[_Found]) -> list[_Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
        if inner is not None:
            body, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            return _run(body, [_Value(c) for c in consts], values, found)
    out = eqn.primitive.bind(*(value.array for value in values), **eqn.primitive.get_bind_params(params))
    if eqn.primitive.multiple_results:
        return [_Value(array) for array in out]
    if name in ("dot_general", "conv_general_dilated"):
        return [_Value(out, made=_contraction(name, params, values, found))]
    if name in ("add", "add_any", "sub"):
        _note_shift(name, values, np.ndim(out))
    elif (values and values[0].entries is not None) or name == "convert_element_type":
        return [_moved(name, eqn, values[0], out)]
    return [_Value(out)]


def _moved(name: str, eqn: Any, value: _Value, out: Any) -> _Value:
    """A leaf that was cast, or whose axes or entries were moved."""
    if name in ("convert_element_type", "copy", "stop_gradient"):
        return value._replace(array=out)
    if value.entries is None:
        return _Value(out)
    if name in _MOVES and value.entries.shape == np.shape(value.array):
        with jax.ensure_compile_time_eval():
            index = np.asarray(eqn.primitive.bind(jnp.asarray(value.entries), **eqn.params))
        return _Value(out, value.path, index)
    if name == "broadcast_in_dim":
        shape = [1] * np.ndim(out)
        for axis, length in zip(eqn.params["broadcast_dimensions"], value.entries.shape, strict=True):
            shape[axis] = length
        return _Value(out, value.path, value.entries.reshape(shape))
    return _Value(out)


def _contraction(name: str, params: Any, values: list[_Value], found: list[_Found]) -> _Found | None:
    """Notes a product of activations and a leaf."""
    leaves = [at for at, value in enumerate(values) if value.entries is not None]
    if len(leaves) != 1:
        return None
    leaf, data = values[leaves[0]], values[1 - leaves[0]].array
    if leaf.path is None or leaf.entries is None or leaf.entries.shape != np.shape(leaf.array):
        return None
    if name == "conv_general_dilated":
        if leaves != [1] or params["batch_group_count"] != 1:
            return None
        rows, index, axes = _convolved(params, data, leaf.entries)
    else:
        rows, index, axes = _dotted(params, data, leaf.entries, leaves[0])
    found.append(_Found(rows, Part(leaf.path, index), axes))
    return found[-1]


def _dotted(params: Any, data: Array, index: np.ndarray, side: int) -> tuple[Array, np.ndarray, tuple[int, ...]]:
    summed, batched = params["dimension_numbers"]

    def grouped(array: Any, side: int) -> Any:
        free = [a for a in range(array.ndim) if a not in (*summed[side], *batched[side])]
        sizes = [int(np.prod([array.shape[a] for a in axes])) for axes in (batched[side], summed[side], free)]
        return array.transpose((*batched[side], *summed[side], *free)).reshape(sizes)

    count, batch = index.ndim - len(summed[side]) - len(batched[side]), len(batched[side])
    others = np.ndim(data) - len(summed[side]) - batch
    first = batch if side == 0 else batch + others
    axes = (*range(batch), *range(first, first + count))
    return grouped(data, 1 - side), grouped(index, side), axes


def _convolved(params: Any, data: Array, index: np.ndarray) -> tuple[Array, np.ndarray, tuple[int, ...]]:
    _, rhs, out = params["dimension_numbers"]
    groups = params["feature_group_count"]
    kernel = index.transpose(rhs)  # outputs, inputs of a group, window
    patches = jax.lax.conv_general_dilated_patches(
        data,
        kernel.shape[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=params["dimension_numbers"],
    )
    rows = jnp.moveaxis(patches, out[1], 0).reshape(groups, kernel[0].size, -1)
    return rows, kernel.reshape(groups, -1, kernel[0].size).swapaxes(1, 2), (out[1],)


def _note_shift(name: str, values: list[_Value], ndim: int) -> None:
    """Notes a leaf that is added to a contraction's output, one entry for each output."""
    for value, leaf, sign in ((values[0], values[1], 1 - 2 * (name == "sub")), (values[1], values[0], 1)):
        made, index = value.made, leaf.entries
        if made is None or made.shift or leaf.path is None or index is None or (sign == 1 and name == "sub"):
            continue
        outputs = made.kernel.entries.shape[0] * made.kernel.entries.shape[2]
        wanted = [np.shape(value.array)[a] if a in made.axes else 1 for a in range(ndim)]
        if index.ndim == ndim and list(index.shape) == wanted and index.size == outputs:
            made.shift, made.sign = Part(leaf.path, index.reshape(-1)), float(sign)
