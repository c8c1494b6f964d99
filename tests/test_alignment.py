"""Alignment against rewrites that are checked by the logits, and against what was done by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smark_jax import alignment, attacks, carriers, codes, embedding, errors, extraction, keys, models, tracing

KEY = keys.from_bytes(bytes(32))


class Concat(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        for _ in range(2):
            x = jnp.concatenate([x, nn.relu(nn.Conv(6, (3, 3))(x))], -1)
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1))))


class Tanh(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(48)(x.reshape(x.shape[0], -1)))
        x = jnp.tanh(nn.Dense(40)(x))
        return nn.Dense(10)(x)


NETWORKS = {"concat": Concat(), "tanh": Tanh(), "resnet": models.ResNet18(width=4, norm="batch")}


def setup(name):
    network = NETWORKS[name]
    base = models.init(network, jax.random.key(0), (8, 8, 3))
    noise = iter(jax.random.split(jax.random.key(1), 1000))

    def jitter(path, leaf):  # biases and statistics that are not all alike
        if leaf.ndim > 1:
            return leaf
        moved = leaf + 0.1 * jax.random.normal(next(noise), leaf.shape)
        return jnp.abs(moved) + 0.1 if "var" in str(path) else moved

    base = jax.tree_util.tree_map_with_path(jitter, base)
    images = jax.random.uniform(jax.random.key(2), (4, 8, 8, 3))
    apply_fn = models.apply_fn(network)
    return (
        base,
        images,
        apply_fn,
        alignment.trace_graph(apply_fn, base, images),
        models.apply_fn(network, any_width=True),
    )


def mark(base):
    mark = carriers.mark(keys.derive(KEY, "carrier"), base, 128)
    book = codes.Codebook(keys.derive(KEY, "code"), 1000, 128)
    word = codes.codebook(book.key, [7], 128)[0]
    copy = embedding.embed(base, mark, word)

    def read(suspect):
        return np.asarray(extraction.extract(suspect, base, mark), np.float64)

    return copy, book, read


def accused(chips, book):
    return [a.serial for a in tracing.trace(chips, book, 1e-6).accused]


def rewrite(params, graph, name, key):
    steps = {
        "permute": lambda p, k: attacks.permute(p, graph, k),
        "rescale": lambda p, k: attacks.rescale(p, graph, k, 0.7),
        "stretch": lambda p, k: attacks.rescale(p, graph, k, 15.0),  # to 1e26 and more, and back
        "flip": lambda p, k: attacks.flip(p, graph, k),
        "fold": lambda p, k: attacks.fold_batch_norm(p, graph),
        **{
            kind: lambda p, k, kind=kind: attacks.add_neurons(p, graph, k, 0.2, kind)
            for kind in ("zero", "clique", "split")
        },
    }
    for step, k in zip(name.split(), jax.random.split(key, len(name.split())), strict=True):
        params = steps[step](params, k)
    return params


@pytest.mark.parametrize(
    ("network", "steps"),
    [
        ("concat", "permute"),
        ("concat", "zero permute rescale"),
        ("concat", "permute stretch"),
        ("concat", "rescale split clique permute"),
        ("tanh", "flip permute"),
        ("tanh", "split flip permute"),
        ("resnet", "fold permute rescale"),
        ("resnet", "split rescale permute"),
        ("resnet", "clique zero permute"),
    ],
)
def test_rewrites_keep_logits_and_are_undone(network, steps):
    base, images, apply_fn, graph, any_width = setup(network)
    copy, book, read = mark(base)
    suspect = rewrite(copy, graph, steps, jax.random.key(5))
    assert float(jnp.abs(any_width(suspect, images) - any_width(copy, images)).max()) < 1e-3
    cut = jax.tree.map(lambda s, b: s[tuple(slice(0, n) for n in b.shape)], suspect, base)
    assert accused(read(cut), book) == []  # the control
    aligned, report = alignment.align(suspect, base, apply_fn, images)
    assert report.similarity > 0.99
    assert jax.tree.map(jnp.shape, aligned) == jax.tree.map(jnp.shape, base)
    assert accused(read(aligned), book) == [7]


def test_a_permutation_made_by_hand_is_found():
    base, images, apply_fn, graph, _ = setup("tanh")
    order = np.random.default_rng(0).permutation(48)
    suspect = {
        **base,
        "Dense_0": {"kernel": base["Dense_0"]["kernel"][:, order], "bias": base["Dense_0"]["bias"][order]},
        "Dense_1": {**base["Dense_1"], "kernel": base["Dense_1"]["kernel"][order]},
    }
    assert graph.sizes == (48, 40)
    aligned, report = alignment.align(suspect, base, apply_fn, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aligned, base)
    assert sum(space.moved for space in report.spaces) == int((order != np.arange(48)).sum())


def test_renamed_leaves_are_paired():
    base, images, apply_fn, graph, _ = setup("concat")
    copy, book, read = mark(base)
    permuted = attacks.permute(copy, graph, jax.random.key(3))
    renamed = {f"layer{i}": {"w": m["kernel"], "b": m["bias"]} for i, m in enumerate(permuted.values())}
    aligned, report = alignment.align(renamed, base, apply_fn, images)
    assert report.renamed["Dense_0/kernel"].endswith("/w")
    assert accused(read(aligned), book) == [7]
    renamed["layer3"]["w"] = renamed["layer3"]["w"].at[0, 0].set(jnp.nan)
    assert alignment.align(renamed, base, apply_fn, images).report.renamed == report.renamed


@pytest.mark.parametrize("network", NETWORKS)
def test_unrelated_models_are_refused_and_accuse_nobody(network):
    base, images, apply_fn, _, _ = setup(network)
    _, book, read = mark(base)
    stranger = models.init(NETWORKS[network], jax.random.key(99), (8, 8, 3))
    with pytest.raises(errors.NothingMatched, match="No order, scale and sign") as refusal:
        alignment.align(stranger, base, apply_fn, images)
    chips = read(refusal.value.attempt.params)
    assert accused(chips, book) == []
    words = np.asarray(codes.codebook(book.key, range(1000), 128), np.float64)
    scores = words @ chips / np.linalg.norm(chips)
    assert abs(scores.mean()) < 4 / np.sqrt(1000)
    assert abs(scores.std() - 1) < 0.15


def test_noise_moves_no_unit_that_nobody_moved():
    base, images, apply_fn, graph, _ = setup("tanh")
    noisy = attacks.add_noise(base, jax.random.key(3), 2.0, match="kernel")
    report = alignment.align(noisy, base, apply_fn, images).report
    assert [space.moved for space in report.spaces] == [0, 0]
    # The control: where units were moved, they are found at their places all the same.
    moved = attacks.permute(noisy, graph, jax.random.key(4))
    aligned, report = alignment.align(moved, base, apply_fn, images)
    assert report.spaces[0].moved > 40
    np.testing.assert_allclose(aligned["Dense_0"]["bias"], base["Dense_0"]["bias"], atol=0.02)


def test_a_kernel_of_noise_does_not_outvote_the_others():
    base, images, apply_fn, graph, _ = setup("tanh")
    noise = 30 * jax.random.normal(jax.random.key(3), base["Dense_0"]["kernel"].shape)
    drowned = {**base, "Dense_0": {**base["Dense_0"], "kernel": noise}}
    aligned, report = alignment.align(attacks.permute(drowned, graph, jax.random.key(4)), base, apply_fn, images)
    assert report.from_base == ("Dense_0/kernel",)
    assert {"Dense_1/kernel", "Dense_2/kernel"} == set(report.alike)
    for name in ("Dense_1", "Dense_2"):
        np.testing.assert_allclose(aligned[name]["kernel"], base[name]["kernel"], atol=1e-5)


def test_random_kernels_are_not_alike():
    base, images, apply_fn, _, _ = setup("concat")
    for seed in range(5):  # narrow layers fit by chance, the first one best
        stranger = models.init(NETWORKS["concat"], jax.random.key(100 + seed), (8, 8, 3))
        with pytest.raises(errors.NothingMatched) as refusal:
            alignment.align(stranger, base, apply_fn, images)
        assert refusal.value.attempt.report.alike == ()


def test_a_kernel_with_one_weight_for_each_unit_shows_nothing():
    """Its scales and signs alone make it the base's."""

    def apply_fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    def drawn(seed):
        rng = np.random.default_rng(seed)
        return {"a": rng.normal(size=(1, 64)).astype(np.float32), "b": rng.normal(size=(64, 12)).astype(np.float32)}

    base, images = drawn(0), np.zeros((2, 1), np.float32)
    assert alignment.align(base, base, apply_fn, images).report.alike == ("b",)
    with pytest.raises(errors.NothingMatched) as refusal:
        alignment.align(drawn(1), base, apply_fn, images)
    assert refusal.value.attempt.report.similarities["a"] > 0.99


def test_malformed_suspects_are_refused():
    base, images, apply_fn, _, _ = setup("concat")
    kernel = base["Dense_1"]["kernel"]

    def with_kernel(new):
        return {**base, "Dense_1": {**base["Dense_1"], "kernel": new}}

    other = models.init(models.CNN(), jax.random.key(0), (8, 8, 3))
    few = {"Dense_1": base["Dense_1"]}
    for suspect in (few, {}):
        with pytest.raises(errors.Undecided, match="align"):
            alignment.align(suspect, base, apply_fn, images)
    _, book, read = mark(base)  # of another architecture some leaf may fit by accident; that shows nothing
    with pytest.raises(errors.Undecided, match=r"lacks \d+ % of the base's weights") as refusal:
        alignment.align(other, base, apply_fn, images)
    aligned, report = refusal.value.attempt
    assert {"Conv_2/kernel", "Dense_0/kernel"} <= set(report.left_out)
    assert accused(read(aligned), book) == []
    broken = with_kernel(kernel.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="align: expected finite weights in the base's leaf"):
        alignment.align(base, broken, apply_fn, images)
    # What is there is aligned: a leaf of another shape, or one that is missing, is left out and named.
    missing = {name: module for name, module in base.items() if name != "Dense_1"}
    for suspect, left in ((with_kernel(kernel.T), ("Dense_1/kernel",)), (missing, ("Dense_1/bias", "Dense_1/kernel"))):
        aligned, report = alignment.align(suspect, base, apply_fn, images)
        assert report.left_out == left
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), aligned, base)
    aligned, _ = alignment.align(broken, base, apply_fn, images)
    assert np.argwhere(np.isnan(aligned["Dense_1"]["kernel"])).tolist() == [[0, 0]]
    with pytest.raises(ValueError, match="apply_fn"):
        alignment.align(base, base, apply_fn, images[..., 0])
