"""Shapes: scales from sensitivities, coordinates, and the weighted reading, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from smark_jax import carriers, codes, embedding, errors, extraction, keys
from smark_jax.carriers import inputs, shapes

RNG = np.random.default_rng(0)
KEY, M = keys.from_bytes(bytes(32)), 64
WORDS = np.asarray(codes.codebook(KEY, range(40), M))
BASE = {
    "a": {"bias": jnp.float32(RNG.normal(0, 0.1, 40)), "kernel": jnp.float32(RNG.normal(0, 0.1, (240, 40)))},
    "b": {"kernel": jnp.float32(RNG.normal(0, 0.2, (40, 50)))},
    "head": {"kernel": jnp.float32(RNG.normal(0, 0.2, (50, 5)))},
}
# The inputs lie in six directions, so that the first kernel, which has most of the weights, has six as coordinates.
IMAGES = np.float32(RNG.normal(size=(24, 6)) @ RNG.normal(size=(6, 240)))


def apply_fn(params, x):
    x = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.tanh(x @ params["b"]["kernel"]) @ params["head"]["kernel"]


SHAPE = carriers.shape(BASE, apply_fn, IMAGES)
MARK = carriers.mark(KEY, BASE, M, shape=SHAPE)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def sizes_of(one: carriers.Scales) -> np.ndarray:
    rows, columns, floor, cap = (np.asarray(x, np.float64) for x in (one.rows, one.columns, one.floor, one.cap))
    return np.minimum((rows * columns + floor) ** -0.5, cap)


def scales() -> dict:
    return {leaf.path: one for leaf, one in MARK.shape}


def test_the_head_does_not_carry_and_directions_are_few():
    by_path = scales()
    assert sorted(by_path) == ["a/bias", "a/kernel", "b/kernel"]
    basis = np.asarray(by_path["a/kernel"].basis, np.float64)
    assert basis.shape[1] <= 6 and by_path["b/kernel"].basis is None
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
    outside = IMAGES - IMAGES @ basis @ basis.T
    assert np.square(outside).sum() < 0.011 * np.square(IMAGES).sum()


def test_no_directions_where_the_network_as_a_whole_uses_most_of_its_own():
    """Six directions of 60 inputs, but the other kernel has almost half of the weights."""
    small = {**BASE, "a": {**BASE["a"], "kernel": BASE["a"]["kernel"][:60]}}
    found = carriers.shape(small, apply_fn, IMAGES[:, :60])
    assert all(one.basis is None for _, one in found)


def test_scales_are_those_of_the_gauss_newton_diagonal():
    """Against all gradients, one class and image at a time, without random signs."""
    outputs = np.asarray(apply_fn(BASE, IMAGES), np.float64)
    power = np.square(outputs - outputs.mean(axis=1, keepdims=True)).sum(axis=1).mean()
    centred = lambda kernel, x: (lambda z: z - z.mean())(apply_fn({**BASE, "b": {"kernel": kernel}}, x[None])[0])  # noqa: E731
    slopes = jax.vmap(jax.jacrev(centred), (None, 0))(BASE["b"]["kernel"], IMAGES)  # [N, classes, 40, 50]
    exact = np.square(np.asarray(slopes, np.float64)).sum(axis=1).mean(axis=0)
    model = exact.sum(1, keepdims=True) * exact.sum(0, keepdims=True) / exact.sum() + 0.03 * exact.mean()
    found = sizes_of(scales()["b/kernel"])
    ratio = found / model**-0.5  # a, the same for all coordinates, but for few passes
    assert np.std(np.log(ratio)) < 0.25
    control = found / np.full_like(model, model.mean()) ** -0.5
    assert np.std(np.log(control)) > 1.5 * np.std(np.log(ratio))
    number = MARK.shape.num_coordinates
    np.testing.assert_allclose(np.median(ratio), np.sqrt(power / number), rtol=0.2)


def test_strength_is_the_relative_change_of_the_logits():
    outputs = np.asarray(apply_fn(BASE, IMAGES), np.float64)
    outputs -= outputs.mean(axis=1, keepdims=True)
    changes = []
    for word in WORDS[:8]:
        moved = np.asarray(apply_fn(embedding.embed(BASE, MARK, word), IMAGES), np.float64)
        moved -= moved.mean(axis=1, keepdims=True)
        changes.append(np.square(moved - outputs).sum() / np.square(outputs).sum())
    assert 0.005 < np.sqrt(np.mean(changes)) < 0.02  # the default strength is 0.01


@functools.cache
def kept() -> np.ndarray:
    return reference.carrier_matrix(*map(np.asarray, MARK.carrier.arrays), MARK.carrier.num_weights)


def dense() -> np.ndarray:
    """X for the coordinates of all leaves, zero where one is left out, in float64."""
    total, counts, matrix = MARK.carrier.num_weights, MARK.shape.counts, kept()
    parts, start, end = [], 0, 0
    for count in counts:
        begin, end = end, end + count
        size = end * total // sum(counts) - begin * total // sum(counts)
        parts.append(np.pad(matrix[:, start : start + size], ((0, 0), (0, count - size))))
        start += size
    return np.concatenate(parts, axis=1)


def test_embed_in_float64():
    copy = embedding.embed(BASE, MARK, WORDS[1], 0.02)
    z = 0.02 * np.sqrt(MARK.carrier.num_weights / M) * WORDS[1].astype(np.float64) @ dense()
    start = 0
    for (leaf, one), count in zip(MARK.shape, MARK.shape.counts, strict=True):
        change = sizes_of(one) * z[start : start + count].reshape(one.coordinates(leaf))
        if one.basis is not None:
            change = np.asarray(one.basis, np.float64) @ change
        name, last = leaf.path.split("/")
        expected = np.asarray(BASE[name][last], np.float64) + change
        np.testing.assert_allclose(copy[name][last], expected, atol=3e-6 * np.abs(expected).max())
        start += count
    np.testing.assert_array_equal(copy["head"]["kernel"], BASE["head"]["kernel"])


def test_what_a_carrier_leaves_out_is_spread_over_all_leaves():
    share = MARK.carrier.num_weights / MARK.shape.num_coordinates
    assert 0.98 < share < 1
    kept = shapes.kept(MARK.shape, MARK.carrier.num_weights)
    assert sum(kept) == MARK.carrier.num_weights
    for count, size in zip(kept, MARK.shape.counts, strict=True):
        assert abs(count - share * size) < 1
    many = carriers.hadamard.even(2048 * 64 + 2000, 64)
    assert many == (64, 2048)
    assert carriers.hadamard.even(2048 * 3 + 2000, 64) == (3, 2688)


def weighted(suspect) -> np.ndarray:
    """The reading of the kernels in float64 NumPy: for shifts within bounds."""
    strength, values, weights = float(MARK.strength), [], []
    suspect, base = float64(suspect), float64(BASE)
    for leaf, one in MARK.shape:
        name, last = leaf.path.split("/")
        basis = np.eye(leaf.shape[0]) if one.basis is None else np.asarray(one.basis, np.float64)
        if last == "bias":
            values.append(np.zeros(leaf.size))
            weights.append(np.zeros(leaf.size))
            continue
        shift = basis.T @ (suspect[name][last] - base[name][last]) / sizes_of(one)
        own = basis.T @ base[name][last] / sizes_of(one)
        shift -= own * ((own * shift).sum(1) / (own * own).sum(1))[:, None]  # at least 32 columns
        square = np.square(shift)
        noise = np.full_like(square, square.mean())
        noise *= (square.mean(1, keepdims=True) / square.mean() + 0.1) / 1.1
        if len(square) >= 32:
            noise *= (square.mean(0, keepdims=True) / square.mean() + 0.1) / 1.1
        weight = np.minimum(strength**2 / noise, 1)
        values.append((weight * shift).reshape(-1))
        weights.append(weight.reshape(-1))
    values, weights, matrix = np.concatenate(values), np.concatenate(weights), dense()
    return matrix @ values / weights.mean()


def noisy(copy, seed=1, size=0.03):
    rng = np.random.default_rng(seed)
    add = lambda leaf: leaf + jnp.float32(size * np.asarray(leaf).std() * rng.normal(size=leaf.shape))  # noqa: E731
    return jax.tree.map(add, copy)


def test_extract_in_float64():
    for suspect in (embedding.embed(BASE, MARK, WORDS[0]), noisy(embedding.embed(BASE, MARK, WORDS[0]), size=2e-3)):
        assert extraction.coverage(suspect, BASE, MARK).bounded == 0
        found = np.asarray(extraction.extract(suspect, BASE, MARK), np.float64)
        expected = weighted(suspect)
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def statistic(chips, word) -> float:
    chips = np.asarray(chips, np.float64)
    return float(chips @ word / np.linalg.norm(chips))


def test_an_intact_copy_reads_its_word_and_huge_and_missing_weights_are_left_out():
    copy = embedding.embed(BASE, MARK, WORDS[0])
    assert statistic(extraction.extract(copy, BASE, MARK), WORDS[0]) > 0.98 * M**0.5
    kernel = np.array(copy["b"]["kernel"])
    kernel[3], kernel[5, 2], kernel[6, :9] = 1e18, np.nan, np.inf
    odd = {**copy, "b": {"kernel": kernel}}
    assert statistic(extraction.extract(odd, BASE, MARK), WORDS[0]) > 0.9 * M**0.5
    read = extraction.coverage(odd, BASE, MARK)
    assert read.bounded == 50 and "b/kernel (10: NaN or infinite)" in str(read)
    first = np.array(copy["a"]["kernel"])
    first[:2] = 1e18  # two inputs, of which every direction has a part
    assert statistic(extraction.extract({**copy, "a": {**copy["a"], "kernel": first}}, BASE, MARK), WORDS[0]) > 5


def test_vectors_are_written_and_read_apart():
    copy = embedding.embed(BASE, MARK, WORDS[0])
    assert (copy["a"]["bias"] != BASE["a"]["bias"]).any()
    only = {**BASE, "a": {**BASE["a"], "bias": copy["a"]["bias"]}}
    np.testing.assert_array_equal(extraction.extract(only, BASE, MARK), np.zeros(M))
    assert statistic(extraction.extract_vectors(only, BASE, MARK), WORDS[0]) > 3
    alone = {"a": {"bias": copy["a"]["bias"]}}  # whoever hides the kernels is not told "nobody"
    assert extraction.coverage(alone, BASE, MARK).read == 0
    kernels = sum(leaf.size for leaf in MARK.spec.leaves if len(leaf.shape) > 1)
    assert extraction.coverage(copy, BASE, MARK).read == kernels
    with pytest.raises(ValueError, match="extract_vectors: expected a mark with a shape"):
        extraction.extract_vectors(only, BASE, carriers.mark(KEY, BASE, M))


def test_embedding_is_linear_and_composes_with_jit_vmap_and_grad():
    copies = jax.vmap(lambda word: embedding.embed(BASE, MARK, word))(WORDS[:3])
    batch = embedding.embed_batch(BASE, MARK, WORDS[:3])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), copies["b"], batch["b"])
    plus, minus = embedding.embed(BASE, MARK, WORDS[0]), embedding.embed(BASE, MARK, -WORDS[0])
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x + y, 2 * z, atol=2e-6), plus, minus, BASE)
    read = jax.jit(extraction.extract)
    together = extraction.extract_batch(batch, BASE, MARK)
    for row, word in enumerate(WORDS[:3]):
        one = read(embedding.embed(BASE, MARK, word), BASE, MARK)
        np.testing.assert_allclose(together[row], one, atol=1e-5)
    gradient = jax.grad(lambda suspect: extraction.extract(suspect, BASE, MARK) @ jnp.float32(WORDS[0]))(noisy(plus))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["b"]["kernel"]).max() > 0 and not gradient["head"]["kernel"].any()


def test_a_shape_is_stored_committed_to_and_checked():
    again = carriers.shape(BASE, apply_fn, IMAGES)
    assert again.digest() == SHAPE.digest()
    arrays = SHAPE.to_arrays()
    restored = carriers.Shape.from_arrays(dict(reversed(arrays.items())))
    assert restored.digest() == SHAPE.digest()
    mark = carriers.mark(KEY, BASE, M, shape=restored)
    jax.tree.map(
        np.testing.assert_array_equal, embedding.embed(BASE, mark, WORDS[0]), embedding.embed(BASE, MARK, WORDS[0])
    )
    for name in arrays:
        changed = dict(arrays)
        changed[name] = arrays[name] + 1 if arrays[name].size else np.asarray([0], np.int32)
        try:
            other = carriers.Shape.from_arrays(changed)
        except errors.SmarkError:
            continue
        assert other.digest() != SHAPE.digest(), name
    with pytest.raises(errors.SmarkError, match=r"Shape\.from_arrays: expected the arrays of leaf 'b/kernel'"):
        carriers.Shape.from_arrays({"b/kernel:rows": arrays["b/kernel:rows"]})


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="shape: expected apply_fn and images together"):
        carriers.shape(BASE, apply_fn)
    with pytest.raises(ValueError, match="shape: expected a network that takes base and images"):
        carriers.shape(BASE, apply_fn, IMAGES[:, :3])
    with pytest.raises(ValueError, match="shape: expected finite outputs"):
        carriers.shape(BASE, lambda params, x: jnp.log(-1 - apply_fn(params, x) ** 2), IMAGES)
    with pytest.raises(ValueError, match="shape: expected a kernel, besides the last"):
        carriers.shape(BASE, lambda params, x: x[:, :50] @ params["head"]["kernel"], IMAGES)
    other = {**BASE, "b": {"kernel": jnp.ones((40, 51))}}
    with pytest.raises(ValueError, match=r"mark: expected scales for leaf 'b/kernel' of shape \(40, 51\)"):
        carriers.mark(KEY, other, M, shape=SHAPE)
    with pytest.raises(ValueError, match="extract: expected a mark without a shape to rectify"):
        extraction.extract(BASE, BASE, MARK, rectify=True)


def test_weights_alone_give_a_conservative_shape_without_the_head():
    base = {**BASE, "head": {"bias": jnp.ones(5) * 0.3, "kernel": BASE["head"]["kernel"]}}
    found = {leaf.path: sizes_of(one).max() for leaf, one in carriers.shape(base)}
    assert "head/kernel" not in found
    weights = {path: float64(base)[path.split("/")[0]][path.split("/")[1]] for path in found}
    share = {path: found[path] / np.sqrt(np.square(weights[path]).mean()) for path in found}
    assert {"a/kernel", "b/kernel", "a/bias"} <= share.keys()
    assert sum(one**2 for one in share.values()) == pytest.approx(1, rel=1e-4)
    assert share["a/kernel"] / share["b/kernel"] == pytest.approx((9600 / 2000) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_are_those_that_the_kernel_multiplies(transposed):
    """Convolutions in both layouts and a dense layer after a reshape: inputs times kernel is the layer's output."""
    numbers = ("NHWC", "OIHW" if transposed else "HWIO", "NHWC")
    conv = RNG.normal(size=(4, 3, 2, 5) if transposed else (2, 5, 3, 4)).astype(np.float32)
    params = {"conv": jnp.asarray(conv), "dense": jnp.float32(RNG.normal(size=(7, 6, 4)))}
    outputs = []

    def network(params, x):
        y = jax.lax.conv_general_dilated(x, params["conv"], (2, 1), "SAME", dimension_numbers=numbers)
        z = jnp.tanh(y).mean(axis=(1, 2)) @ params["dense"].reshape(42, 4).T
        outputs[:] = [y, z]
        return z

    images, seen = jnp.float32(RNG.normal(size=(2, 6, 5, 3))), {}
    inputs.interpret(network, params, images, lambda site: seen.update({site.path: (site.rows, site.inputs(99))}))
    network(params, images)
    for path, y in zip(("conv", "dense"), outputs, strict=True):
        rows, found = seen[path]
        leaf = np.asarray(params[path], np.float64)
        matrix = np.moveaxis(leaf, rows, range(len(rows))).reshape(found.shape[1], -1)
        np.testing.assert_allclose(np.asarray(found, np.float64) @ matrix, y.reshape(-1, matrix.shape[1]), atol=1e-4)
    assert seen["conv"][0] == ((1, 2, 3) if transposed else (0, 1, 2)) and seen["dense"][0] == (2,)


def test_depthwise_convolutions_are_interpreted_as_they_are_run():
    x = jnp.float32(RNG.normal(size=(2, 9, 8, 6)))
    for kernel, numbers, options in (
        (RNG.normal(size=(3, 2, 1, 6)), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME", "window_strides": (2, 1)}),
        (RNG.normal(size=(6, 1, 3, 3)), ("NHWC", "OIHW", "NCHW"), {"padding": "VALID", "window_strides": (1, 2)}),
        (
            RNG.normal(size=(3, 3, 1, 6)),
            ("NHWC", "HWIO", "NHWC"),
            {"padding": ((1, 0), (2, 3)), "rhs_dilation": (2, 1)},
        ),
    ):
        settings = {"window_strides": (1, 1), "dimension_numbers": numbers, "feature_group_count": 6, **options}
        network = lambda w, x, settings=settings: jax.lax.conv_general_dilated(x, w, **settings)  # noqa: E731
        kernel = jnp.asarray(kernel, jnp.float32)
        found, expected = inputs.interpret(network, kernel, x), network(kernel, x)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_false_accusations_stay_within_the_bound_unless_weights_see_the_word():
    """T of an innocent's word: normal tails whatever the suspect; weights chosen by the word break them."""
    rng, found, control = np.random.default_rng(3), [], []
    suspects = [noisy(embedding.embed(BASE, MARK, word), seed, 0.1) for seed, word in enumerate(WORDS[:4])]
    suspects += [jax.tree.map(lambda leaf: leaf + 0.1 * leaf[::-1], BASE)]
    for suspect in suspects:
        chips = np.asarray(extraction.extract(suspect, BASE, MARK), np.float64)
        innocent = rng.choice([-1.0, 1.0], (3000, M))
        found.extend(innocent @ chips / np.linalg.norm(chips))
        vector = np.asarray(carriers.coordinates(suspect, MARK) - carriers.coordinates(BASE, MARK), np.float64)
        for word in innocent[:50]:
            chosen = kept() @ np.where(vector * (word @ kept()) > 0, vector, 0)
            control.append(word @ chosen / np.linalg.norm(chosen))
    level = 0.1 / len(suspects)
    bar = np.sqrt(2 * np.log(2 / level))
    assert np.mean(np.abs(found) >= bar) <= level
    assert np.mean(np.square(found)) == pytest.approx(1, abs=0.05)
    assert np.mean(np.abs(control) >= bar) > 0.9


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_leaves_that_are_split_over_a_mesh_stay_in_place_and_read_the_same(kind):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=(kind, kind))
    split = {"a": {"bias": P("x"), "kernel": P("x", None)}, "b": {"kernel": P("x", "y")}, "head": {"kernel": P()}}
    held = jax.tree.map(lambda leaf, axes: jax.device_put(leaf, NamedSharding(mesh, axes)), BASE, split)
    copy, alone = (embedding.embed(base, MARK, WORDS[0]) for base in (held, BASE))
    for leaf in MARK.spec.leaves:
        name, last = leaf.path.split("/")
        assert copy[name][last].sharding == held[name][last].sharding
        np.testing.assert_allclose(np.asarray(copy[name][last]), np.asarray(alone[name][last]), atol=1e-6)
    expected = extraction.extract(alone, BASE, MARK)
    for suspect, base in ((copy, held), (copy, BASE), (alone, held)):
        np.testing.assert_allclose(extraction.extract(suspect, base, MARK), expected, atol=1e-5)
