"""Groups that are repeated, tied in two places, or cut; kernels that are not leaves; suspects of odd shapes.

Each network has a symmetry that a careless graph gets wrong: random rewrites must leave the logits alone, and a rewrite
by hand that the graph does not know must not be called another network.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from smark_jax import alignment, attacks, errors
from smark_jax.alignment._identities import Roots

IMAGES = np.random.default_rng(7).normal(size=(3, 4, 4, 4)).astype(np.float32)
relu = jax.nn.relu
Params = Any


@pytest.fixture(autouse=True)
def _ranks_promoted():
    with jax.numpy_rank_promotion("allow"):
        yield


def conv(x: jax.Array, kernel: jax.Array, groups: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {name: np.sqrt(max(1, np.prod(shape[:-1]))) for name, shape in shapes.items()}
    return {name: (rng.normal(size=shape) / sizes[name]).astype(np.float32) for name, shape in shapes.items()}


def head(x: jax.Array, p: Params) -> jax.Array:
    return x.mean((1, 2)) @ p["head"]


def stem(p: Params, x: Any) -> jax.Array:
    return relu(conv(x, p["stem"]))


def joined(*parts: jax.Array) -> jax.Array:
    return jnp.concatenate(parts, -1)


def halves_added(p: Params, x: Any) -> jax.Array:
    h = relu(conv(stem(p, x), p["a"], 4))
    return head(relu(conv(h[..., :8], p["b"], 2) + h[..., 8:]), p)


def dense_block(p: Params, x: Any) -> jax.Array:
    s = stem(p, x)
    h = joined(s, relu(conv(s, p["a"], 2)))
    return head(joined(h, relu(conv(h, p["b"], 4))), p)


def gated(p: Params, x: Any) -> jax.Array:
    y = conv(stem(p, x), p["a"], 4)
    return head(y[..., :8] * jax.nn.sigmoid(y[..., 8:]), p)


def twice(p: Params, x: Any) -> jax.Array:
    h = stem(p, x)
    return head(relu(conv(joined(h, h), p["a"], 2)), p)


def images_repeated(p: Params, x: Any) -> jax.Array:
    return head(relu(conv(joined(x, x, x, x), p["a"], 4)), p)


def overlapping(p: Params, x: Any) -> jax.Array:
    h = stem(p, x)
    return head(relu(conv(joined(h[..., :8], h[..., 4:]), p["a"], 2)), p)


def both_signs(p: Params, x: Any) -> jax.Array:
    y = conv(x, p["stem"])
    return head(relu(conv(joined(relu(y), relu(-y)), p["a"], 4)), p)


def space_to_depth(p: Params, x: Any) -> jax.Array:
    y = stem(p, x).reshape(3, 2, 2, 2, 2, 4).transpose(0, 1, 3, 2, 4, 5).reshape(3, 2, 2, 16)
    return head(relu(conv(y, p["a"], 4)), p)


def tiled_bias(p: Params, x: Any) -> jax.Array:
    return head(relu(conv(stem(p, x), p["a"], 4) + jnp.tile(p["t"], 4)), p)


def tiled_kernel(p: Params, x: Any) -> jax.Array:
    return head(relu(conv(stem(p, x), jnp.tile(p["a"], (1, 1, 1, 4)), 4)), p)


def two_numbers_of_groups(p: Params, x: Any) -> jax.Array:
    return head(relu(conv(relu(conv(stem(p, x), p["a"], 2)), p["a"], 4)), p)


def padded_window(p: Params, x: Any) -> jax.Array:
    padding = ((0, 0), (0, 0), (0, 0), (1, 0))
    return head(lax.reduce_window(stem(p, x), 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), padding)[..., :16], p)


def strided_window(p: Params, x: Any) -> jax.Array:
    return head(lax.reduce_window(stem(p, x), 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 2), "VALID"), p)


Network = Callable[[Params, Any], jax.Array]
WIDE, NARROW, FOUR = {"stem": (1, 1, 4, 16)}, {"stem": (1, 1, 4, 8)}, (3, 3, 4, 16)
ODD: dict[str, tuple[Network, dict[str, tuple[int, ...]]]] = {
    "halves of groups added": (halves_added, {**WIDE, "a": FOUR, "b": (3, 3, 4, 8), "head": (8, 5)}),
    "a dense block of groups": (dense_block, {**NARROW, "a": (3, 3, 4, 8), "b": (3, 3, 4, 8), "head": (24, 5)}),
    "gates of groups": (gated, {**WIDE, "a": FOUR, "head": (8, 5)}),
    "channels twice": (twice, {**NARROW, "a": (3, 3, 8, 16), "head": (16, 5)}),
    "images four times": (images_repeated, {"a": FOUR, "head": (16, 5)}),
    "overlapping groups": (overlapping, {"stem": (1, 1, 4, 12), "a": (3, 3, 8, 16), "head": (16, 5)}),
    "both signs": (both_signs, {**NARROW, "a": FOUR, "head": (16, 5)}),
    "space to depth": (space_to_depth, {"stem": (1, 1, 4, 4), "a": FOUR, "head": (16, 5)}),
    "a bias for all groups": (tiled_bias, {**WIDE, "a": FOUR, "t": (4,), "head": (16, 5)}),
    "a kernel for all groups": (tiled_kernel, {**WIDE, "a": (3, 3, 4, 4), "head": (16, 5)}),
    "two and four groups": (two_numbers_of_groups, {**NARROW, "a": FOUR, "head": (16, 5)}),
    "a window beyond the channels": (padded_window, {**WIDE, "head": (16, 5)}),
    "every other channel of a window": (strided_window, {**WIDE, "head": (8, 5)}),
}


@pytest.mark.parametrize("name", ODD)
def test_random_rewrites_leave_the_logits_alone_and_what_is_not_followed_is_named(name):
    network, shapes = ODD[name]
    base = drawn(0, **shapes)
    graph = alignment.trace_graph(network, base, IMAGES)
    assert graph.unfollowed or graph.beyond
    logits = np.asarray(network(base, IMAGES))
    for key in range(6):
        moved = attacks.permute(base, graph, jax.random.key(key))
        assert np.abs(np.asarray(network(moved, IMAGES)) - logits).max() < 1e-4 * np.ptp(logits)


def repeated_inputs(p: Params, x: Any) -> jax.Array:
    return head(relu(conv(jnp.repeat(x, 16, -1), p["a"], 64)), p)


def repeated_moved(base: Params, rng: np.random.Generator) -> Params:
    order = np.concatenate([16 * channel + rng.permutation(16) for channel in range(4)])
    return {"a": base["a"][..., order], "head": base["head"][order]}


def branches_added(p: Params, x: Any) -> jax.Array:
    h = relu(conv(x, p["a0"]) + conv(x, p["b0"]))
    return (conv(h, p["a1"]) + conv(h, p["b1"])).mean((1, 2))


def branches_moved(base: Params, rng: np.random.Generator) -> Params:
    """Part of each 1x1 kernel goes to the middle of the 3x3 kernel beside it, as in RepVGG."""
    found = {name: leaf.copy() for name, leaf in base.items()}
    for layer in "01":
        kernel = found[f"b{layer}"]
        part = (30 * kernel.std() * rng.normal(size=kernel.shape)).astype(np.float32)
        kernel -= part
        found[f"a{layer}"][1, 1] += part[0, 0]
    return found


def doubled(p: Params, x: Any) -> jax.Array:
    h = x.reshape(3, -1)
    h = relu(joined(h, h) @ p["a"])
    return joined(h, h) @ p["b"]


def doubled_moved(base: Params, rng: np.random.Generator) -> Params:
    found = {}
    for name, leaf in base.items():
        half = len(leaf) // 2
        part = (10 * leaf.std() * rng.normal(size=(half, leaf.shape[1]))).astype(np.float32)
        found[name] = np.concatenate([leaf[:half] + part, leaf[half:] - part])
    return found


HIDDEN = {
    "channels repeated for a depthwise kernel": (
        repeated_inputs,
        repeated_moved,
        {"a": (3, 3, 1, 64), "head": (64, 10)},
    ),
    "kernels whose products are added": (
        branches_added,
        branches_moved,
        {"a0": (3, 3, 4, 24), "b0": (1, 1, 4, 24), "a1": (3, 3, 24, 10), "b1": (1, 1, 24, 10)},
    ),
    "channels side by side with themselves": (doubled, doubled_moved, {"a": (128, 32), "b": (64, 5)}),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_rewrite_hides_is_undecided(name):
    network, move, shapes = HIDDEN[name]
    base = drawn(0, **shapes)
    suspect = move(base, np.random.default_rng(3))
    logits, theirs = (np.asarray(network(p, IMAGES)) for p in (base, suspect))
    assert np.abs(theirs - logits).max() < 1e-4 * np.ptp(logits)
    with pytest.raises(errors.Undecided):
        alignment.align(suspect, base, network, IMAGES)


def two_layers(p: Params, x: Any) -> jax.Array:
    return relu(x.reshape(3, -1) @ p["a"]) @ p["head"]


@pytest.mark.parametrize("left", [63, 40, 32])
def test_a_suspect_without_some_units_is_aligned_by_the_others(left):
    base = drawn(0, a=(64, 64), head=(64, 5))
    base["head"][left:] = 0  # dead units, which anybody may take out
    suspect = {"a": base["a"][:, :left], "head": base["head"][:left]}
    np.testing.assert_allclose(two_layers(suspect, IMAGES), two_layers(base, IMAGES), atol=1e-5)
    aligned, _ = alignment.align(suspect, base, two_layers, IMAGES)
    for name, leaf in base.items():
        np.testing.assert_allclose(aligned[name], leaf, atol=1e-5)


def test_a_network_that_is_another_and_narrower_is_undecided():
    base, other = drawn(0, a=(64, 64), head=(64, 5)), drawn(1, a=(64, 8), head=(8, 5))
    with pytest.raises(errors.Undecided, match="fewer channels"):
        alignment.align(other, base, two_layers, IMAGES)


def test_a_leaf_of_which_one_entry_is_taken_is_traced():
    base = drawn(0, a=(2, 3, 3, 4, 16), head=(16, 5))
    graph = alignment.trace_graph(lambda p, x: head(relu(conv(x, p["a"][0])), p), base, IMAGES)
    assert graph.sizes or graph.unfollowed or graph.beyond


@pytest.mark.parametrize("parents", [{0: 1, 1: 2, 2: 3, 3: 3}, {n: max(n - 1, 0) for n in range(9)}])
def test_a_chain_of_parents_leads_to_its_root(parents):
    root = next(n for n, above in parents.items() if n == above)
    roots = Roots(parents)
    assert [roots.of(n) for n in parents] == [root] * len(parents)


@pytest.mark.parametrize("shape", [(3, 3, 0, 16), (3, 3, 4, 0), (3, 3, 5000, 16)])
def test_kernels_of_groups_in_odd_shapes_are_left_out(shape):
    base = drawn(0, **WIDE, a=FOUR, head=(16, 5))

    def network(p: Params, x: Any) -> jax.Array:
        return head(relu(conv(stem(p, x), p["a"], 4)), p)

    _, report = alignment.align({**base, "a": np.zeros(shape, np.float32)}, base, network, IMAGES)
    assert report.left_out == ("a",)


def test_a_dense_kernel_in_place_of_groups_may_be_wider():
    def networks(*groups: int) -> Network:
        return lambda p, x: head(relu(conv(relu(conv(stem(p, x), p["a"], groups[0])), p["b"], groups[1])), p)

    base = drawn(4, stem=(1, 1, 4, 32), a=(3, 3, 16, 32), b=(3, 3, 8, 32), head=(32, 5))
    dense = attacks.densify(base, networks(2, 4), IMAGES)
    graph = alignment.trace_graph(networks(1, 1), dense, IMAGES)
    suspect = attacks.add_neurons(dense, graph, jax.random.key(1), share=0.5)
    aligned, report = alignment.align(attacks.permute(suspect, graph, jax.random.key(1)), base, networks(2, 4), IMAGES)
    assert report.left_out == ()
    for name, leaf in base.items():
        np.testing.assert_allclose(aligned[name], leaf, atol=1e-4)
