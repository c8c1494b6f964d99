"""Suspects in another form than the base's: what attackers write them by, and what alignment reads of them.

Networks of this module that take the other form say whether a rewrite is exact.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_alignment_groups import drawn

from experiments.common.networks import scaled
from experiments.common.zoo import transformers
from smark_jax import _trees, alignment, attacks, carriers, codes, embedding, errors, extraction, files, keys
from smark_jax.alignment import forms
from smark_jax.vault import reading

KEY = keys.from_bytes(bytes(32))
LENGTH = 320
IMAGES = np.random.default_rng(3).random((2, 28, 28, 1)).astype(np.float32)
EPSILON = 1e-5  # of batch norm


@pytest.fixture(autouse=True)
def _ranks_promoted():
    with jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def marked(name):
    base, apply = drawn(name, 0)
    mark = carriers.mark(keys.derive(KEY, "carrier"), base, LENGTH)
    word = codes.codebook(keys.derive(KEY, "code"), [7], LENGTH)[0]
    copy = embedding.embed(base, mark, word)

    def score(suspect):
        chips = np.asarray(extraction.extract(suspect, base, mark), np.float64)
        return float(np.asarray(word, np.float64) @ chips / np.linalg.norm(chips))

    return base, apply, alignment.trace_graph(apply, base, IMAGES), copy, score


def same(logits, others):
    assert np.abs(np.asarray(logits) - np.asarray(others)).max() < 1e-3 * np.ptp(logits)


def layer_norm(p, x, name, epsilon=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"] if f"{name}/scale" in p else x


def dense(p, x, name):
    kernel = p[f"{name}/kernel"]
    return x @ kernel.reshape(x.shape[-1], -1) + p[f"{name}/bias"].reshape(-1)


def vit(tree, images, tanh=True, heads=4):
    """The zoo's ViT with a class token, whose projections are fused or not, in any shape that holds their entries."""
    p = _trees.named("test", tree)
    x = jnp.stack([scaled(images)[:, r : r + 4, c : c + 4] for r in range(0, 28, 4) for c in range(0, 28, 4)], 1)
    x = x.reshape(*x.shape[:2], -1) @ p["patches/kernel"].reshape(16, -1) + p["patches/bias"]
    token = jnp.broadcast_to(p["class_token"].reshape(1, 1, -1), (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([token, x], 1) + p["positions"].reshape(1, -1, x.shape[-1])
    for block in range(3):
        at = f"blocks_{block}"
        y = layer_norm(p, x, f"{at}/norm1")
        if f"{at}/attention/qkv/kernel" in p:
            parts = jnp.split(dense(p, y, f"{at}/attention/qkv"), 3, -1)
        else:
            parts = [dense(p, y, f"{at}/attention/{part}") for part in ("query", "key", "value")]
        q, k, v = (part.reshape(*part.shape[:2], heads, -1) for part in parts)
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(q.shape[-1]))
        attended = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape)
        x = x + attended @ p[f"{at}/attention/out/kernel"].reshape(x.shape[-1], -1) + p[f"{at}/attention/out/bias"]
        y = jax.nn.gelu(dense(p, layer_norm(p, x, f"{at}/norm2"), f"{at}/mlp/hidden"), approximate=tanh)
        x = x + dense(p, y, f"{at}/mlp/out")
    return dense(p, layer_norm(p, x, "norm")[:, 0], "head")


def convolved(x, kernel, strides=1, padding="SAME"):
    groups = x.shape[-1] // kernel.shape[2]
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def convnext(tree, images):
    """The zoo's ConvNeXt, with depthwise kernels or dense ones, with or without gains."""
    p = _trees.named("test", tree)
    x = convolved(scaled(images), p["stem/kernel"], 2, "VALID") + p["stem/bias"]
    x = layer_norm(p, x, "stem_norm")
    for block in range(4):
        if block == 2:
            x = layer_norm(p, x, "downsample_norm")
            x = convolved(x, p["downsample/kernel"], 2, "VALID") + p["downsample/bias"]
        at = f"blocks_{block}"
        y = convolved(x, p[f"{at}/depthwise/kernel"]) + p[f"{at}/depthwise/bias"]
        y = dense(p, layer_norm(p, y, f"{at}/norm"), f"{at}/hidden")
        x = x + dense(p, jax.nn.gelu(y, approximate=False), f"{at}/out") * p.get(f"{at}/layer_scale", 1)
    return dense(p, layer_norm(p, x.mean((1, 2)), "norm"), "head")


VIT_NORMS = {f"blocks_{b}/norm2": [f"blocks_{b}/mlp/hidden/kernel"] for b in range(3)} | {"norm": ["head/kernel"]}
FUSED_NORMS = VIT_NORMS | {f"blocks_{b}/norm1": [f"blocks_{b}/attention/qkv/kernel"] for b in range(3)}
SPLIT_NORMS = VIT_NORMS | {
    f"blocks_{b}/norm1": [f"blocks_{b}/attention/{part}/kernel" for part in ("query", "key", "value")] for b in range(3)
}
CONVNEXT_NORMS = {f"blocks_{b}/norm": [f"blocks_{b}/hidden/kernel"] for b in range(4)} | {"norm": ["head/kernel"]}
SCALES = {f"blocks_{b}/layer_scale": f"blocks_{b}/out/kernel" for b in range(4)}

FORMS = {
    "heads joined": ("ViT", attacks.join_heads, vit),
    "fused": ("ViT", lambda p: attacks.fuse_projections(attacks.join_heads(p)), vit),
    "split": ("ViT, fused", attacks.split_projections, functools.partial(vit, tanh=False)),
    "split into heads": (
        "ViT, fused",
        lambda p: attacks.split_heads(attacks.split_projections(p), 4),
        functools.partial(vit, tanh=False),
    ),
    "layer norms merged": ("ViT", lambda p: attacks.merge_layer_norm(p, SPLIT_NORMS), vit),
    "layer norms merged, fused": (
        "ViT, fused",
        lambda p: attacks.merge_layer_norm(p, FUSED_NORMS),
        functools.partial(vit, tanh=False),
    ),
    "layer norms merged, then fused": (
        "ViT",
        lambda p: attacks.fuse_projections(attacks.join_heads(attacks.merge_layer_norm(p, SPLIT_NORMS))),
        vit,
    ),
    "layer scale merged": ("ConvNeXt", lambda p: attacks.merge_gains(p, SCALES), convnext),
    "layer scale and norms merged": (
        "ConvNeXt",
        lambda p: attacks.merge_layer_norm(attacks.merge_gains(p, SCALES), CONVNEXT_NORMS),
        convnext,
    ),
    "dense as pointwise": (
        "ConvNeXt",
        lambda p: attacks.unflatten_pointwise(p, "hidden/kernel|out/kernel"),
        convnext,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_rewritten_copy_in_another_form_keeps_the_logits_and_shows_its_mark(form):
    name, change, network = FORMS[form]
    base, apply, graph, copy, score = marked(name)
    moved = attacks.rewrite(copy, graph, jax.random.key(2))
    assert abs(score(moved)) < 5  # the control: without alignment
    suspect = change(moved)
    same(apply(copy, IMAGES), network(suspect, IMAGES))
    aligned, report = alignment.align(suspect, base, apply, IMAGES)
    assert score(aligned) > 16
    assert set(report.left_out) == _trees.named("test", base).keys() - _trees.named("test", suspect).keys() - set(
        report.changed
    )


@pytest.mark.parametrize("form", [form for form in FORMS if "merged" in form])
def test_merged_gains_that_are_not_ones_count_as_merged(form):
    name, change, network = FORMS[form]
    base, apply, _, copy, score = marked(name)
    suspect = change(copy)
    same(apply(copy, IMAGES), network(suspect, IMAGES))
    aligned, report = alignment.align(suspect, base, apply, IMAGES)
    assert report.similarity > 0.99 and score(aligned) > 16
    assert (name == "ConvNeXt") == (not report.merged)


MOBILE = {f"MBConv_{b}/BatchNorm_{n}": f"MBConv_{b}/Conv_{n}/kernel" for b in (1, 2, 3) for n in range(3)}
MOBILE |= {f"BatchNorm_{n}": f"Conv_{n}/kernel" for n in range(2)}


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_copy_without_batch_norm_shows_its_mark(rewritten):
    base, apply, graph, copy, score = marked("MobileNetV3")
    moved = attacks.rewrite(copy, graph, jax.random.key(2)) if rewritten else copy
    assert (abs(score(moved)) < 5) == rewritten
    suspect = attacks.merge_batch_norm(moved, MOBILE)
    leaves = _trees.named("test", suspect)
    for norm, kernel in MOBILE.items():  # the network of the base, whose batch norms only add a bias
        bias = leaves.pop(f"params/{kernel.removesuffix('kernel')}bias")
        ones = np.ones_like(bias)
        leaves |= {f"params/{norm}/scale": ones, f"params/{norm}/bias": bias}
        leaves |= {f"batch_stats/{norm}/mean": 0 * ones, f"batch_stats/{norm}/var": ones - EPSILON}
    same(apply(copy, IMAGES), apply(files.nest(leaves), IMAGES))
    assert score(alignment.align(suspect, base, apply, IMAGES).params) > 16


def test_pointwise_convolutions_as_dense_layers_show_their_mark():
    base, apply, graph, copy, score = marked("MobileNetV3")
    moved = attacks.rewrite(copy, graph, jax.random.key(2))
    suspect = attacks.flatten_pointwise(moved)
    flat = _trees.named("test", suspect)["params/MBConv_1/Conv_2/kernel"]
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 72)).astype(np.float32)
    kernel = _trees.named("test", moved)["params/MBConv_1/Conv_2/kernel"]
    np.testing.assert_allclose(x @ flat, convolved(x, kernel), atol=1e-4)
    aligned, report = alignment.align(suspect, base, apply, IMAGES)
    assert report.changed["params/MBConv_1/Conv_2/kernel"] == "reshaped from (72, 24)"
    assert "params/MBConv_1/Conv_2/kernel (reshaped from (72, 24))" in str(report)
    assert score(aligned) > 16


@pytest.mark.parametrize(("name", "form"), [("ViT", "fused"), ("ViT, fused", "split")])
def test_leaves_of_other_names_and_another_form_are_paired(name, form):
    base, apply, _, copy, score = marked(name)
    leaves = _trees.named("test", FORMS[form][1](copy))
    renamed = {f"net/{path.replace('blocks', 'layer').replace('hidden', 'up')}": leaf for path, leaf in leaves.items()}
    aligned, report = alignment.align(renamed, base, apply, IMAGES)
    assert report.left_out == () and score(aligned) > 16


def test_dense_kernels_do_what_grouped_ones_did():
    _, apply, _, copy, _ = marked("ConvNeXt")
    suspect = attacks.densify(copy, apply, IMAGES)
    assert _trees.named("test", suspect)["blocks_0/depthwise/kernel"].shape == (7, 7, 24, 24)
    same(apply(copy, IMAGES), convnext(suspect, IMAGES))
    rng = np.random.default_rng(0)
    params = {"grouped": rng.normal(size=(3, 3, 4, 12)).astype(np.float32)}
    images = rng.normal(size=(2, 6, 6, 8)).astype(np.float32)
    grouped = lambda p, x: convolved(x, p["grouped"]).mean((1, 2))  # noqa: E731
    dense = attacks.densify(params, grouped, images)
    assert dense["grouped"].shape == (3, 3, 8, 12)
    same(grouped(params, images), grouped(dense, images))


def test_heads_split_again_are_those_of_before():
    _, _, _, copy, _ = marked("ViT")
    again = attacks.split_heads(attacks.split_projections(FORMS["fused"][1](copy)), 4)
    jax.tree.map(np.testing.assert_array_equal, again, copy)


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt", "MobileNetV3"])
def test_what_all_logits_share_is_removed(name):
    base, apply, graph, copy, score = marked(name)
    suspect = attacks.shift_logits(copy, apply, IMAGES, jax.random.key(1), 30.0)
    suspect = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 5 if jax.tree_util.keystr(path).count("head") and leaf.ndim == 1 else leaf, suspect
    )
    ours, theirs = (jax.nn.softmax(apply(tree, IMAGES)) for tree in (copy, suspect))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    (kernel,) = (path for path, axis in graph.logits if axis == 1)

    def away(tree):  # relative to the mark, of which one part in as many as there are classes is lost
        own, there, here = (np.asarray(_trees.named("test", some)[kernel]) for some in (base, copy, tree))
        return float(np.linalg.norm(here - there) / np.linalg.norm(there - own))

    assert away(suspect) > 100  # the control: without alignment
    aligned = alignment.align(suspect, base, apply, IMAGES).params
    assert away(aligned) < 0.6 and score(aligned) > 16
    moved = attacks.rewrite(suspect, graph, jax.random.key(2))
    assert score(alignment.align(moved, base, apply, IMAGES).params) > 16


def test_probabilities_have_no_logits():
    base, apply, *_ = marked("ViT")
    bent = alignment.trace_graph(lambda p, x: jnp.tanh(apply(p, x)), base, IMAGES)
    assert bent.logits == frozenset()


@pytest.mark.parametrize("kind", ["zero", "clique", "split"])
@pytest.mark.parametrize(("name", "network"), [("ViT", vit), ("ConvNeXt", convnext)])
def test_dummy_units_of_transformers_leave_the_function_alone_and_are_removed(name, network, kind):
    base, apply, graph, copy, score = marked(name)
    wide = attacks.add_neurons(attacks.rewrite(copy, graph, jax.random.key(2)), graph, jax.random.key(1), 0.2, kind)
    shapes = jax.tree.map(lambda a, b: a.shape != b.shape, wide, base)
    changed = {path for path, other in _trees.named("test", shapes).items() if other}
    assert {path.rpartition("/")[0].rpartition("/")[2] for path in changed} == {"hidden", "out"}
    same(apply(copy, IMAGES), network(wide, IMAGES))
    assert score(alignment.align(wide, base, apply, IMAGES).params) > 16


def test_group_norm_has_no_room_for_dummy_units():
    base, _, graph, _, _ = marked("ResNet, group norm")
    with pytest.raises(ValueError, match="add_neurons: expected channels of which nothing takes a mean"):
        attacks.add_neurons(base, graph, jax.random.key(1))


class Sized(nn.Module):
    """The zoo's ViT with a tiled class token, in any size."""

    width: int = 48
    heads: int = 4
    blocks: int = 3
    fused: bool = False

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.width, (4, 4), strides=(4, 4), padding="VALID", name="patches")(scaled(images))
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for block in range(self.blocks):
            x = transformers.Encoder(self.heads, self.fused, name=f"blocks_{block}")(x)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"width": 64}, "64 channels where the base has 48"),
        ({"heads": 2}, r"is \(48, 2, 24\), not \(48, 4, 12\) \(other heads"),
        ({"blocks": 2}, r"16 of 56 leaves are missing \('blocks_2/"),
    ],
)
def test_networks_of_another_size_are_undecided_and_the_error_says_what_differs(size, words):
    base, apply, *_ = marked("ViT")
    other = Sized(**size).init(jax.random.key(9), IMAGES)["params"]
    with pytest.raises(errors.Undecided, match=words) as refusal:
        alignment.align(other, base, apply, IMAGES)
    assert "files.match_layout" in str(refusal.value)


def test_a_head_that_is_wider_inside_is_left_out_and_the_rest_aligned():
    base, apply, graph, copy, score = marked("ViT")
    leaves = _trees.named("test", attacks.rewrite(copy, graph, jax.random.key(2)))
    rng = np.random.default_rng(1)
    for name, axis in (("value/kernel", 2), ("value/bias", 1), ("out/kernel", 1)):
        leaf = leaves[path := f"blocks_0/attention/{name}"]
        more = np.zeros_like(np.take(leaf, [0, 1], axis)) if name == "out/kernel" else np.take(leaf, [0, 1], axis)
        leaves[path] = np.concatenate([leaf, more * rng.normal()], axis).astype(np.float32)
    same(apply(copy, IMAGES), wider_values(leaves))
    aligned, report = alignment.align(files.nest(leaves), base, apply, IMAGES)
    assert set(report.left_out) == {f"blocks_0/attention/{n}" for n in ("value/kernel", "value/bias", "out/kernel")}
    assert score(aligned) > 15


def wider_values(leaves):
    """The ViT whose first block has two channels more in each head's values: its products with ``out`` are the same."""
    cut = dict(leaves)
    value, bias, out = (leaves[f"blocks_0/attention/{n}"] for n in ("value/kernel", "value/bias", "out/kernel"))
    np.testing.assert_allclose(
        np.einsum("dhe,hef->dhf", value, out), np.einsum("dhe,hef->dhf", value[..., :12], out[:, :12]), atol=1e-5
    )
    cut |= {
        "blocks_0/attention/value/kernel": value[..., :12],
        "blocks_0/attention/value/bias": bias[:, :12],
        "blocks_0/attention/out/kernel": out[:, :12],
    }
    return vit(cut, IMAGES)


@pytest.mark.parametrize(
    ("whole", "part", "lead"),
    [
        ((48, 144), (48, 4, 12), 48),
        ((48, 3, 4, 12), (48, 48), 48),
        ((48, 4, 3, 12), (48, 4, 12), 192),
        ((144, 48), (48, 48), 1),
        ((144,), (4, 12), 1),
        ((48, 144), (48, 36), None),
        ((12, 12), (12, 4), 12),
    ],
)
def test_where_three_parts_lie_follows_from_shapes(whole, part, lead):
    assert forms._lead(whole, part) == lead


def test_the_desk_reads_a_rewritten_copy_in_another_form_by_alignment_only():
    base, apply, graph, copy, _ = marked("ViT")
    mark = carriers.mark(keys.derive(KEY, "carrier"), base, LENGTH)
    word = np.asarray(codes.codebook(keys.derive(KEY, "code"), [7], LENGTH)[0], np.float64)
    suspect = attacks.join_heads(attacks.rewrite(copy, graph, jax.random.key(1)))

    def statistic(aligner):
        flat = (files.flatten(tree) for tree in (suspect, base))
        chips = reading.read(*flat, mark, reading.Reading(aligner)).chips
        return float(word @ chips / np.linalg.norm(chips))

    assert statistic(reading.Aligner("ours", apply, IMAGES)) > 16
    assert abs(statistic(None)) < 5
