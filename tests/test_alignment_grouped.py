"""Alignment of convolutions in groups and shuffles: groups change places, channels change places within groups."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from smark_jax import alignment, attacks, errors
from smark_jax.alignment import checking
from smark_jax.alignment.graph import View

GROUPS, EACH, OUT = 3, 8, 5
WIDTH = GROUPS * EACH
IMAGES = np.random.default_rng(7).normal(size=(2, 6, 6, 4)).astype(np.float32)
SHAPES = {
    "stem": (1, 1, 4, WIDTH),
    "first": (3, 3, EACH, WIDTH),
    "second": (1, 1, EACH, WIDTH),
    "bias": (WIDTH,),
    "head": (WIDTH, OUT),
}
relu = jax.nn.relu


@pytest.fixture(autouse=True)
def _ranks_promoted():
    """The networks below broadcast as those of others do."""
    with jax.numpy_rank_promotion("allow"):
        yield


def conv(x: jax.Array, kernel: Any, groups: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def shuffled(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], GROUPS, EACH).swapaxes(-1, -2).reshape(x.shape)


def plain(p: Any, x: Any, between: Callable[[jax.Array], jax.Array] = lambda y: y) -> jax.Array:
    y = relu(conv(relu(conv(x, p["stem"])), p["first"], GROUPS))
    return relu(conv(between(y), p["second"], GROUPS) + p["bias"]).mean((1, 2)) @ p["head"]


def shuffling(p: Any, x: Any) -> jax.Array:
    return plain(p, x, shuffled)


def ungrouped(p: Any, x: Any) -> jax.Array:
    """The network with dense kernels."""
    y = relu(conv(relu(conv(x, p["stem"])), p["first"]))
    return relu(conv(y, p["second"]) + p["bias"]).mean((1, 2)) @ p["head"]


def halves(p: Any, x: jax.Array) -> jax.Array:
    """Half of the channels pass by, as in ShuffleNet v2."""
    x = relu(conv(x, p["stem"]))
    for name in ("a", "b"):
        by, through = jnp.split(x, 2, -1)
        x = jnp.concatenate([by, relu(conv(through, p[name]))], -1)
        x = x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)
    return x.mean((1, 2)) @ p["head"]


def drawn(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def dense(kernel: np.ndarray) -> np.ndarray:
    """A kernel of groups as a dense one, group by group."""
    *sides, inputs, outputs = kernel.shape
    found = np.zeros((*sides, GROUPS * inputs, outputs), kernel.dtype)
    for group in range(GROUPS):
        rows, columns = (slice(group * n, (group + 1) * n) for n in (inputs, outputs // GROUPS))
        found[..., rows, columns] = kernel[..., columns]
    return found


def two_levels(rng: np.random.Generator, groups: np.ndarray) -> np.ndarray:
    """An order of channels in which groups stand at ``groups``, their channels at random."""
    return np.concatenate([group * EACH + rng.permutation(EACH) for group in groups])


def moved_by_hand(base: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The plain network with groups elsewhere, and their channels; kernels tell these by their place in a group."""
    groups = rng.permutation(GROUPS)
    inner, between, last = (two_levels(rng, groups) for _ in range(3))
    found = {"stem": base["stem"][..., inner], "bias": base["bias"][last], "head": base["head"][last]}
    for name, before, after in (("first", inner, between), ("second", between, last)):
        kernel = base[name][..., after].copy()
        for group in range(GROUPS):
            columns = slice(group * EACH, (group + 1) * EACH)
            rows = before[columns] % EACH
            kernel[..., columns] = kernel[..., columns][..., rows, :]
        found[name] = kernel
    return found


def same(theirs: Any, ours: Any) -> None:
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4 * np.abs(ours).max())


def test_groups_and_channels_moved_by_hand_are_brought_back():
    base, rng = drawn(0), np.random.default_rng(1)
    suspect = moved_by_hand(base, rng)
    same(plain(suspect, IMAGES), plain(base, IMAGES))
    assert all(np.abs(suspect[name] - base[name]).max() > 0.5 for name in base)
    aligned, report = alignment.align(suspect, base, plain, IMAGES)
    assert report.unfollowed == () and sum(space.moved for space in report.spaces) > WIDTH
    for name, leaf in base.items():
        np.testing.assert_allclose(aligned[name], leaf, rtol=1e-4, atol=1e-5)


def test_a_suspect_whose_convolutions_are_dense_is_brought_back():
    base, rng = drawn(0), np.random.default_rng(1)
    orders = [rng.permutation(WIDTH) for _ in range(3)]
    blocks = {name: dense(base[name]) for name in ("first", "second")}
    suspect = {
        "stem": base["stem"][..., orders[0]],
        "first": blocks["first"][..., orders[0], :][..., orders[1]],
        "second": blocks["second"][..., orders[1], :][..., orders[2]],
        "bias": base["bias"][orders[2]],
        "head": base["head"][orders[2]],
    }
    same(ungrouped(suspect, IMAGES), plain(base, IMAGES))
    aligned, _ = alignment.align(suspect, base, plain, IMAGES)
    for name, leaf in base.items():
        np.testing.assert_allclose(aligned[name], leaf, rtol=1e-4, atol=1e-5)


def test_depthwise_convolutions_that_became_dense_are_brought_back():
    shapes = {"stem": (1, 1, 4, WIDTH), "depthwise": (3, 3, 1, WIDTH), "head": (WIDTH, OUT)}
    base, rng = drawn(0, shapes), np.random.default_rng(1)

    def network(p: Any, x: Any, groups: int = WIDTH) -> jax.Array:
        return relu(conv(relu(conv(x, p["stem"])), p["depthwise"], groups)).mean((1, 2)) @ p["head"]

    made, read = (rng.permutation(WIDTH) for _ in range(2))
    kernel = np.zeros((3, 3, WIDTH, WIDTH), np.float32)
    kernel[..., np.arange(WIDTH), np.arange(WIDTH)] = base["depthwise"][..., 0, :]
    suspect = {
        "stem": base["stem"][..., made],
        "depthwise": kernel[..., made, :][..., read],
        "head": base["head"][read],
    }
    same(network(suspect, IMAGES, 1), network(base, IMAGES))
    aligned, _ = alignment.align(suspect, base, network, IMAGES)
    for name, leaf in base.items():
        np.testing.assert_allclose(aligned[name], leaf, rtol=1e-4, atol=1e-5)


def every_other(p: Any, x: Any) -> jax.Array:
    y = relu(conv(x, p["stem"])).mean((1, 2))
    return y[:, ::2] @ p["even"] + y[:, 1::2] @ p["odd"]


SHUFFLED = {
    "every other channel": (
        every_other,
        {"stem": (3, 3, 4, 24), "even": (12, OUT), "odd": (12, OUT)},
    ),
    "groups": (plain, SHAPES),
    "a shuffle": (shuffling, SHAPES),
    "halves": (
        halves,
        {"stem": (3, 3, 4, 24), "a": (3, 3, 12, 12), "b": (3, 3, 12, 12), "head": (24, OUT)},
    ),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_random_rewrites_leave_the_logits_alone_and_are_undone(name):
    network, shapes = SHUFFLED[name]
    base = drawn(0, shapes)
    graph = alignment.trace_graph(network, base, IMAGES)
    assert graph.unfollowed == () and checking.change(graph, network, base, IMAGES) < 1e-5
    suspect = attacks.rewrite(base, graph, jax.random.key(3))
    same(network(suspect, IMAGES), network(base, IMAGES))
    assert all(np.abs(suspect[leaf] - base[leaf]).max() > 0.5 for leaf in base)
    aligned, _ = alignment.align(suspect, base, network, IMAGES)
    for leaf, array in base.items():
        np.testing.assert_allclose(aligned[leaf], array, rtol=1e-4, atol=1e-5)


def test_a_shuffle_lets_units_change_places_in_cells_of_both_groupings():
    graph = alignment.trace_graph(shuffling, drawn(0), IMAGES)
    (between,) = [some for some in graph.partitions if len(some) == 2]
    cells = {tuple(int(p.groups[unit]) for p in between) for unit in range(WIDTH)}
    assert len(cells) == GROUPS**2


def test_another_network_with_groups_is_no_copy():
    base, other = drawn(0), drawn(1)
    with pytest.raises(errors.NothingMatched):
        alignment.align(other, base, plain, IMAGES)


def test_units_that_a_norm_divides_in_two_ways_move_as_far_as_both_allow():
    def network(p: Any, x: jax.Array) -> jax.Array:
        y = conv(x, p["stem"])
        parts = [y.reshape(*y.shape[:-1], -1, size) for size in (6, 8)]
        return sum(relu(part / jnp.square(part).mean((1, 2, 4), keepdims=True)).reshape(y.shape) for part in parts)  # type: ignore[return-value]

    def logits(p: Any, x: jax.Array) -> jax.Array:
        return network(p, x).mean((1, 2)) @ p["head"]

    base = drawn(0, {"stem": (1, 1, 4, WIDTH), "head": (WIDTH, OUT)})
    graph = alignment.trace_graph(logits, base, IMAGES)
    assert [len(set(p.groups.tolist())) for p in graph.partitions[0]] == [4, 3]
    assert checking.change(graph, logits, base, IMAGES) < 1e-5


def test_a_view_of_groups_is_a_kernel_of_blocks():
    kernel = drawn(0)["first"]
    view = View(kernel.shape, (3, 3, WIDTH, WIDTH), (0, 1, 2, 3), GROUPS, 2, 3)
    np.testing.assert_array_equal(view.seen(kernel), dense(kernel))
    np.testing.assert_array_equal(view.own_form(dense(kernel)), kernel)
    turned = kernel.transpose(3, 2, 0, 1)
    view = View(turned.shape, (WIDTH, WIDTH, 3, 3), (0, 1, 2, 3), GROUPS, 1, 0)
    np.testing.assert_array_equal(view.seen(turned), dense(kernel).transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(view.own_form(view.seen(turned)), turned)
