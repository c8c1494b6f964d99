"""The zoo: sizes, and for each architecture the property that makes it one, against NumPy or another library."""

import contextlib
import functools
import io
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("mlxtend")

from experiments.common import networks, zoo
from experiments.common.zoo import convolutional, mobile, transformers
from experiments.common.zoo.__main__ import main

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
REGISTRY = zoo.networks()


def filled(shapes):
    """Weights in place of drawn ones, which take long to compile; none of them zero, so that all parts count."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if leaf.ndim < 2:
            floor = 0.5 if "var" in jax.tree_util.keystr(path) else 0.1
            return (floor + rng.uniform(size=leaf.shape)).astype(np.float32)
        return rng.normal(size=leaf.shape, scale=2 * np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def shapes(name):
    init = networks.functional(REGISTRY[name].network).init
    return jax.eval_shape(lambda key: init(key, (28, 28, 1)), jax.random.key(0))


@functools.cache
def answers(name):
    """The compiled network."""
    return jax.jit(networks.functional(REGISTRY[name].network).apply_fn)


def layers(name):
    """The shapes of a linen network's weights by path."""
    tree = shapes(name)
    leaves = jax.tree_util.tree_flatten_with_path(tree.get("params", tree))[0]
    return {"/".join(str(step.key) for step in path): leaf.shape for path, leaf in leaves}


def variables(module, *inputs):
    """Weights of a block, which is initialised with these inputs and flags."""
    return filled(jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0)))


def run(module, params, x, *flags) -> Any:
    """The output, compiled as one."""
    return jax.jit(lambda params, x: module.apply(params, x, *flags))(params, x)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", REGISTRY)
def test_each_network_has_its_number_of_weights_and_answers_under_jit(name):
    params = filled(shapes(name))
    weights = params["params"] if "params" in params else params
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == REGISTRY[name].weights
    assert 30_000 < REGISTRY[name].weights < 120_000
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    apply = answers(name)
    logits = apply(params, IMAGES)
    assert logits.shape == (3, 10) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all() and np.ptp(logits, axis=0).min() > 1e-5  # other images, other logits
    # Each image is treated alone: batch norm uses what is stored.
    np.testing.assert_allclose(apply(params, IMAGES[[0, 0, 0]])[1], logits[0], rtol=1e-4, atol=1e-5)


def test_batch_norm_is_where_it_was_published():
    normed = {name for name in REGISTRY if "batch_stats" in shapes(name)}
    assert normed == {"ResNeXt", "DenseNet", "MobileNetV3", "EfficientNet", "ShuffleNet v1", "ShuffleNet v2"}


def test_vit_has_its_heads_apart_or_fused():
    apart, fused = layers("ViT"), layers("ViT, fused")
    for block in range(3):
        for part in ("query", "key", "value"):
            assert apart[f"blocks_{block}/attention/{part}/kernel"] == (48, 4, 12)
        assert apart[f"blocks_{block}/attention/out/kernel"] == (4, 12, 48)
        assert fused[f"blocks_{block}/attention/qkv/kernel"] == (48, 3 * 48)
    assert apart["positions"] == fused["positions"] == (1, 50, 48)
    assert layers("ViT, mean")["positions"] == (1, 49, 48) and "class_token" not in layers("ViT, mean")


def test_fused_attention_is_that_of_flax_with_its_kernels_in_one():
    x, params = normal(2, 5, 12), variables(transformers.FusedAttention(3), jnp.zeros((2, 5, 12)))["params"]
    apart = {}
    for number, part in enumerate(("query", "key", "value")):
        columns = slice(12 * number, 12 * (number + 1))
        kernel, bias = params["qkv"]["kernel"][:, columns], params["qkv"]["bias"][columns]
        apart[part] = {"kernel": kernel.reshape(12, 3, 4), "bias": bias.reshape(3, 4)}
    apart["out"] = {"kernel": params["out"]["kernel"].reshape(3, 4, 12), "bias": params["out"]["bias"]}
    ours = run(transformers.FusedAttention(3), {"params": params}, x)
    theirs = run(nn.MultiHeadDotProductAttention(3), {"params": apart}, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@functools.cache
def primitives(name):
    apply = networks.functional(REGISTRY[name].network).apply_fn
    return str(jax.make_jaxpr(apply)(shapes(name), IMAGES))


def test_a_class_token_is_tiled_or_broadcast_and_gelu_is_tanh_or_erf():
    assert "tile" in primitives("ViT") and "tile" not in primitives("ViT, fused")
    assert "tanh" in primitives("ViT") and "erf" not in primitives("ViT")
    assert "tanh" not in primitives("ViT, fused") and "erf" in primitives("ViT, fused")


@pytest.mark.parametrize(("name", "linen"), [("ViT, nnx", "ViT"), ("ConvNeXt, nnx", "ConvNeXt")])
def test_nnx_networks_are_those_of_linen(name, linen):
    params = filled(shapes(name))
    moved: dict = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        steps = [str(step.key) for step in path if hasattr(step, "key")]
        if steps[0] == "blocks":
            steps[:2] = [f"blocks_{steps[1]}"]
        node = moved
        for step in steps[:-1]:
            node = node.setdefault(step, {})
        node[steps[-1]] = leaf
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, shapes(linen))
    np.testing.assert_allclose(answers(name)(params, IMAGES), answers(linen)(moved, IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 3])
def test_swins_windows_are_those_of_attention_over_all_tokens_that_sees_some(shift):
    """In float64, without roll: tokens see each other if one window, moved down and right, holds both."""
    layer, x = transformers.WindowAttention(2, 7, shift), normal(1, 14, 14, 8)
    params = variables(layer, x)
    found = run(layer, params, x)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    tokens = np.asarray(x, np.float64).reshape(196, 8)
    q, k, v = np.split(tokens @ weights["qkv"]["kernel"] + weights["qkv"]["bias"], 3, axis=-1)
    row, column = np.divmod(np.arange(196), 14)
    window = ((row + 7 - shift) // 7) * 10 + (column + 7 - shift) // 7
    seen = window[:, None] == window[None, :]
    down, right = row[:, None] - row[None, :], column[:, None] - column[None, :]
    table = weights["relative_position_bias_table"]
    assert table.shape == (13 * 13, 2)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * (head + 1))
        bias = table[np.where(seen, (down + 6) * 13 + right + 6, 0), head]
        scores = np.where(seen, q[:, part] @ k[:, part].T / 2 + bias, -np.inf)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        heads.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
    expected = np.concatenate(heads, 1) @ weights["out"]["kernel"] + weights["out"]["bias"]
    np.testing.assert_allclose(found, expected.reshape(1, 14, 14, 8), rtol=1e-3, atol=1e-4)


def test_swin_merges_four_neighbours_and_rolls():
    tables = {path: shape for path, shape in layers("Swin").items() if path.endswith("table")}
    assert sorted(tables.values()) == [(169, 2), (169, 2), (169, 4), (169, 4)]
    assert layers("Swin")["merge/kernel"] == (4 * 24, 2 * 24) and "merge/bias" not in layers("Swin")
    assert primitives("Swin").count("_roll") >= 2  # there and back, in the one block that is shifted


def test_convnexts_blocks_are_depthwise_and_scaled():
    kernels = layers("ConvNeXt")
    assert [kernels[f"blocks_{block}/depthwise/kernel"] for block in (1, 2)] == [(7, 7, 1, 24), (7, 7, 1, 48)]
    assert kernels["blocks_3/layer_scale"] == (48,) and kernels["blocks_3/hidden/kernel"] == (48, 4 * 48)
    block, x = convolutional.ConvNeXtBlock(), normal(1, 8, 8, 4)
    params = variables(block, x)
    params["params"]["layer_scale"] = np.asarray([0, 0, 1, 1], np.float32)
    changed = np.ptp(run(block, params, x) - x, axis=(0, 1, 2))
    assert not changed[:2].any() and changed[2:].min() > 0.01


def test_resnexts_kernels_see_their_group_alone():
    grouped = [shape for path, shape in layers("ResNeXt").items() if "Conv_1/kernel" in path]
    assert grouped == [(3, 3, 32 // 8, 32)] * 2 + [(3, 3, 64 // 8, 64)] * 2


def test_densenets_layers_see_all_before_them():
    kernels = layers("DenseNet")
    assert [kernels[f"Conv_{layer}/kernel"][2] for layer in (1, 3, 5, 7, 8, 10, 12)] == [24, 36, 48, 60, 30, 42, 54]
    assert [kernels[f"BatchNorm_{layer}/scale"][0] for layer in (0, 2, 4)] == [24, 36, 48]  # before the convolution
    module, seen = convolutional.DenseNet(), []

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv):
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(module.apply, shapes("DenseNet"), IMAGES)
    assert [x.shape[1] for x in seen] == [28, *[14] * 7, *[7] * 6]


def bend(block, params, x, name):
    """How far a block's output is from affine in a convolution's kernel, relative to the output."""

    @jax.jit
    def output(factor):
        kernel = {"kernel": factor * params["params"][name]["kernel"]}
        return block.apply({**params, "params": {**params["params"], name: kernel}}, x, False)

    low, middle, high = output(-1.0), output(0.0), output(1.0)
    return np.abs(low + high - 2 * middle).max() / np.abs(high).max()


@pytest.mark.parametrize(
    ("act", "gate"), [(nn.hard_swish, nn.hard_sigmoid), (nn.silu, nn.sigmoid)], ids=["MobileNetV3", "EfficientNet"]
)
def test_inverted_residuals_end_linearly_and_add_their_input(act, gate):
    x = normal(2, 6, 6, 4)
    block = mobile.MBConv(3, 24, 4, 1, act, mobile.SqueezeExcite(6, nn.relu, gate, parent=None))
    params = variables(block, x, False)
    assert bend(block, params, x, "Conv_2") < 1e-5
    assert bend(block, params, x, "Conv_1") > 1e-3  # control: an activation follows
    # Without the excitation's weights, every channel is multiplied by the gate of 0, which is a half.
    excite, y = mobile.SqueezeExcite(6, nn.relu, gate), normal(1, 3, 3, 24)
    zeros = jax.tree.map(np.zeros_like, variables(excite, y))
    np.testing.assert_allclose(run(excite, zeros, y), y / 2, rtol=1e-6)
    silent = {**params, "params": {**params["params"], "Conv_2": {"kernel": np.zeros((1, 1, 24, 4), np.float32)}}}
    passed = np.asarray(run(block, silent, x, False) - x)
    np.testing.assert_allclose(passed, np.broadcast_to(passed[:1, :1, :1], passed.shape), atol=1e-5)


def test_phones_networks_have_their_kernels():
    kernels = layers("MobileNetV3")
    assert kernels["MBConv_1/Conv_0/kernel"] == (1, 1, 16, 72) and kernels["MBConv_1/Conv_1/kernel"] == (3, 3, 1, 72)
    assert kernels["MBConv_3/Conv_1/kernel"] == (5, 5, 1, 96)
    squeezes = [shape[-1] for path, shape in layers("EfficientNet").items() if "excite/Conv_0/kernel" in path]
    assert squeezes == [4, 4, 6, 6]  # a quarter of the blocks' inputs
    kernels = layers("ShuffleNet v1")
    assert kernels["ShuffleUnitV1_0/Conv_0/kernel"] == (1, 1, 24, 60)  # the first one is not grouped
    assert kernels["ShuffleUnitV1_3/Conv_0/kernel"] == (1, 1, 480 // 3, 120)
    assert kernels["ShuffleUnitV1_3/Conv_2/kernel"] == (1, 1, 120 // 3, 480)
    assert layers("ShuffleNet v2")["ShuffleUnitV2_1/Conv_0/kernel"] == (1, 1, 24, 24)  # half of 48


def test_the_shuffle_deals_out_channels_as_in_a_loop():
    x = np.asarray(normal(2, 1, 3, 12))
    expected = np.zeros_like(x)
    for group in range(3):
        for channel in range(4):
            expected[..., channel * 3 + group] = x[..., group * 4 + channel]
    np.testing.assert_array_equal(mobile.shuffle(jnp.asarray(x), 3), expected)


def influence(unit, x, groups):
    """Which groups of the input (columns) change which groups of the unit's output (rows)."""
    params = variables(unit, x, False)
    output = run(unit, params, x, False)
    reached = np.zeros((groups, groups), bool)
    width = x.shape[-1] // groups
    for group in range(groups):
        changed = x.at[..., group * width : (group + 1) * width].multiply(-2)
        change = run(unit, params, changed, False) - output
        reached[:, group] = np.abs(change).reshape(-1, groups, width).max(axis=(0, 2)) > 1e-6
    return reached


def test_shufflenets_units_mix_groups_and_would_not_without_the_shuffle(monkeypatch):
    unit, x = mobile.ShuffleUnitV1(72, 1, 3), normal(1, 4, 4, 72)
    assert influence(unit, x, 3).all()
    monkeypatch.setattr(mobile, "shuffle", lambda x, groups: x)
    np.testing.assert_array_equal(influence(unit, x, 3), np.eye(3, dtype=bool))


def test_shufflenet_v2_passes_half_of_the_channels_on_unchanged():
    unit, x = mobile.ShuffleUnitV2(8, 1), normal(1, 4, 4, 8)
    y = run(unit, variables(unit, x, False), x, False)
    np.testing.assert_array_equal(y[..., ::2], x[..., :4])  # dealt out to every second place
    assert np.abs(y[..., 1::2] - x[..., 4:]).max() > 0.1


def test_group_norm_takes_four_channels_at_a_time():
    @jax.jit
    def normalised(params, images):
        seen = []

        def note(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if isinstance(context.module, nn.GroupNorm):
                scale, bias = (context.module.get_variable("params", name) for name in ("scale", "bias"))
                seen.append((y - bias[None, None, None]) / scale[None, None, None])
            return y

        with nn.intercept_methods(note):
            convolutional.GroupNormResNet().apply({"params": params}, images)
        return seen

    seen = normalised(filled(shapes("ResNet, group norm")), IMAGES[:1])
    assert len(seen) == 9
    for y in seen:
        groups = y.reshape(-1, y.shape[-1] // 4, 4)
        np.testing.assert_allclose(groups.mean(axis=(0, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(groups.var(axis=(0, 2)), 1, atol=1e-2)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_convolutions_for_training_are_the_grouped_ones(groups):
    x, kernel = normal(2, 5, 5, 6), normal(3, 3, 6 // groups, 12)
    parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = [jax.lax.conv_general_dilated(a, b, (1, 1), "SAME", dimension_numbers=numbers) for a, b in parts]
    found = networks.ungrouped(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)
    np.testing.assert_allclose(found, np.concatenate(expected, -1), rtol=1e-4, atol=1e-5)


def test_training_alone_takes_groups_as_blocks_and_moves_statistics():
    functions, tree = networks.functional(REGISTRY["ResNeXt"].network), shapes("ResNeXt")
    rest = {"batch_stats": tree["batch_stats"]}
    trained = str(jax.make_jaxpr(functions.train_fn)(tree["params"], rest, IMAGES))
    assert "feature_group_count=8" not in trained and "feature_group_count=8" in primitives("ResNeXt")
    _, new = jax.eval_shape(functions.train_fn, tree["params"], rest, IMAGES)
    assert jax.tree.structure(new) == jax.tree.structure(rest)


@pytest.fixture
def few_digits(monkeypatch):
    few = [split._replace(images=split.images[:320], labels=split.labels[:320]) for split in networks.loaded()]
    monkeypatch.setattr(networks, "loaded", lambda dataset="mnist_5k": few)


def test_training_lowers_the_loss(few_digits):
    losses = []
    network = REGISTRY["ViT, nnx"].network
    subject = networks.train(network, 0, 2, lambda done, total, loss: losses.append(float(loss)))
    assert len(losses) == 10 and np.mean(losses[5:]) < 0.95 * np.mean(losses[:5])  # the second epoch
    assert jax.tree.structure(subject.base) == jax.tree.structure(shapes("ViT, nnx"))


def test_the_command_prints_a_table(few_digits):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["--only", "ViT, nnx", "--epochs", "1", "--images", "64", "--seed", "1"])
    (row,) = [line for line in out.getvalue().splitlines() if "88,666" in line]
    assert "%" in row and "Dosovitskiy" in row
