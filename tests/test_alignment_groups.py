"""The rewrites that graphs allow, on small networks of many kinds: the networks themselves say whether they are right.

A graph's random rewrite must leave the logits alone. Where a network has a symmetry that its graph does not know, the
graph must say so, or a copy could be called none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.common import networks, zoo
from smark_jax import _trees, alignment, attacks, errors
from smark_jax.alignment import checking, gauge
from smark_jax.alignment.spaces import Place

TOKENS, IMAGES = (3, 6, 8), (2, 6, 6, 4)
Weights = Callable[..., jax.Array]  # a name, and the shape of the leaf of that name
softmax, relu = jax.nn.softmax, jax.nn.relu


@pytest.fixture(autouse=True)
def _ranks_promoted():
    """The networks below broadcast as those of others do."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Network(NamedTuple):
    params: dict[str, np.ndarray]
    apply: Callable[[Any, Any], jax.Array]
    images: np.ndarray


def network(compute: Callable[[Weights, jax.Array], jax.Array], shape: tuple[int, ...]) -> Network:
    """The network with random weights, gains about one."""
    rng, params = np.random.default_rng(0), {}
    images = rng.normal(size=shape).astype(np.float32)

    def drawn(name: str, *sizes: int) -> jax.Array:
        if name not in params:
            leaf = rng.normal(size=sizes) / np.sqrt(np.prod(sizes[:-1])) if len(sizes) > 1 else rng.normal(size=sizes)
            params[name] = (np.exp(0.5 * leaf) if name.startswith("gain") else leaf).astype(np.float32)
        return jnp.asarray(params[name])

    compute(drawn, jnp.asarray(images))
    return Network(params, lambda p, x: compute(lambda name, *_: p[name], x), images)


def dense(p: Weights, x: jax.Array, name: str, width: int) -> jax.Array:
    return x @ p(name, x.shape[-1], width) + p(name + " bias", width)


def conv(p: Weights, x: jax.Array, name: str, width: int, window: int = 3) -> jax.Array:
    kernel = p(name, window, window, x.shape[-1], width)
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def norm(p: Weights, x: jax.Array, name: str) -> jax.Array:
    width = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    scale = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return centred * scale * p("gain " + name, width) + p("shift " + name, width)


def head(p: Weights, x: jax.Array) -> jax.Array:
    return dense(p, x.reshape(x.shape[0], -1, x.shape[-1]).mean(1), "head", 5)


def stream(p: Weights, x: jax.Array) -> jax.Array:
    return dense(p, x, "stem", 8) + p("positions", x.shape[1], 8)


def attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("nhqk,nkhe->nqhe", softmax(jnp.einsum("nqhe,nkhe->nhqk", q, k)), v)


def separate(p: Weights, x: jax.Array) -> list[jax.Array]:
    return [jnp.einsum("ntd,dhe->nthe", x, p(name, 8, 4, 2)) for name in "qkv"]


def finished(p: Weights, x: jax.Array, out: jax.Array) -> jax.Array:
    x = x + jnp.einsum("nqhe,hed->nqd", out, p("out", *out.shape[2:], 8))
    return head(p, norm(p, x, "last"))


def attention(p: Weights, x: jax.Array) -> jax.Array:
    x = stream(p, x)
    return finished(p, x, attended(*separate(p, norm(p, x, "1"))))


def fused(p: Weights, x: jax.Array) -> jax.Array:
    x = stream(p, x)
    qkv = jnp.einsum("ntd,dche->ntche", norm(p, x, "1"), p("qkv", 8, 3, 4, 2)) + p("qkv bias", 3, 4, 2)
    return finished(p, x, attended(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))


def norms_of_queries(p: Weights, x: jax.Array) -> jax.Array:
    x = stream(p, x)
    q, k, v = separate(p, norm(p, x, "1"))
    return finished(p, x, attended(norm(p, q, "q"), norm(p, k, "k"), v))


def norms_over_heads(p: Weights, x: jax.Array) -> jax.Array:
    x = stream(p, x)
    q, k, v = (norm(p, x, "1") @ p(name, 8, 8) for name in "qkv")
    q, k, v = (a.reshape(*a.shape[:2], 4, 2) for a in (norm(p, q, "q"), norm(p, k, "k"), v))
    return finished(p, x, attended(q, k, v))


def rotary(p: Weights, x: jax.Array) -> jax.Array:
    x = stream(p, x)
    q, k, v = separate(p, norm(p, x, "1"))
    angles = np.arange(x.shape[1], dtype=np.float32)[:, None, None]

    def turned(a: jax.Array) -> jax.Array:
        one, other = jnp.split(a, 2, -1)
        sin, cos = np.sin(angles), np.cos(angles)
        return jnp.concatenate([one * cos - other * sin, one * sin + other * cos], -1)

    return finished(p, x, attended(turned(q), turned(k), v))


def differential(p: Weights, x: jax.Array) -> jax.Array:
    x = stream(p, x)
    y = norm(p, x, "1")
    q, k = (jnp.einsum("ntd,dhce->nthce", y, p(name, 8, 4, 2, 2)) for name in "qk")
    v = jnp.einsum("ntd,dhe->nthe", y, p("v", 8, 4, 2))
    scores = softmax(jnp.einsum("nqhce,nkhce->nhcqk", q, k))
    return finished(p, x, jnp.einsum("nhqk,nkhe->nqhe", scores[:, :, 0] - 0.3 * scores[:, :, 1], v))


def group_norm(x: jax.Array, groups: int, interleaved: bool = False) -> jax.Array:
    width = x.shape[-1] // groups
    parts = x.reshape(*x.shape[:-1], *((width, groups) if interleaved else (groups, width)))
    axes = (1, 2, 3) if interleaved else (1, 2, 4)
    parts = parts - parts.mean(axes, keepdims=True)
    return (parts * lax.rsqrt(jnp.square(parts).mean(axes, keepdims=True) + 1e-5)).reshape(x.shape)


def channels_first(x: jax.Array, groups: int) -> jax.Array:
    first = jnp.moveaxis(x, -1, 1)
    parts = first.reshape(x.shape[0], groups, -1)
    parts = (parts - parts.mean(-1, keepdims=True)) / jnp.sqrt(parts.var(-1, keepdims=True) + 1e-5)
    return jnp.moveaxis(parts.reshape(first.shape), 1, -1)


def part_by_part(x: jax.Array, groups: int) -> jax.Array:
    return jnp.concatenate([group_norm(part, 1) for part in jnp.split(x, groups, -1)], -1)


def grouped(norms: Callable[[jax.Array], jax.Array]) -> Callable[[Weights, jax.Array], jax.Array]:
    return lambda p, x: head(p, relu(norms(conv(p, x, "a", 12)) * p("gain", 12) + p("shift", 12)))


def in_groups(
    p: Weights,
    x: jax.Array,
    name: str,
    width: int,
    groups: int,
    change: Callable[[jax.Array], jax.Array] = lambda kernel: kernel,
) -> jax.Array:
    kernel, numbers = change(p(name, 3, 3, x.shape[-1] // groups, width)), ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def convolution_of_rows(p: Weights, x: jax.Array) -> jax.Array:
    """Kernels of [O, I, H, W], transposed before they are used."""
    first, kernel = jnp.moveaxis(relu(conv(p, x, "a", 12)), -1, 1), p("b", 12, 4, 3, 3).transpose(2, 3, 1, 0)
    made = lax.conv_general_dilated(
        first, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW"), feature_group_count=3
    )
    return head(p, jnp.moveaxis(relu(made), 1, -1))


def two_groupings(p: Weights, x: jax.Array) -> jax.Array:
    x = conv(p, x, "a", 12)
    return head(p, relu(group_norm(x, 3)) + relu(group_norm(x, 4)))


def batch_norm(p: Weights, x: jax.Array, name: str) -> jax.Array:
    width = x.shape[-1]
    scaled = (x - p("mean " + name, width)) * lax.rsqrt(p("gain of variance " + name, width))
    return scaled * p("gain " + name, width) + p("shift " + name, width)


def kernels_of_another_scale(change: Callable[[jax.Array], jax.Array]) -> Callable[[Weights, jax.Array], jax.Array]:
    return lambda p, x: head(p, x @ change(p("a", 4, 6)))


def over_channels(p: Weights, x: jax.Array) -> jax.Array:
    made = dense(p, x, "a", 12).mean(1)[..., None]
    made = lax.conv_general_dilated(made, p("b", 3, 1, 2), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return dense(p, made.reshape(x.shape[0], -1), "head", 5)


def gains_in_parallel(p: Weights, x: jax.Array) -> jax.Array:
    x = stream(p, x)
    y = norm(p, x, "1")
    mixed = y * p("gain", 8) + y[:, ::-1] * (1 - p("gain", 8))
    return head(p, norm(p, x + dense(p, relu(dense(p, mixed, "a", 12)), "b", 8), "last"))


def gains_in_branches(p: Weights, x: jax.Array) -> jax.Array:
    made = dense(p, x, "a", 6)
    return head(p, made * p("gain", 6)) + dense(p, (made * p("gain 2", 6))[:, 0], "b", 5)


def gains_in_a_row(p: Weights, x: jax.Array) -> jax.Array:
    made = dense(p, x, "a", 6) * p("gain", 6) + p("shift", 6)
    return head(p, made * p("gain 2", 6) + p("shift 2", 6))


def a_multiple_of_a_shift(p: Weights, x: jax.Array) -> jax.Array:
    y = norm(p, stream(p, x), "1") - p("shift 1", 8)
    return head(p, y + 3 * p("shift 1", 8))


def a_kernel_with_and_without_bias(p: Weights, x: jax.Array) -> jax.Array:
    y, kernel = norm(p, stream(p, x), "1"), p("a", 8, 12)
    return head(p, relu(y @ kernel + p("bias", 12)) + relu(y[:, ::-1] @ kernel))


SOUND = {
    "attention": (attention, TOKENS),
    "attention, fused": (fused, TOKENS),
    "attention, norms of queries and keys": (norms_of_queries, TOKENS),
    "attention, norms over all heads": (norms_over_heads, TOKENS),
    "attention, rotary": (rotary, TOKENS),
    "attention, differential": (differential, TOKENS),
    "group norm": (grouped(lambda x: group_norm(x, 3)), IMAGES),
    "group norm, channels first": (grouped(lambda x: channels_first(x, 3)), IMAGES),
    "group norm, interleaved": (grouped(lambda x: group_norm(x, 3, True)), IMAGES),
    "group norm, part by part": (grouped(lambda x: part_by_part(x, 3)), IMAGES),
    "group norm, linear": (lambda p, x: head(p, group_norm(conv(p, x, "a", 12), 3) * p("gain", 12)), IMAGES),
    "group norm, two": (two_groupings, IMAGES),
    "convolution in groups": (lambda p, x: head(p, relu(in_groups(p, relu(conv(p, x, "a", 12)), "b", 12, 3))), IMAGES),
    "convolutions in groups, linear": (
        lambda p, x: head(p, relu(in_groups(p, in_groups(p, relu(conv(p, x, "a", 12)), "b", 12, 3), "c", 12, 3))),
        IMAGES,
    ),
    "convolution in groups of a linear bottleneck": (
        lambda p, x: head(p, relu(in_groups(p, conv(p, x, "a", 12), "b", 12, 3)) @ p("c", 12, 8)),
        IMAGES,
    ),
    "convolution in groups of the images": (lambda p, x: head(p, relu(in_groups(p, x, "a", 12, 2))), IMAGES),
    "convolution in groups, standardised": (
        lambda p, x: head(p, relu(in_groups(p, relu(conv(p, x, "a", 12)), "b", 12, 3, jnp.tanh))),
        IMAGES,
    ),
    "convolution in groups, twice": (
        lambda p, x: head(p, relu(in_groups(p, relu(in_groups(p, conv(p, x, "a", 12), "b", 12, 3)), "b", 12, 3))),
        IMAGES,
    ),
    "convolution in groups, channels first": (convolution_of_rows, IMAGES),
    "depthwise, two for each channel": (
        lambda p, x: head(p, relu(in_groups(p, relu(conv(p, x, "a", 6)), "b", 12, 6))),
        IMAGES,
    ),
    "batch norm before a window": (
        lambda p, x: head(p, relu(conv(p, batch_norm(p, conv(p, x, "a", 8), "1"), "b", 12))),
        IMAGES,
    ),
    "batch norm, twice": (
        lambda p, x: head(
            p, batch_norm(p, conv(p, batch_norm(p, conv(p, x, "a", 8), "1"), "b", 8), "1") @ p("c", 8, 12)
        ),
        IMAGES,
    ),
    "weight standardisation": (kernels_of_another_scale(lambda w: (w - w.mean(0)) / w.std(0)), IMAGES),
    "signs of weights": (kernels_of_another_scale(jnp.sign), IMAGES),
    "maximum over tokens": (lambda p, x: dense(p, dense(p, x, "a", 12).max(1), "head", 5), TOKENS),
    "product in einsum": (
        lambda p, x: head(p, jnp.einsum("nti,nti->nti", *(dense(p, x, name, 6) for name in "ab"))),
        TOKENS,
    ),
    "convolution over channels": (over_channels, TOKENS),
    "gains in parallel": (gains_in_parallel, TOKENS),
    "gains in branches": (gains_in_branches, TOKENS),
    "gains in a row": (gains_in_a_row, TOKENS),
    "a multiple of a shift": (a_multiple_of_a_shift, TOKENS),
    "a kernel with and without bias": (a_kernel_with_and_without_bias, TOKENS),
}


@pytest.mark.parametrize("name", SOUND)
def test_rewrites_that_a_graph_allows_leave_the_logits_alone(name, monkeypatch):
    found = network(*SOUND[name])
    graph = alignment.trace_graph(found.apply, found.params, found.images)
    for seed in range(4):
        monkeypatch.setattr(checking, "_SEED", seed)
        assert checking.change(graph, found.apply, found.params, found.images) < 1e-3


@pytest.mark.parametrize("name", ["attention", "attention, fused"])
def test_attention_in_any_spelling_has_a_basis_for_queries_and_keys_and_one_for_values(name):
    found = network(*SOUND[name])
    graph = alignment.trace_graph(found.apply, found.params, found.images)
    assert graph.unfollowed == ()
    heads = [space for space in graph.linear if space.blocks == 4]
    assert [(space.group, space.width, space.heads) for space in heads] == [("linear", 2, heads[0].heads)] * 2
    assert heads[0].heads >= 0


@pytest.mark.parametrize("name, sizes", [("group norm, interleaved", [3]), ("group norm, two", [3, 4])])
def test_groups_in_any_order_divide_a_space(name, sizes):
    found = network(*SOUND[name])
    graph = alignment.trace_graph(found.apply, found.params, found.images)
    assert graph.unfollowed == () and [len(set(p.groups.tolist())) for p in graph.partitions[0]] == sizes


@pytest.mark.parametrize("name", ["group norm, part by part", "attention, norms over all heads"])
def test_blocks_that_a_graph_cannot_move_are_named(name):
    found = network(*SOUND[name])
    graph = alignment.trace_graph(found.apply, found.params, found.images)
    assert any("channels in blocks" in name for name in graph.unfollowed)


def test_a_kernel_that_makes_and_reads_its_units_has_a_space():
    found = network(lambda p, x: head(p, relu(relu(x @ p("a", 8, 12)) @ p("a", 8, 12).T)), TOKENS)
    order = np.random.default_rng(1).permutation(12)
    moved = {**found.params, "a": found.params["a"][:, order]}
    np.testing.assert_allclose(found.apply(moved, found.images), found.apply(found.params, found.images), rtol=1e-4)
    aligned, _ = alignment.align(moved, found.params, found.apply, found.images)
    np.testing.assert_allclose(aligned["a"], found.params["a"], atol=1e-5)


@pytest.mark.parametrize("name", ["stem", "positions", "q", "v", "out", "head"])
def test_a_suspect_without_a_kernel_of_attention_is_aligned_by_the_others(name):
    found = network(*SOUND["attention"])
    suspect = {path: leaf for path, leaf in found.params.items() if path != name}
    aligned, report = alignment.align(suspect, found.params, found.apply, found.images)
    assert report.left_out == (name,)
    for path, leaf in found.params.items():
        np.testing.assert_allclose(aligned[path], leaf, atol=1e-4)


def test_spaces_keep_their_numbers_where_leaves_are_missing():
    found = network(*SOUND["attention"])
    graph = alignment.trace_graph(found.apply, found.params, found.images)
    rest = graph.without({place.path for place in graph.linear[0].places})
    assert len(rest.linear) == len(graph.linear) > 1
    assert [space.blocks for space in rest.linear].count(0) >= 1


ZOO = [
    "ViT",
    "ViT, fused",
    "ViT, nnx",
    "Swin",
    "MobileNetV3",
    "ResNet, group norm",
    "ResNeXt",
    "ShuffleNet v1",
    "ShuffleNet v2",
]


def drawn(name: str, seed: int) -> tuple[Any, Callable[..., jax.Array]]:
    """A network of the zoo with random weights, gains about one."""
    made = networks.functional(zoo.networks()[name].network)
    shapes, rng = jax.eval_shape(lambda: made.init(jax.random.key(0), (28, 28, 1))), np.random.default_rng(seed)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.normal(size=shape.shape) / np.sqrt(max(1, np.prod(shape.shape[:-1])))
        if "scale" in (text := jax.tree_util.keystr(path)) or "var" in text:
            values = np.exp(0.3 * rng.normal(size=shape.shape))
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes), made.apply_fn


def changes(params: Any, base: Any) -> np.ndarray:
    """How kernels differ from the base's, each relative to its RMS, in one vector."""
    theirs, ours = (_trees.named("test", tree) for tree in (params, base))
    kernels = [path for path, leaf in ours.items() if np.ndim(leaf) > 1 and np.size(leaf) > 400]
    assert len(kernels) > 5
    return np.concatenate(
        [
            ((np.asarray(theirs[p], np.float64) - ours[p]) / np.sqrt(np.mean(np.square(ours[p])))).reshape(-1)
            for p in kernels
        ]
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", ZOO)
def test_what_a_copy_carries_is_found_again_after_any_rewrite_that_the_graph_allows(name):
    base, apply = drawn(name, 0)
    rng = np.random.default_rng(1)
    mark = jax.tree.map(lambda leaf: 0.02 * np.std(leaf) * rng.normal(size=leaf.shape).astype(np.float32), base)
    copy = jax.tree.map(lambda leaf, change: leaf + (change if leaf.ndim > 1 else 0), base, mark)
    images = rng.random((2, 28, 28, 1)).astype(np.float32)
    graph = alignment.trace_graph(apply, base, images)
    suspect = attacks.rewrite(copy, graph, jax.random.key(6))
    logits, theirs = (np.asarray(jax.jit(apply)(tree, images)) for tree in (copy, suspect))
    assert np.abs(theirs - logits).max() < 1e-3 * np.ptp(logits)
    aligned, report = alignment.align(suspect, base, apply, images)
    assert report.similarity > 0.99 and report.unfollowed == ()
    carried = changes(copy, base)
    assert abs(cosine(changes(suspect, base), carried)) < 0.1  # the control: without alignment
    assert cosine(changes(aligned, base), carried) > 0.85


def test_variances_below_zero_do_not_keep_a_copy_from_being_aligned():
    base, apply = drawn("MobileNetV3", 0)
    rng, images = np.random.default_rng(1), np.zeros((2, 28, 28, 1), np.float32)

    def spoilt(path: Any, leaf: np.ndarray) -> np.ndarray:
        return leaf * (rng.choice([1, -1], leaf.shape) if "var" in jax.tree_util.keystr(path) else 1)

    graph = alignment.trace_graph(apply, base, images)
    suspect = attacks.permute(jax.tree_util.tree_map_with_path(spoilt, base), graph, jax.random.key(2))
    assert not np.isfinite(jax.jit(apply)(suspect, images)).all()
    report = alignment.align(suspect, base, apply, images).report
    assert report.similarity > 0.9


@pytest.mark.parametrize("name", ["ViT", "Swin", "MobileNetV3", "DenseNet", "ResNet, group norm", "ShuffleNet v1"])
def test_another_network_of_the_same_form_is_no_copy(name):
    base, apply = drawn(name, 0)
    other, _ = drawn(name, 5)
    images = np.zeros((2, 28, 28, 1), np.float32)
    with pytest.raises(errors.NothingMatched) as refusal:
        alignment.align(other, base, apply, images)
    assert refusal.value.attempt.report.similarity < 0.5


def test_a_wrong_graph_keeps_alignment_from_saying_that_a_suspect_is_no_copy(monkeypatch):
    base, apply = drawn("ViT", 0)
    images = np.zeros((2, 28, 28, 1), np.float32)
    right = alignment.trace_graph(apply, base, images)
    rotated = [space._replace(group="linear", ones=False) if space.ones else space for space in right.linear]
    monkeypatch.setattr("smark_jax.alignment.tracing.trace", lambda *_: right._replace(linear=tuple(rotated)))
    with pytest.raises(errors.Undecided, match="change the logits"):
        alignment.align(drawn("ViT", 5)[0], base, apply, images)


def test_a_rewritten_copy_without_the_ends_of_its_stream_is_undecided():
    base, apply = drawn("ViT", 0)
    images = np.zeros((2, 28, 28, 1), np.float32)
    graph = alignment.trace_graph(apply, base, images)
    suspect = attacks.rewrite(base, graph, jax.random.key(1))
    suspect = {name: leaf for name, leaf in suspect.items() if name not in ("patches", "positions", "head")}
    with pytest.raises(errors.Undecided, match="show too little"):
        alignment.align(suspect, base, apply, images)


@pytest.mark.parametrize("blocks", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [2, 0, 1]])
def test_blocks_go_where_the_base_has_them_in_whatever_order_an_axis_lists_them(blocks, order):
    rng = np.random.default_rng(0)
    leaf, matrices = rng.normal(size=(6, 5)), rng.normal(size=(3, 2, 2))
    entries = np.arange(6).reshape(3, 2, 1)[blocks]
    wanted = np.zeros_like(leaf)
    for block, source in enumerate(order):
        wanted[entries[block, :, 0]] = matrices[block].T @ leaf[entries[source, :, 0]]
    place = Place("leaf", 0, entries, False)
    found = gauge.mixed(leaf, place, gauge.fit(np.array(order), matrices, "linear"))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
