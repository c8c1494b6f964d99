"""Where a network multiplies by its kernels, and with which inputs, found by interpreting its jaxpr."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smark_jax import _trees, _validate
from smark_jax._types import ApplyFn, PyTree

_SAME = frozenset("convert_element_type copy copy_p stop_gradient reduce_precision optimization_barrier".split())
_SCALED = frozenset("add sub mul div max min neg clamp round select_n".split())
_CALLS = frozenset(
    """pjit jit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr checkpoint remat remat2
    custom_lin""".split()
)


class Source(NamedTuple):
    """The leaf that a value is made of, and for each of the value's axes the leaf's axes that it runs over."""

    path: str
    axes: tuple[tuple[int, ...], ...]


_DATA = Source("", ())
"""The source of whatever depends on the images."""


class Site(NamedTuple):
    """A place where the network multiplies by a kernel and sums.

    Attributes:
      path: the kernel's leaf.
      rows: the leaf's axes over which the layer sums, in rising order.
      inputs: gives about as many of the layer's input vectors as are asked for, or more, shape [any, inputs], in the
        order of the leaf's rows; None where it is unknown. For a grouped convolution, of which depthwise ones are a
        case, the shape is [any, groups, inputs].
      groups: in how many groups outputs are made from inputs of their own.
    """

    path: str
    rows: tuple[int, ...]
    inputs: Callable[[int], Float[Array, "n *groups inputs"]] | None
    groups: int = 1


Visit = Callable[[Site], None]


def interpret(apply_fn: ApplyFn, params: PyTree, images: Any, visit: Visit = lambda site: None) -> Any:
    """``apply_fn(params, images)``; calls ``visit`` at each place where a kernel is used, in order.

    Loops and branches are run as a whole: kernels within them are not visited.
    """
    closed, shapes = jax.make_jaxpr(apply_fn, return_shape=True)(params, images)
    sources = [
        Source(path, tuple((axis,) for axis in range(np.ndim(leaf))))
        for path, leaf in _trees.named("shape", params).items()
    ]
    values = [*jax.tree.leaves(params), images]
    found = _run(closed.jaxpr, closed.consts, values, [*sources, _DATA], visit)
    return jax.tree.unflatten(jax.tree.structure(shapes), found[0])


def sites(apply_fn: ApplyFn, params: PyTree, images: Any) -> dict[str, tuple[int, ...]]:
    """For each kernel that the network multiplies by, the axes over which it sums; in order of last use.

    Raises:
      SmarkError: when the network refuses the parameters or the images.
    """
    found: dict[str, tuple[int, ...]] = {}

    def visit(site: Site) -> None:
        found.pop(site.path, None)
        found[site.path] = site.rows

    try:
        jax.eval_shape(lambda p, x: interpret(apply_fn, p, x, visit), params, images)
    except Exception as error:
        cause = "apply_fn(base, images) must give logits; with batch norm, base is the whole variables dict."
        desk = "The network has to compute logits of these images from this base, with operations of JAX alone."
        got = f"an error: {str(error).partition(chr(10))[0]}"
        raise _validate.fail("shape", "a network that takes base and images", got, cause, desk=desk) from error
    return found


def _run(
    jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], sources: Sequence[Source | None], visit: Visit
) -> tuple[list[Any], list[Source | None]]:
    env: dict[Any, tuple[Any, Source | None]] = {}
    env |= zip(jaxpr.constvars, ((const, None) for const in consts), strict=True)
    env |= zip(jaxpr.invars, zip(values, sources, strict=True), strict=True)
    read = lambda atom: (atom.val, None) if hasattr(atom, "val") else env[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        results = _equation(eqn, [value for value, _ in operands], [source for _, source in operands], visit)
        env |= zip(eqn.outvars, results, strict=True)
    out = [read(atom) for atom in jaxpr.outvars]
    return [value for value, _ in out], [source for _, source in out]


def _equation(eqn: Any, values: list[Any], sources: list[Source | None], visit: Visit) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    of_leaves = any(source not in (None, _DATA) for source in sources)
    if name in _CALLS and (of_leaves or not name.startswith("custom")):  # an activation keeps its own derivative
        inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
        if inner is not None:
            body, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
            if len(body.invars) == len(values):
                return list(zip(*_run(body, consts, values, sources, visit), strict=True))
    if name in _VISITS and of_leaves:
        for site in _VISITS[name](values, sources, params):
            visit(site)
    if name == "conv_general_dilated" and _is_depthwise(values, params):
        found = _depthwise(values[0], values[1], params)
    else:
        found = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    data = _DATA if _DATA in sources else None
    if data or eqn.primitive.multiple_results:
        return [(value, data) for value in (found if eqn.primitive.multiple_results else [found])]
    return [(found, _passed_on(name, params, values, sources, found))]


def _passed_on(
    name: str, params: Mapping[str, Any], values: Sequence[Any], sources: Sequence[Source | None], found: Any
) -> Source | None:
    """The source of a result, where its axes still are those of one leaf."""
    known = [(source, np.shape(value)) for source, value in zip(sources, values, strict=True) if source is not None]
    if not known:
        return None
    source, shape = max(known, key=lambda pair: len(pair[1]))
    if name in _SAME or (name in _SCALED and shape == found.shape):
        return source
    if name == "transpose":
        return Source(source.path, tuple(source.axes[axis] for axis in params["permutation"]))
    if name in ("reshape", "squeeze", "expand_dims"):
        return _regrouped(source, shape, found.shape)
    if name == "broadcast_in_dim" and math.prod(shape) == found.size:
        return _regrouped(source, shape, found.shape)
    return None


def _regrouped(source: Source, before: Sequence[int], after: Sequence[int]) -> Source | None:
    """The source after a reshape that only joins axes, or adds and removes axes of length 1."""
    left = [(size, axes) for size, axes in zip(before, source.axes, strict=True) if size > 1]
    axes: list[tuple[int, ...]] = []
    for size in after:
        joined, product = [], 1
        while product < size and left:
            length, ones = left.pop(0)
            product *= length
            joined.extend(ones)
        if product != size:
            return None
        axes.append(tuple(joined))
    return Source(source.path, tuple(axes))


def _of_dot(values: Sequence[Any], sources: Sequence[Source | None], params: Mapping[str, Any]) -> list[Site]:
    contracted, batch = params["dimension_numbers"]
    found = []
    for side, source in enumerate(sources):
        if source in (None, _DATA) or batch[0]:
            continue
        ours, theirs = contracted[side], contracted[1 - side]
        other = values[1 - side]
        axes = [axis for place in ours for axis in source.axes[place]]
        places = [place for _, place in sorted(zip([source.axes[p] for p in ours], theirs, strict=True))]

        def inputs(_: int, other: Any = other, places: Sequence[int] = tuple(places)) -> Array:
            moved = jnp.moveaxis(other, places, range(other.ndim - len(places), other.ndim))
            return moved.reshape(-1, math.prod(other.shape[place] for place in places))

        found.append(Site(source.path, tuple(sorted(axes)), inputs if _in_order(source, ours) else None))
    return found


def _in_order(source: Source, places: Sequence[int]) -> bool:
    """Whether the leaf's axes within each of these axes rise, so that sorting the axes sorts the entries."""
    axes = [axis for group in sorted(source.axes[place] for place in places) for axis in group]
    return axes == sorted(axes)


def _of_conv(values: Sequence[Any], sources: Sequence[Source | None], params: Mapping[str, Any]) -> list[Site]:
    source = sources[1]
    if source in (None, _DATA):
        return []
    numbers = params["dimension_numbers"]
    _, into, *window = numbers.rhs_spec
    rows = sorted(axis for place in (into, *window) for axis in source.axes[place])
    places = sorted((into, *window), key=lambda place: source.axes[place])
    groups = params["feature_group_count"]

    def inputs(most: int) -> Array:
        kernel, images = values[1], values[0]
        shape = [kernel.shape[place] for place in window]
        # Patches take much room, so they are made of no more images than are needed.
        size = math.prod(images.shape[axis] for axis in numbers.lhs_spec[2:])
        positions = max(1, size // math.prod(params["window_strides"]))
        count = min(images.shape[numbers.lhs_spec[0]], -(-2 * most // positions))
        images = jax.lax.slice_in_dim(images, 0, count, axis=numbers.lhs_spec[0])
        patches = jax.lax.conv_general_dilated_patches(
            images,
            shape,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            jax.lax.ConvDimensionNumbers(numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec),
        )
        last = jnp.moveaxis(patches, numbers.out_spec[1], -1)  # features in the order of input channel, window
        split = last.reshape(-1, groups, kernel.shape[into], *shape)
        order = [2 + (into, *window).index(place) for place in places]
        shape = (-1, groups) if groups > 1 else (-1,)
        return split.transpose(0, 1, *order).reshape(*shape, math.prod(kernel.shape[place] for place in places))

    known = params["batch_group_count"] == 1 and _in_order(source, (into, *window))
    return [Site(source.path, tuple(rows), inputs if known else None, groups)]


def _is_depthwise(values: Sequence[Any], params: Mapping[str, Any]) -> bool:
    lhs, rhs, _ = params["dimension_numbers"]
    channels = values[0].shape[lhs[1]]
    return (
        params["feature_group_count"] == channels == values[1].shape[rhs[0]] > 1
        and params["batch_group_count"] == 1
        and set(params["lhs_dilation"]) <= {1}
    )


def _depthwise(images: Array, kernel: Array, params: Mapping[str, Any]) -> Array:
    """A depthwise convolution as a loop over its window, whose gradients XLA computes and compiles faster on CPUs."""
    lhs, rhs, out = params["dimension_numbers"]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    x = images.transpose(lhs[0], *lhs[2:], lhs[1])
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((a, b, 0) for a, b in params["padding"]), (0, 0, 0)))
    w = kernel.transpose(*rhs[2:], rhs[0], rhs[1])[..., 0]
    window = w.shape[:-1]
    spans = [(size - 1) * step for size, step in zip(window, dilation, strict=True)]
    sizes = [(n - span - 1) // step + 1 for n, span, step in zip(x.shape[1:-1], spans, strides, strict=True)]
    held = (x.shape[0], *((n - 1) * step + 1 for n, step in zip(sizes, strides, strict=True)), x.shape[-1])

    @jax.checkpoint  # else the gradient would keep a copy of x for each place of the window
    def add(total: Array, place: tuple[Array, Array]) -> tuple[Array, None]:
        first, weight = place
        part = jax.lax.dynamic_slice(x, (0, *first, 0), held)
        part = jax.lax.slice(part, [0] * x.ndim, held, (1, *strides, 1))
        return total + part * weight.reshape(*[1] * (x.ndim - 1), -1), None

    offsets = np.asarray(list(np.ndindex(*window)), np.int32) * np.asarray(dilation, np.int32)
    start = jnp.zeros((x.shape[0], *sizes, x.shape[-1]), x.dtype)
    total, _ = jax.lax.scan(add, start, (offsets, w.reshape(-1, w.shape[-1])))
    return total.transpose(np.argsort([out[0], *out[2:], out[1]]))


_VISITS: dict[str, Callable[..., list[Site]]] = {"dot_general": _of_dot, "conv_general_dilated": _of_conv}
