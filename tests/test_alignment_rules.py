"""Each operation that alignment follows, in a tiny network whose neurons are moved by hand, and some it cannot follow.

What is moved is written out here, and the logits are compared: the test does not rest on the graph that it tests.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from smark_jax import alignment, errors

H, OUT = 12, 7
VECTORS, SEQUENCES, IMAGES = (5, 9), (5, 4, 9), (3, 6, 6, 4)
Params = dict[str, Any]
Move = Callable[[np.ndarray, int], np.ndarray]  # an array, and the axis of its neurons


class Case(NamedTuple):
    """A network: the shapes of its weights and inputs, what it computes, and where its neurons stand.

    Attributes:
      places: by weight, the axis along which neurons lie; whether it holds what makes them (True), what reads them
        (False), or neither (None); and their entries on it, one row for each neuron.
      scaled: whether a neuron's scale is free too.
    """

    shapes: dict[str, tuple[int, ...]]
    images: tuple[int, ...]
    apply: Callable[[Params, jax.Array], jax.Array]
    places: Mapping[str, tuple[int, bool | None, np.ndarray]]
    scaled: bool = True


def conv(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def hidden(p: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["a"])


def features(p: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(conv(x, p["a"]))


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def pooled(p: Params, x: jax.Array) -> jax.Array:
    window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return lax.reduce_window(features(p, x), -jnp.inf, lax.max, *window).sum((1, 2)) @ p["b"]


def halves(p: Params, x: jax.Array) -> jax.Array:
    first, second = jnp.split(hidden(p, x), 2, axis=-1)
    return first @ p["b"] + second @ p["c"]


def gated(p: Params, x: jax.Array) -> jax.Array:
    first, second = jnp.split(x @ p["a"], 2, axis=-1)
    return (first * jax.nn.sigmoid(second)) @ p["b"]


def products(p: Params, x: jax.Array) -> jax.Array:
    return hidden(p, x)[:, :, None] * jax.nn.relu(x @ p["c"])[:, None, :]


def grid(p: Params, x: jax.Array) -> jax.Array:
    made = jnp.broadcast_to(hidden(p, x)[:, None, :, None], (x.shape[0], 2, H, 3))
    return flat(made) @ p["b"]


UNITS = np.arange(H)[:, None]
DENSE = {"a": (1, True, UNITS)}
BIAS = {"bias": (0, True, UNITS)}
FOLLOWED = {
    "dot_general": Case(
        {"a": (9, H), "b": (H, OUT)}, VECTORS, lambda p, x: hidden(p, x) @ p["b"], DENSE | {"b": (0, False, UNITS)}
    ),
    "a bias and a residual": Case(
        {"a": (9, H), "r": (9, H), "bias": (H,), "b": (H, OUT)},
        VECTORS,
        lambda p, x: jax.nn.relu(hidden(p, x) + x @ p["r"] + p["bias"][None]) @ p["b"],
        DENSE | BIAS | {"r": (1, True, UNITS), "b": (0, False, UNITS)},
    ),
    "pad": Case(
        {"a": (9, H), "b": (H + 5, OUT)},
        VECTORS,
        lambda p, x: jnp.pad(hidden(p, x), ((0, 0), (2, 3)), constant_values=0.5) @ p["b"],
        DENSE | {"b": (0, False, 2 + UNITS)},
    ),
    "split": Case({"a": (9, 2 * H), "b": (H, OUT), "c": (H, OUT)}, VECTORS, halves, DENSE | {"b": (0, False, UNITS)}),
    "split, the second half": Case(
        {"a": (9, 2 * H), "b": (H, OUT), "c": (H, OUT)},
        VECTORS,
        halves,
        {"a": (1, True, H + UNITS), "c": (0, False, UNITS)},
    ),
    "split, halves multiplied": Case(
        {"a": (9, 2 * H), "b": (H, OUT)},
        VECTORS,
        gated,
        {"a": (1, True, np.hstack([UNITS, H + UNITS])), "b": (0, False, UNITS)},
        scaled=False,
    ),
    "slice": Case(
        {"a": (9, H + 6), "b": (H, OUT), "c": (6, OUT)},
        VECTORS,
        lambda p, x: hidden(p, x)[:, 4 : 4 + H] @ p["b"] + hidden(p, x)[:, :6] @ p["c"],
        # The two slices share neurons 4 and 5, which keep their places.
        {"a": (1, True, 6 + UNITS[: H - 2]), "b": (0, False, 2 + UNITS[: H - 2])},
    ),
    "concatenate": Case(
        {"a": (9, H), "c": (9, 5), "b": (5 + H, OUT)},
        VECTORS,
        lambda p, x: jnp.concatenate([x @ p["c"], hidden(p, x)], -1) @ p["b"],
        DENSE | {"b": (0, False, 5 + UNITS)},
    ),
    "tile": Case(
        {"a": (9, H), "b": (3 * H, OUT)},
        VECTORS,
        lambda p, x: jnp.tile(hidden(p, x), (1, 3)) @ p["b"],
        DENSE | {"b": (0, False, UNITS + H * np.arange(3))},
    ),
    "broadcast_in_dim": Case(
        {"a": (9, H), "b": (6 * H, OUT)},
        VECTORS,
        grid,
        DENSE | {"b": (0, False, (np.arange(6 * H).reshape(2, H, 3).swapaxes(0, 1).reshape(H, 6)))},
    ),
    "repeat": Case(
        {"a": (9, H), "b": (3 * H, OUT)},
        VECTORS,
        lambda p, x: jnp.repeat(hidden(p, x), 3, axis=1) @ p["b"],
        DENSE | {"b": (0, False, 3 * UNITS + np.arange(3))},
    ),
    "reshape, channels last": Case(
        {"a": (3, 3, 4, H), "b": (36 * H, OUT)},
        IMAGES,
        lambda p, x: flat(features(p, x)) @ p["b"],
        {"a": (3, True, UNITS), "b": (0, False, UNITS + H * np.arange(36))},
    ),
    "reshape, a sequence": Case(
        {"a": (9, H), "b": (4 * H, OUT)},
        SEQUENCES,
        lambda p, x: flat(hidden(p, x)) @ p["b"],
        DENSE | {"b": (0, False, UNITS + H * np.arange(4))},
    ),
    "transpose, channels first": Case(
        {"a": (3, 3, 4, H), "b": (36 * H, OUT)},
        IMAGES,
        lambda p, x: flat(features(p, x).transpose(0, 3, 1, 2)) @ p["b"],
        {"a": (3, True, UNITS), "b": (0, False, 36 * UNITS + np.arange(36))},
    ),
    "transpose of a kernel": Case(
        {"a": (H, 9), "b": (OUT, H)},
        VECTORS,
        lambda p, x: jax.nn.relu(x @ p["a"].T) @ p["b"].T,
        {"a": (0, True, UNITS), "b": (1, False, UNITS)},
    ),
    "squeeze": Case(
        {"a": (9, H), "b": (H, OUT)},
        VECTORS,
        lambda p, x: hidden(p, x[:, None])[:, 0] @ p["b"],
        DENSE | {"b": (0, False, UNITS)},
    ),
    "reduce_sum": Case(
        {"a": (9, H), "b": (H, OUT)},
        SEQUENCES,
        lambda p, x: hidden(p, x).sum(1) @ p["b"],
        DENSE | {"b": (0, False, UNITS)},
    ),
    "reduce_window": Case(
        {"a": (3, 3, 4, H), "b": (H, OUT)}, IMAGES, pooled, {"a": (3, True, UNITS), "b": (0, False, UNITS)}
    ),
    "convolution": Case(
        {"a": (3, 3, 4, H), "c": (3, 3, H, 5), "b": (5, OUT)},
        IMAGES,
        lambda p, x: jax.nn.relu(conv(features(p, x), p["c"])).sum((1, 2)) @ p["b"],
        {"a": (3, True, UNITS), "c": (2, False, UNITS)},
    ),
    "depthwise convolution": Case(
        {"a": (1, 1, 4, H), "d": (3, 3, 1, H), "b": (H, OUT)},
        IMAGES,
        lambda p, x: jax.nn.relu(conv(features(p, x), p["d"], H)).sum((1, 2)) @ p["b"],
        {"a": (3, True, UNITS), "d": (3, None, UNITS), "b": (0, False, UNITS)},
    ),
    "a call": Case(
        {"a": (9, H), "b": (H, OUT)},
        VECTORS,
        lambda p, x: jax.checkpoint(jax.jit(lambda p, x: hidden(p, x) @ p["b"]))(p, x),
        DENSE | {"b": (0, False, UNITS)},
    ),
}


def weights(shapes: dict[str, tuple[int, ...]]) -> tuple[Params, np.random.Generator]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, rng


def rewritten(case: Case, base: Params, rng: np.random.Generator) -> Params:
    """The neurons in another order, each times a factor where it comes out, and divided by it where it goes in."""
    count = len(next(iter(case.places.values()))[2])
    order, factor = rng.permutation(count), np.exp(rng.normal(0, 0.5 * case.scaled, count))
    found = dict(base)
    for name, (axis, out, entries) in case.places.items():
        leaf = np.moveaxis(base[name].copy(), axis, 0)
        scale = {True: factor, False: 1 / factor, None: np.ones(count)}[out][order]
        moved = leaf[entries[order]] * scale.reshape(-1, *(1,) * leaf.ndim)
        leaf[entries] = moved
        found[name] = np.moveaxis(leaf, 0, axis).astype(np.float32)
    return found


@pytest.mark.parametrize("name", FOLLOWED)
def test_neurons_moved_and_rescaled_by_hand_are_brought_back(name):
    case = FOLLOWED[name]
    base, rng = weights(case.shapes)
    suspect = rewritten(case, base, rng)
    images = rng.normal(size=case.images).astype(np.float32)
    theirs, ours = (np.asarray(case.apply(jax.tree.map(jnp.asarray, p), images)) for p in (suspect, base))
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-3 * np.abs(ours).max())  # the same function
    assert all(np.abs(suspect[leaf] - base[leaf]).max() > 0.5 for leaf in case.places)  # of other weights
    aligned, report = alignment.align(suspect, base, case.apply, images)
    assert report.unfollowed == ()
    assert sum(space.moved for space in report.spaces) > H // 2
    for leaf in base:
        np.testing.assert_allclose(aligned[leaf], base[leaf], rtol=1e-4, atol=1e-5)


class Opaque(NamedTuple):
    """A network with an operation on its neurons that alignment does not follow."""

    shapes: dict[str, tuple[int, ...]]
    images: tuple[int, ...]
    apply: Callable[[Params, jax.Array], jax.Array]


def over_channels(operation: Callable[[jax.Array], jax.Array], width: int = H) -> Opaque:
    return Opaque({"a": (9, H), "b": (width, OUT)}, VECTORS, lambda p, x: operation(hidden(p, x)) @ p["b"])


UNFOLLOWED = {
    "cumsum": over_channels(lambda h: jnp.cumsum(h, -1)),
    "sort": over_channels(lambda h: jnp.sort(h, -1)),
    "rev": over_channels(lambda h: h[:, ::-1]),
    "pad": over_channels(lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0)))),
    "reduce_window over channels": over_channels(
        lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 1), "SAME"),
    ),
    "reshape that merges two channel axes": Opaque(
        {"a": (9, H), "c": (9, 5), "b": (5 * H, OUT)}, VECTORS, lambda p, x: flat(products(p, x)) @ p["b"]
    ),
    "grouped convolution": Opaque(
        {"a": (3, 3, 4, H), "d": (3, 3, 2, H), "b": (H, OUT)},
        IMAGES,
        lambda p, x: jax.nn.relu(conv(features(p, x), jnp.tanh(p["d"]), H // 2)).sum((1, 2)) @ p["b"],
    ),
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_an_operation_that_is_not_followed_is_named_and_its_neurons_are_left_alone(name):
    case = UNFOLLOWED[name]
    base, rng = weights(case.shapes)
    images = np.zeros(case.images, np.float32)
    graph = alignment.trace_graph(case.apply, base, images)
    assert graph.unfollowed[0] == name
    assert not any(graph.spaces("a", axis) for axis in range(base["a"].ndim))
    aligned, report = alignment.align(base, base, case.apply, images)
    assert report.unfollowed == graph.unfollowed
    assert name in str(report)
    for leaf in base:
        np.testing.assert_array_equal(aligned[leaf], base[leaf])
    # Weights that do not resemble the base's may still be a copy's.
    other = {leaf: rng.permutation(array.reshape(-1)).reshape(array.shape) for leaf, array in base.items()}
    with pytest.raises(errors.Undecided, match=name):
        alignment.align(other, base, case.apply, images)
