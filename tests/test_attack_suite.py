"""Attacks that restart, reparametrise or swamp a network: each does what it says, and repeats itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from smark_jax import alignment, attacks

RNG = np.random.default_rng(11)
KEY = jax.random.key(5)
INPUTS, HIDDEN, CLASSES = 12, 20, 3


def normal(*shape):
    return jnp.float32(RNG.normal(size=shape))


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"][None]


def drawn():
    first = {"kernel": normal(INPUTS, HIDDEN), "bias": normal(HIDDEN)}
    return {"first": first, "last": {"kernel": normal(HIDDEN, CLASSES), "bias": normal(CLASSES)}}


PARAMS, OTHER, IMAGES = drawn(), drawn(), normal(64, INPUTS)
LABELS = RNG.integers(CLASSES, size=64)
GRAPH = alignment.trace_graph(mlp, PARAMS, IMAGES)


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_sharpness_takes_the_gradient_uphill():
    x, y, kernel, rho = RNG.normal(size=(8, 6)), RNG.integers(3, size=8), RNG.normal(size=(6, 3)), 0.5

    def gradient(w):
        return x.T @ (scipy.special.softmax(x @ w, axis=1) - np.eye(3)[y]) / 8

    tuned = attacks.fine_tune(
        {"kernel": jnp.float32(kernel)},
        lambda params, images: images @ params["kernel"],
        np.float32(x),
        y,
        epochs=1,
        batch_size=8,
        optimizer=optax.sgd(0.3),
        sharpness=rho,
    )
    uphill = kernel + rho * gradient(kernel) / np.linalg.norm(gradient(kernel))
    np.testing.assert_allclose(tuned["kernel"], kernel - 0.3 * gradient(uphill), atol=1e-6)
    assert np.abs(gradient(uphill) - gradient(kernel)).max() > 0.01
    with pytest.raises(ValueError, match="sharpness"):
        attacks.fine_tune(PARAMS, mlp, IMAGES, LABELS, sharpness=-1)


def test_large_decay_shrinks_weights_apart_from_the_gradient():
    decayed, plain = (
        attacks.fine_tune(PARAMS, mlp, IMAGES, LABELS, epochs=1, optimizer=optax.adamw(1e-3, weight_decay=decay))
        for decay in (50.0, 0.0)
    )
    for leaf, other, start in zip(*map(jax.tree.leaves, (decayed, plain, PARAMS)), strict=True):
        np.testing.assert_allclose(leaf, other - 1e-3 * 50 * start, atol=1e-5)


def test_gradients_pass_straight_through_quantisation():
    kernel, x = normal(5, 4), np.float32(RNG.normal(size=(7, 5)))
    run = attacks.quantised(lambda params, images: jnp.square(images @ params["kernel"]), 3)
    rounded = np.asarray(attacks.quantise({"kernel": kernel}, 3)["kernel"], np.float64)
    np.testing.assert_allclose(run({"kernel": kernel}, x), np.square(x.astype(np.float64) @ rounded), rtol=1e-4)
    gradient = jax.grad(lambda params: run(params, x).sum())({"kernel": kernel})["kernel"]
    np.testing.assert_allclose(gradient, 2 * x.T.astype(np.float64) @ x @ rounded, rtol=1e-4, atol=1e-4)


def test_factors_multiply_to_the_kernel_of_low_rank_and_stay_of_that_rank_in_training():
    params = {**PARAMS, "conv": {"kernel": normal(3, 3, 4, 10)}}
    factored = attacks.factorise(params, 0.5)
    assert factored["conv"]["kernel"].left.shape == (3, 3, 4, 5) and factored["conv"]["kernel"].right.shape == (5, 10)
    chex.assert_trees_all_close(attacks.multiply_out(factored), attacks.low_rank(params, 0.5), atol=1e-5)
    run = lambda factored, x: mlp(attacks.multiply_out(factored), x)  # noqa: E731
    start = attacks.factorise(PARAMS, 0.4)
    tuned = attacks.fine_tune(start, run, IMAGES, LABELS, epochs=2, batch_size=32)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), tuned, start)
    assert all(jax.tree.leaves(moved))
    assert np.linalg.matrix_rank(attacks.multiply_out(tuned)["first"]["kernel"], tol=1e-4) == int(0.4 * INPUTS)
    with pytest.raises(ValueError, match="factorise"):
        attacks.factorise(PARAMS, 1.5)


def test_shrink_and_perturb_in_float64_leaves_statistics():
    statistics = {"mean": jnp.ones(3), "count": jnp.arange(2)}
    mixed = attacks.shrink_and_perturb(
        {"params": PARAMS, "batch_stats": statistics}, {"params": OTHER, "batch_stats": statistics}, 0.3, 0.7
    )
    wanted = jax.tree.map(lambda a, b: 0.3 * a + 0.7 * b, wide(PARAMS), wide(OTHER))
    chex.assert_trees_all_close(wide(mixed["params"]), wanted, atol=1e-6)
    chex.assert_trees_all_equal(mixed["batch_stats"], statistics)
    for settings in ({"shrink": 0}, {"shrink": 1.1}, {"perturb": -1}):
        with pytest.raises(ValueError, match="shrink_and_perturb"):
            attacks.shrink_and_perturb(PARAMS, OTHER, **settings)


def test_layers_are_replaced_in_turn_and_tuned_after_each():
    seen = []

    def tune(params):
        seen.append({name: float(params[name]["kernel"][0, 0]) for name in params})
        return jax.tree.map(lambda leaf: leaf + 1, params)

    last = attacks.reinitialise_in_turn(PARAMS, OTHER, ["^last", "^first"], tune)
    old, new = (float(tree["first"]["kernel"][0, 0]) for tree in (PARAMS, OTHER))
    assert [step["first"] for step in seen] == [pytest.approx(old), pytest.approx(new)]
    np.testing.assert_allclose(last["last"]["kernel"], OTHER["last"]["kernel"] + 2, rtol=1e-6)
    np.testing.assert_allclose(last["first"]["bias"], OTHER["first"]["bias"] + 1, rtol=1e-6)


def test_merging_matches_units_first():
    order = RNG.permutation(HIDDEN)
    noisy = attacks.add_noise(PARAMS, KEY, 0.1)
    shuffled = {
        "first": {"kernel": noisy["first"]["kernel"][:, order], "bias": noisy["first"]["bias"][order]},
        "last": {"kernel": noisy["last"]["kernel"][order], "bias": noisy["last"]["bias"]},
    }
    merged = attacks.merge(PARAMS, shuffled, GRAPH, 0.25)
    wanted = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, wide(PARAMS), wide(noisy))
    chex.assert_trees_all_close(wide(merged), wanted, atol=1e-6)
    unmatched = wide(jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, PARAMS, shuffled))
    assert np.abs(unmatched["first"]["kernel"] - wanted["first"]["kernel"]).max() > 0.5
    with pytest.raises(ValueError, match="merge: expected share"):
        attacks.merge(PARAMS, OTHER, GRAPH, 1.0)


def test_swamped_units_are_those_that_matter_least():
    params = {**PARAMS, "first": {**PARAMS["first"], "bias": PARAMS["first"]["bias"].at[jnp.asarray([3, 8])].set(-99)}}
    swamped = attacks.swamp_units(params, mlp, IMAGES, GRAPH, KEY, units=2, size=1e18)
    np.testing.assert_allclose(mlp(swamped, IMAGES), mlp(params, IMAGES), atol=1e-5)
    huge = np.abs(np.asarray(swamped["first"]["kernel"])) == np.float32(1e18)
    np.testing.assert_array_equal(np.flatnonzero(huge.all(axis=0)), [3, 8])
    assert huge.sum() == 2 * INPUTS and not np.asarray(swamped["last"]["kernel"])[[3, 8]].any()

    more = attacks.swamp_units(params, mlp, IMAGES, GRAPH, KEY, units=6, size=10.0)
    first, last = wide(params)["first"], wide(params)["last"]
    hidden = np.maximum(wide(IMAGES) @ first["kernel"] + first["bias"], 0)
    power = np.square(hidden).mean(axis=0) * np.square(last["kernel"]).sum(axis=1)
    cut = np.flatnonzero(~np.asarray(more["last"]["kernel"]).any(axis=1))
    np.testing.assert_array_equal(cut, np.sort(np.argsort(power)[:6]))
    chex.assert_trees_all_equal(more, attacks.swamp_units(params, mlp, IMAGES, GRAPH, KEY, units=6, size=10.0))
    with pytest.raises(ValueError, match="swamp_units: expected at least 30 units"):
        attacks.swamp_units(params, mlp, IMAGES, GRAPH, KEY, units=30)


def test_unused_inputs_are_filled_without_changing_any_answer():
    images = IMAGES.at[:, jnp.asarray([2, 7, 9])].set(0)
    filled = attacks.fill_unused(PARAMS, mlp, images, KEY, size=50.0)
    np.testing.assert_array_equal(mlp(filled, images), mlp(PARAMS, images))
    changed = np.asarray(filled["first"]["kernel"] != PARAMS["first"]["kernel"])
    np.testing.assert_array_equal(np.flatnonzero(changed.all(axis=1)), [2, 7, 9])
    assert changed.sum() == 3 * HIDDEN
    spread = np.asarray(filled["first"]["kernel"])[[2, 7, 9]].std() / np.asarray(PARAMS["first"]["kernel"]).std()
    assert 35 < spread < 65


def test_shifted_logits_keep_every_probability():
    shifted = attacks.shift_logits(PARAMS, mlp, IMAGES, KEY, size=2.0)
    before, after = (wide(mlp(params, IMAGES)) for params in (PARAMS, shifted))
    moved = after - before
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1], moved.shape), atol=1e-4)
    assert np.abs(moved).min() > 1e-3 and moved.std() > 1
    np.testing.assert_allclose(scipy.special.softmax(after, 1), scipy.special.softmax(before, 1), atol=1e-5)
    chex.assert_trees_all_equal(shifted["first"], PARAMS["first"])
    with pytest.raises(ValueError, match=r"shift_logits: expected a last layer"):
        attacks.shift_logits(PARAMS, lambda p, x: mlp(p, x)[:, :2], IMAGES, KEY)


@pytest.mark.parametrize("size", [0, -1.0, float("inf"), float("nan")])
def test_sizes_are_positive_and_finite(size):
    for attack in (attacks.fill_unused, attacks.shift_logits, functools.partial(attacks.swamp_units, graph=GRAPH)):
        with pytest.raises(ValueError, match="size"):
            attack(PARAMS, mlp, IMAGES, key=KEY, size=size)
