"""Suspects in other forms: layouts of each framework, fused and split leaves, folded batch norm, and many leaves.

Each suspect is made from a noisy copy of a base by NumPy as the framework stores it, and must come back as that copy.
"""

import time

import numpy as np
import pytest

from smark_jax import carriers, codes, embedding, errors, extraction, files, keys
from smark_jax.files import _content

HEADS, WIDTH = 4, 64


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def drawn(rng, **shapes):
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def noisy(leaves, rng, spread=0.1):
    return {n: leaf + spread * rng.normal(size=leaf.shape).astype(np.float32) for n, leaf in leaves.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


SHAPES = {
    "depthwise": (3, 3, 32, 1),
    "wide_depthwise": (3, 3, 16, 2),
    "conv": (3, 3, 16, 24),
    "flat_conv": (1, 7, 24, 24),
    "pointwise": (1, 1, 32, 48),
    "line": (5, 8, 12),
    "dense": (6 * 6 * 24, 10),
    "query": (WIDTH, HEADS, WIDTH // HEADS),
    "output": (HEADS, WIDTH // HEADS, WIDTH),
    "query_bias": (HEADS, WIDTH // HEADS),
    "token": (1, 1, WIDTH + 1),
}


def keras_as_pytorch(leaf, name):
    if name == "depthwise":
        return leaf.transpose(2, 3, 0, 1)
    if name == "wide_depthwise":
        return leaf.transpose(2, 3, 0, 1).reshape(32, 1, 3, 3)
    if name == "pointwise":
        return leaf[0, 0].T
    if name == "dense":
        return leaf.reshape(6, 6, 24, 10).transpose(3, 2, 0, 1).reshape(10, -1)
    if name == "query":
        return leaf.reshape(WIDTH, -1).T
    if name == "output":
        return leaf.reshape(-1, WIDTH).T
    return leaf.reshape(-1) if leaf.size < 100 else leaf.transpose(*range(2, leaf.ndim), 1, 0)[..., :, :]


def convolution(leaf):
    """HWIO or WIO as OIHW or OIW."""
    return leaf.transpose(leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))


def pytorch(leaves):
    found = {f"layer.{i}.weight": keras_as_pytorch(leaf, name) for i, (name, leaf) in enumerate(leaves.items())}
    for i, name in enumerate(leaves):
        if name in ("conv", "flat_conv", "line"):
            found[f"layer.{i}.weight"] = convolution(leaves[name])
    return found


def tflite(leaves):
    found = {f"StatefulPartitionedCall/{i}": leaf for i, leaf in enumerate(pytorch(leaves).values())}
    for i, (name, leaf) in enumerate(leaves.items()):
        if name == "wide_depthwise":
            found[f"StatefulPartitionedCall/{i}"] = leaf.reshape(1, 3, 3, 32)
        elif leaf.ndim == 4:
            found[f"StatefulPartitionedCall/{i}"] = leaf.transpose(3, 0, 1, 2)
        elif name == "dense":
            found[f"StatefulPartitionedCall/{i}"] = leaf.T
    return found


@pytest.mark.parametrize("stored", [pytorch, tflite])
def test_every_layout_of_a_framework_is_found_both_ways(stored, rng):
    base = drawn(rng, **SHAPES)
    copy = noisy(base, rng)
    same(files.match_layout(stored(copy), base).leaves, copy)
    same(files.match_layout(copy, stored(base)).leaves, stored(copy))


def test_a_layout_is_named_as_the_frameworks_name_it(rng):
    base = drawn(rng, **SHAPES)
    moves = {move.base: move.change for move in files.match_layout(tflite(noisy(base, rng)), base).moves}
    assert moves["conv"] == moves["depthwise"] == "OHWI to HWIO"
    assert (moves["line"], moves["dense"]) == ("OIW to WIO", "transposed")
    assert moves["token"] == "reshaped"


def test_a_dense_layer_is_a_convolution_of_the_whole_image(rng):
    base = drawn(rng, dense=(4 * 4 * 8, 10), head=(30, 10))
    copy = noisy(base, rng)
    whole = copy["dense"].reshape(4, 4, 8, 10).transpose(3, 2, 0, 1)
    same(files.match_layout({"a": whole, "b": copy["head"].T[:, :, None, None]}, base).leaves, copy)


def test_height_and_width_are_not_exchanged(rng):
    """The first kernel of a net for grey images: the axes of one channel leave no doubt which axes are of space."""
    kernel = {"kernel": np.ones((5, 5, 1, 32), np.float32)}
    swapped = rng.normal(size=(32, 1, 5, 5)).astype(np.float32)
    layout = files.match_layout({"weight": swapped}, kernel)
    np.testing.assert_array_equal(layout.leaves["kernel"], swapped.transpose(2, 3, 1, 0))


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "model.{}", "net._module.{}"])
def test_wrappers_leave_names_alone_wherever_they_are(wrapped, rng):
    base = drawn(rng, **{f"features.{i}.weight": (8, 8) for i in range(6)})
    copy = noisy(base, rng, spread=20)  # content tells nothing
    renamed = {wrapped.format(name).replace("features.3", "features._orig_mod.3"): leaf for name, leaf in copy.items()}
    same(files.match_layout(renamed, base).leaves, copy)
    same(
        files.match_layout(copy, {wrapped.format(name): leaf for name, leaf in base.items()}).leaves,
        {wrapped.format(name): leaf for name, leaf in copy.items()},
    )


def attention(rng, layers=3):
    sizes = {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}
    return drawn(rng, **{f"{i}/{n}/{role}": s for i in range(layers) for n in "qkv" for role, s in sizes.items()})


def fused(leaves, layers=3):
    found = {}
    for i in range(layers):
        found[f"x{i}.in_proj_weight"] = np.concatenate([leaves[f"{i}/{n}/kernel"].T for n in "qkv"])
        found[f"x{i}.in_proj_bias"] = np.concatenate([leaves[f"{i}/{n}/bias"] for n in "qkv"])
    return found


def test_queries_keys_and_values_in_one_leaf_or_three(rng):
    base = attention(rng)
    copy = noisy(base, rng)
    layout = files.match_layout(fused(copy), base)
    same(layout.leaves, copy)
    assert layout.unused == ()
    assert ("1/k/kernel", "x1.in_proj_weight", "part 2 of 3 of axis 0, transposed") in layout.moves
    layout = files.match_layout(copy, fused(base))
    same(layout.leaves, fused(copy))
    assert ("x1.in_proj_weight", "1/k/kernel", "transposed, part 2 of 3 of the base's leaf") in layout.moves


def test_a_part_that_the_suspect_lacks_reads_as_nothing(rng):
    base = attention(rng)
    copy = noisy(base, rng)
    without = {name: leaf for name, leaf in copy.items() if not name.startswith("1/k")}
    weight = files.match_layout(without, fused(base)).leaves["x1.in_proj_weight"]
    assert np.isnan(weight[WIDTH : 2 * WIDTH]).all() and np.isnan(weight).sum() == WIDTH * WIDTH
    np.testing.assert_array_equal(weight[:WIDTH], copy["1/q/kernel"].T)


def network(rng):
    """Kernels with batch norm; a suspect without norms has them in its kernels, as runtimes fold them."""
    kernels = {"conv": (3, 3, 16, 32), "depthwise": (3, 3, 1, 64), "dense": (64, 48)}
    base = drawn(rng, **{f"{name}/kernel": shape for name, shape in kernels.items()})
    factors = {name: np.exp(rng.normal(size=shape[-1])).astype(np.float32) for name, shape in kernels.items()}
    factors["depthwise"][:9] *= -1  # gains of either sign
    for name, shape in kernels.items():
        base |= {f"{name}_norm/{role}": 1 + 0.1 * rng.random(shape[-1], np.float32) for role in ("scale", "var")}
        base |= {f"{name}_norm/{role}": rng.normal(size=shape[-1]).astype(np.float32) for role in ("bias", "mean")}
    return base, factors


def test_folded_batch_norm_is_taken_out_of_a_kernel_and_a_mark_stays(rng):
    base, factors = network(rng)
    copy = noisy(base, rng, spread=0.03)
    stored = {f"onnx::Conv_{i}": copy[f"{name}/kernel"] * s for i, (name, s) in enumerate(factors.items())}
    stored = {name: leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T for name, leaf in stored.items()}
    layout = files.match_layout(stored, base)
    assert {move.base for move in layout.moves if "undone" in move.change} == {f"{name}/kernel" for name in factors}
    for name, factor in factors.items():
        ours, theirs, found = (leaves[f"{name}/kernel"] for leaves in (base, copy, layout.leaves))
        mark, read = (theirs - ours).ravel(), (found - ours).ravel()
        # The estimate takes one direction of a channel's 9 to 144, and nothing else of the mark.
        least = np.sqrt(1 - 1 / (ours.size / ours.shape[-1]))
        assert np.corrcoef(mark, read)[0, 1] > 0.97 * least
        control = np.corrcoef(mark, (theirs * factor - ours).ravel())[0, 1]
        assert control < 0.2  # as the kernel is stored, the factors drown the mark


def test_a_folded_copy_is_traced_and_nobody_else(rng):
    """The control is the same suspect with its factors left in."""
    base, factors = network(rng)
    base = {name: leaf for name, leaf in base.items() if name.endswith("kernel")}
    key, chips, serial = keys.from_bytes(bytes(32)), 64, 7
    mark, book = carriers.mark(key, base, chips), np.asarray(codes.codebook(key, range(2000), chips))
    copy = {name: np.asarray(leaf) for name, leaf in embedding.embed(base, mark, book[serial], 0.02).items()}
    folded = {name: leaf * factors[name.removesuffix("/kernel")] for name, leaf in copy.items()}

    def statistics(suspect):
        read = np.asarray(extraction.extract(suspect, base, mark), np.float64)
        return book @ read / np.linalg.norm(read)

    found = statistics(files.match_layout({f"w{i}": leaf for i, leaf in enumerate(folded.values())}, base).leaves)
    assert found[serial] > 0.9 * np.sqrt(chips)
    innocent = np.delete(found, serial)
    assert np.abs(innocent).max() < 5 and innocent.std() == pytest.approx(1, abs=0.1)
    assert abs(statistics(folded)[serial]) < 0.5 * np.sqrt(chips)


def test_a_dead_channel_whose_factor_content_cannot_tell_is_left_out_and_hides_no_other(rng):
    """Training leaves channels near zero; the mark is the larger part of them, and a factor of it would be huge."""
    base = drawn(rng, kernel=(3, 3, 16, 32))
    base["kernel"][..., :3] *= 1e-20
    copy = noisy(base, rng, spread=0.03)["kernel"]
    factors = np.exp(rng.normal(size=32)).astype(np.float32)
    found = files.match_layout({"onnx::Conv_1": copy * factors}, base).leaves["kernel"]
    assert np.isnan(found[..., :3]).all() and np.isfinite(found[..., 3:]).all()
    assert np.linalg.norm((found - copy)[..., 3:]) < 0.2 * np.linalg.norm((copy - base["kernel"])[..., 3:])


def test_a_base_with_folded_norms_reads_a_suspect_with_norms(rng):
    base, factors = network(rng)
    copy = noisy(base, rng, spread=0.03)
    ours, theirs = (
        {f"{name}.weight": leaves[f"{name}/kernel"] * s for name, s in factors.items()} for leaves in (base, copy)
    )
    plain = {f"k{i}": copy[f"{name}/kernel"] for i, name in enumerate(factors)}
    found = files.match_layout(plain, ours).leaves
    for name in ours:
        rest = np.linalg.norm(found[name] - theirs[name]) / np.linalg.norm(theirs[name] - ours[name])
        assert rest < 0.5


@pytest.mark.parametrize("attack", ["none", "noise", "pruned", "shrunk", "one huge channel", "fine-tuned"])
def test_no_factor_is_taken_out_of_a_copy_that_nobody_folded(attack, rng):
    base = drawn(rng, kernel=(3, 3, 16, 32))
    leaf = noisy(base, rng)["kernel"]
    if attack == "noise":
        leaf = leaf + rng.normal(size=leaf.shape).astype(np.float32)
    elif attack == "pruned":
        leaf = np.where(np.abs(leaf) < np.quantile(np.abs(leaf), 0.8), 0, leaf)
    elif attack == "shrunk":
        leaf = leaf * np.float32(0.9)
    elif attack == "one huge channel":
        leaf[..., 3] = 1e6
    elif attack == "fine-tuned":
        leaf = leaf + 0.3 * rng.normal(size=(32,)).astype(np.float32)
    same(files.match_layout({"kernel": leaf}, base).leaves, {"kernel": leaf})


def test_the_nearest_of_several_alike_is_taken(rng):
    """A checkpoint with averaged weights holds two copies of everything, and neither hides the other."""
    base = drawn(rng, **{f"l{i}.w": (16, 16) for i in range(8)})
    copy = noisy(base, rng)
    other = {f"ema.{i}": leaf for i, leaf in enumerate(noisy(copy, rng, 0.05).values())}
    layout = files.match_layout(other | {f"x{i}": leaf for i, leaf in enumerate(copy.values())}, base)
    same(layout.leaves, copy)


def test_copies_of_a_kernel_hide_none_where_other_names_agree(rng):
    base = drawn(rng, **{f"l{i}.{role}": shape for i in range(4) for role, shape in (("w", (16, 16)), ("b", (16,)))})
    copy = noisy(base, rng)
    other = {f"{i} {name}": leaf for i in range(3) for name, leaf in noisy(copy, rng, 0.05).items() if leaf.ndim > 1}
    renamed = {name if leaf.ndim == 1 else f"x.{name}": leaf for name, leaf in copy.items()}
    same(files.match_layout(other | renamed, base).leaves, copy)


def test_a_tensor_of_two_names_is_found_by_one(rng):
    base = drawn(rng, embedding=(40, 16), hidden=(16, 16))
    base |= {"head": base["embedding"], "ones": np.ones(40, np.float32), "ones_again": np.ones(40, np.float32)}
    copy = noisy(base, rng)
    layout = files.match_layout({"a": copy["embedding"], "b": copy["hidden"].T}, base)
    np.testing.assert_array_equal(layout.leaves["head"], copy["embedding"])
    assert layout.missing == ("ones", "ones_again")  # constants are no tie


def test_time_grows_with_the_number_of_leaves_and_not_with_its_square(rng, monkeypatch):
    """By the samples that are compared: of forty times as many leaves, not much more than forty times as many."""
    sampled = []
    honest = _content.directions
    monkeypatch.setattr(_content, "directions", lambda leaves, *a: sampled.append(len(leaves)) or honest(leaves, *a))
    base = drawn(rng, **{f"l{i}": (4, 4) for i in range(60)})
    copy = noisy(base, rng, 0.001)

    def number(junk):
        sampled.clear()
        leaves = rng.normal(size=(junk, 4, 4)).astype(np.float32)
        layout = files.match_layout({f"x{i}": leaf for i, leaf in enumerate([*leaves, *copy.values()])}, base)
        same(layout.leaves, copy)
        return sum(sampled)

    assert number(8_000) < 60 * number(200)


def test_too_many_equal_leaves_are_refused_in_a_moment(rng):
    junk = {f"x{i}": np.ones(4, np.float32) for i in range(30_000)}
    started = time.process_time()
    with pytest.raises(errors.Undecided, match="comparisons of layers"):
        files.match_layout(junk, {f"y{i}": np.ones(4, np.float32) for i in range(5_000)})
    assert time.process_time() - started < 5
