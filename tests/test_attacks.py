import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from test_parallel import apply_linear, linear_problem

from smark_jax import attacks, carriers, codes, extraction, keys, parallel

RNG = np.random.default_rng(0)
PARAMS = {"kernel": jnp.float32(RNG.normal(size=(40, 50))), "bias": jnp.float32(RNG.normal(size=50))}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.95])
def test_prune_removes_the_smallest_of_each_kernel(fraction):
    pruned = attacks.prune(PARAMS, fraction)
    before, after = np.asarray(PARAMS["kernel"]), np.asarray(pruned["kernel"])
    np.testing.assert_allclose((after == 0).mean(), fraction, atol=1e-3)
    assert np.abs(before[after == 0]).max() <= np.abs(before[after != 0]).min()
    np.testing.assert_array_equal(after[after != 0], before[after != 0])
    np.testing.assert_array_equal(pruned["bias"], PARAMS["bias"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantise_leaves_few_levels_within_half_a_step(bits):
    quantised = np.asarray(attacks.quantise(PARAMS, bits)["kernel"], np.float64)
    kernel = np.asarray(PARAMS["kernel"], np.float64)
    step = np.abs(kernel).max() / (2 ** (bits - 1) - 1)
    assert len(np.unique(np.round(quantised / step))) <= 2**bits - 1
    assert np.abs(quantised - kernel).max() <= step / 2 * (1 + 1e-5)


def test_attacks_keep_dtypes_and_survive_zero_kernels():
    params = {"k": jnp.zeros((3, 3), jnp.bfloat16)}
    for attacked in (attacks.prune(params, 0.5), attacks.quantise(params, 4)):
        assert attacked["k"].dtype == jnp.bfloat16
        assert not np.asarray(attacked["k"], np.float32).any()


def test_fine_tune_lowers_the_loss_and_calls_back():
    params, images, labels = linear_problem(1)
    steps = []
    tuned = attacks.fine_tune(
        params,
        apply_linear,
        images[0],
        labels[0],
        epochs=20,
        batch_size=5,
        optimizer=optax.adam(0.05),
        on_progress=lambda done, total, loss: steps.append((done, total)),
    )
    assert steps == [(done, 40) for done in range(1, 41)]

    def loss(p):
        return float(parallel.cross_entropy(apply_linear(p, images[0]), labels[0]))

    assert loss(tuned) < 0.7 * loss(params)
    assert jax.tree.structure(tuned) == jax.tree.structure(params)


def test_bad_settings_are_refused():
    for fraction in (0, 1, -0.1, 50):
        with pytest.raises(ValueError, match="prune: expected a fraction"):
            attacks.prune(PARAMS, fraction)
    for bits in (1, 17, 4.5):
        with pytest.raises(ValueError, match="quantise: expected bits"):
            attacks.quantise(PARAMS, bits)
    params, images, labels = linear_problem(1)
    with pytest.raises(ValueError, match="fine_tune: expected at least 64 images"):
        attacks.fine_tune(params, apply_linear, images[0], labels[0])
    with pytest.raises(ValueError, match="epochs"):
        attacks.fine_tune(params, apply_linear, images[0], labels[0], epochs=0, batch_size=5)


CONV = np.float32(np.random.default_rng(3).normal(size=(3, 3, 4, 10)))


def test_empty_kernels_stay_as_they_are():
    params = {"kernel": jnp.ones((3, 3)), "empty": jnp.zeros((0, 4))}
    for attacked in (attacks.prune(params, 0.5), attacks.quantise(params, 4), attacks.low_rank(params, 0.5)):
        assert attacked["empty"].shape == (0, 4)


def test_prune_filters_zeroes_the_weakest_outputs_of_convolutions():
    pruned = attacks.prune_filters({"conv": jnp.asarray(CONV), **PARAMS}, 0.35)
    weakest = np.argsort(np.abs(CONV.astype(np.float64)).sum(axis=(0, 1, 2)))[:3]
    wanted = CONV.copy()
    wanted[..., weakest] = 0
    np.testing.assert_array_equal(pruned["conv"], wanted)
    np.testing.assert_array_equal(pruned["kernel"], PARAMS["kernel"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_rounds_as_numpy_does(dtype):
    rounded = attacks.cast({"conv": jnp.asarray(CONV), "count": jnp.arange(3)}, dtype)
    assert rounded["conv"].dtype == jnp.float32
    np.testing.assert_array_equal(rounded["conv"], CONV.astype(jnp.dtype(dtype)).astype(np.float32))
    assert not np.array_equal(rounded["conv"], CONV)
    np.testing.assert_array_equal(rounded["count"], np.arange(3))


def test_low_rank_leaves_the_tail_of_the_singular_values():
    values = np.linalg.svd(CONV.astype(np.float64).reshape(36, 10), compute_uv=False)
    kept = np.asarray(attacks.low_rank({"conv": jnp.asarray(CONV), **PARAMS}, 0.5)["conv"], np.float64)
    np.testing.assert_allclose(np.linalg.norm(kept - CONV), np.linalg.norm(values[5:]), rtol=1e-5)
    assert np.linalg.matrix_rank(kept.reshape(36, 10), tol=1e-4) == 5


def test_new_attacks_refuse_bad_input():
    for fraction in (0, 1, -0.5, float("nan")):
        for attack in (attacks.prune_filters, attacks.low_rank):
            with pytest.raises(ValueError, match="strictly between 0 and 1"):
                attack(PARAMS, fraction)
    with pytest.raises(ValueError, match="floating-point"):
        attacks.cast(PARAMS, "int8")


def test_only_matched_weights_are_trained_and_statistics_never():
    params, images, labels = linear_problem(1)
    statistics = {"mean": jnp.ones(3), "count": jnp.arange(2)}
    variables = {"params": {"first": params, "second": params}, "batch_stats": statistics}

    def apply(variables, images):
        weights, shift = variables["params"], variables["batch_stats"]["mean"].sum()
        return apply_linear(weights["first"], images) + shift * apply_linear(weights["second"], images)

    tune = functools.partial(attacks.fine_tune, apply_fn=apply, images=images[0], labels=labels[0], batch_size=5)
    tuned = tune(variables, epochs=1)
    for part in ("first", "second"):
        assert _moved(tuned["params"][part], variables["params"][part]).all()
    tuned = tune(variables, epochs=1, trainable="^params/second")
    chex.assert_trees_all_equal(tuned["params"]["first"], variables["params"]["first"])
    chex.assert_trees_all_equal(tuned["batch_stats"], statistics)
    assert _moved(tuned["params"]["second"], variables["params"]["second"]).all()
    with pytest.raises(ValueError, match=r"(?s)fine_tune: expected a pattern.*'third'.*params/first"):
        tune(variables, trainable="third")


def _moved(tree, other):
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return np.array([not np.array_equal(a, b) for a, b in leaves])


@pytest.mark.parametrize(("smoothing", "l2", "weight"), [(0, 0, 0), (0.3, 0, 0), (0, 0.1, 0), (0, 0, 0.7)])
def test_first_step_of_fine_tuning_follows_the_float64_gradient(smoothing, l2, weight):
    """Adam's first step is rate * g / (|g| + 1e-8)."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(8, 6)), rng.integers(3, size=8)
    kernel = rng.normal(size=(6, 3))
    logits = x @ kernel
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = np.eye(3)[y] * (1 - smoothing) + smoothing / 3
    gradient = x.T @ (p - wanted) / 8 + l2 * kernel + 2 * weight * kernel
    tuned = attacks.fine_tune(
        {"kernel": jnp.float32(kernel)},
        lambda params, images: images @ params["kernel"],
        np.float32(x),
        y,
        epochs=1,
        batch_size=8,
        optimizer=optax.chain(optax.add_decayed_weights(l2), optax.adam(0.01)),
        label_smoothing=smoothing,
        penalty=lambda params: weight * jnp.sum(jnp.square(params["kernel"])),
    )
    np.testing.assert_allclose(tuned["kernel"], kernel - 0.01 * gradient / (np.abs(gradient) + 1e-8), atol=2e-6)


def test_pruned_weights_stay_at_zero_where_held():
    params, images, labels = linear_problem(1)
    pruned = attacks.prune(params, 0.5)
    tune = functools.partial(attacks.fine_tune, pruned, apply_linear, images[0], labels[0], epochs=3, batch_size=5)
    held, free = tune(hold_zeros=True), tune()
    for name, leaf in pruned.items():
        zero = np.asarray(leaf) == 0
        if np.ndim(leaf) > 1:
            assert zero.any() and not np.asarray(held[name])[zero].any()
            assert np.asarray(free[name])[zero].any()
            assert (np.asarray(held[name]) != np.asarray(leaf))[~zero].all()


def test_distil_minimises_the_divergence_from_the_teacher():
    params, images, _ = linear_problem(1)
    student = jax.tree.map(lambda leaf: 0.1 * leaf[::-1], params)
    taught = attacks.distil(
        params, apply_linear, images[0], student, epochs=300, batch_size=5, optimizer=optax.adam(0.05)
    )

    def divergence(p):
        t, s = (
            scipy.special.log_softmax(np.asarray(apply_linear(q, images[0]), np.float64) / 3, 1) for q in (params, p)
        )
        return (np.exp(t) * (t - s)).sum(axis=1).mean()

    assert divergence(taught) < 0.01 * divergence(student)
    np.testing.assert_array_equal(
        attacks.predicted_labels(params, apply_linear, images[0]),
        np.asarray(apply_linear(params, images[0])).argmax(axis=1),
    )
    with pytest.raises(ValueError, match="temperature"):
        attacks.distil(params, apply_linear, images[0], student, temperature=0)


def test_reinitialise_replaces_what_matches():
    fresh = jax.tree.map(jnp.zeros_like, PARAMS)
    mixed = attacks.reinitialise(PARAMS, fresh, "^ker")
    chex.assert_trees_all_equal(mixed, {"kernel": fresh["kernel"], "bias": PARAMS["bias"]})
    with pytest.raises(ValueError, match="pattern"):
        attacks.reinitialise(PARAMS, fresh, "conv")
    with pytest.raises(ValueError, match="reinitialise"):
        attacks.reinitialise(PARAMS, {"kernel": fresh["kernel"]}, "kernel")


def test_shift_weights_in_float64():
    shifted = attacks.shift_weights({"conv": jnp.asarray(CONV), "bias": PARAMS["bias"]}, jax.random.key(0), noise=0)
    wide = CONV.astype(np.float64)
    np.testing.assert_allclose(shifted["conv"], wide - 1.5 * wide.mean(axis=-1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(shifted["bias"], PARAMS["bias"])
    noisy = attacks.shift_weights({"conv": jnp.asarray(CONV)}, jax.random.key(0), mean=0, noise=0.5)
    assert np.std(np.asarray(noisy["conv"]) - CONV) == pytest.approx(0.5 * CONV.std(), rel=0.2)
    with pytest.raises(ValueError, match="shift_weights"):
        attacks.shift_weights(PARAMS, jax.random.key(0), noise=-1)


def test_overwriting_leaves_the_leakers_own_fingerprints():
    mine, theirs = (keys.from_bytes(bytes([n]) * 32) for n in (1, 2))
    base = {"kernel": PARAMS["kernel"]}
    written = attacks.overwrite(base, theirs, times=2, strength=0.03, num_chips=64)
    for number in range(2):
        mark = carriers.mark(keys.derive(theirs, "carrier", str(number)), base, 64)
        word = np.asarray(codes.codebook(keys.derive(theirs, "code"), [number], 64)[0])
        chips = np.asarray(extraction.extract(written, base, mark))
        assert (chips * word > 0).mean() > 0.9
    other = carriers.mark(keys.derive(mine, "carrier", "0"), base, 64)
    assert abs((np.asarray(extraction.extract(written, base, other)) * word > 0).mean() - 0.5) < 0.3
    statistics = {"mean": jnp.ones(3)}
    whole = attacks.overwrite({"params": base, "batch_stats": statistics}, theirs, times=2, num_chips=64)
    chex.assert_trees_all_equal(whole, {"params": written, "batch_stats": statistics})


def test_penalty_empties_guessed_carriers_only():
    base = {"kernel": PARAMS["kernel"]}
    spec = carriers.select(base)
    guess, other = (carriers.mark(keys.from_bytes(bytes([n]) * 32), base, 64) for n in (1, 2))
    penalty = attacks.carrier_energy(base, [guess], weight=0.5)
    assert float(penalty(base)) == pytest.approx(0.5)
    emptied, weights = base, carriers.read(base, spec)
    for _ in range(200):
        emptied = jax.tree.map(lambda p, g: p - 0.5 * g / jnp.abs(g).max() * 0.02, emptied, jax.grad(penalty)(emptied))
    energy = [np.square(np.asarray(carriers.despread(carriers.read(emptied, spec), c))).sum() for c in (guess, other)]
    before = [np.square(np.asarray(carriers.despread(weights, c))).sum() for c in (guess, other)]
    assert energy[0] < 0.1 * before[0] and energy[1] > 0.8 * before[1]
    with pytest.raises(ValueError, match="at least one mark"):
        attacks.carrier_energy(base, [])
