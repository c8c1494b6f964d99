import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smark_jax import carriers, codes, embedding, extraction, keys, losses

RNG = np.random.default_rng(0)
BASE = {
    "a": {"kernel": jnp.float32(RNG.normal(0, 0.05, (90, 40))), "bias": jnp.zeros(40)},
    "b": {"kernel": jnp.float32(RNG.normal(0, 3.0, (40, 30)))},
}
KEY = keys.from_bytes(bytes(32))
M = 64


@pytest.fixture(scope="module")
def spec():
    return carriers.select(BASE)


@pytest.fixture(scope="module")
def carrier(spec):
    return carriers.draw(keys.derive(KEY, "carrier"), spec, M)


@pytest.fixture(scope="module")
def book():
    return codes.codebook(keys.derive(KEY, "code"), range(5), M)


def test_closed_form_moves_each_weight_by_its_strength(spec, carrier, book):
    copy = embedding.embed(BASE, spec, carrier, book[0], strength=0.02)
    for name in "ab":
        moved = np.asarray(copy[name]["kernel"] - BASE[name]["kernel"], np.float64).reshape(-1)
        carrying = moved[np.abs(moved) > 0]
        spread = np.sqrt(np.square(np.asarray(BASE[name]["kernel"], np.float64)).mean())
        np.testing.assert_allclose(np.sqrt(np.square(carrying).mean()) / spread, 0.02, rtol=0.05)
    np.testing.assert_array_equal(copy["a"]["bias"], 0)


def test_intact_copy_reads_its_codeword_at_the_stated_size(spec, carrier, book):
    copy = embedding.embed(BASE, spec, carrier, book[1], strength=0.02)
    chips = extraction.extract(copy, BASE, spec, carrier)
    expected = 0.02 * np.sqrt(carrier.num_carrying / M) * np.asarray(book[1], np.float64)
    np.testing.assert_allclose(chips, expected, atol=1e-4)


def test_a_batch_equals_one_by_one(spec, carrier, book):
    copies = embedding.embed_batch(BASE, spec, carrier, book)
    assert copies["a"]["kernel"].shape == (5, 90, 40)
    for row, code in enumerate(book):
        one = embedding.embed(BASE, spec, carrier, code)
        for got, expected in zip(jax.tree.leaves(copies), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(got[row], expected)
    two = embedding.embed_batch(BASE, spec, carrier, book[3:])  # whoever else is in the batch
    np.testing.assert_array_equal(two["a"]["kernel"], copies["a"]["kernel"][3:])


def test_the_mean_of_copies_reads_the_mean_of_codewords(spec, carrier, book):
    copies = embedding.embed_batch(BASE, spec, carrier, book)
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), copies)
    chips = extraction.extract(mean, BASE, spec, carrier)
    scale = 0.03 * np.sqrt(carrier.num_carrying / M)
    np.testing.assert_allclose(chips, scale * np.asarray(book, np.float64).mean(axis=0), atol=1e-4)


def test_bfloat16_stays_and_reads(spec, book):
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
    spec16 = carriers.select(base)
    carrier16 = carriers.draw(KEY, spec16, M)
    copy = embedding.embed(base, spec16, carrier16, book[0], strength=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(copy)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(jnp.sign(extraction.extract(copy, base, spec16, carrier16)), book[0])


@pytest.mark.parametrize("loss", [losses.bit_cross_entropy, losses.code_mse, losses.sign_hinge])
@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.sgd(0.02, momentum=0.9)])
def test_trained_embedding_reaches_the_codeword_under_any_loss(spec, carrier, book, loss, optimizer):
    """Starting from a model that reads another customer's word, so that about half of the chips begin wrong."""
    start = embedding.embed(BASE, spec, carrier, book[1], strength=0.003)
    embedder = embedding.embedder(loss, optimizer)
    state = embedder.init(start, embedding.mark(BASE, spec, carrier, book[0]))
    update = jax.jit(functools.partial(embedder.update, spec=spec))
    state, first = update(state)
    assert first.bit_errors == int((book[0] != book[1]).sum())
    for _ in range(60):
        state, info = update(state)
    assert info.bit_errors == 0
    assert info.loss < first.loss


def test_trained_embedding_follows_the_task_as_well(spec, carrier, book):
    """With a task that pulls all weights of one leaf up, both goals are met."""
    embedder = embedding.embedder(losses.sign_hinge, optax.adam(1e-3))
    state = embedder.init(BASE, embedding.mark(BASE, spec, carrier, book[0]))
    task = jax.tree.map(jnp.zeros_like, BASE)
    task["b"]["kernel"] -= 0.1
    update = jax.jit(embedder.update, static_argnames="spec")
    for _ in range(50):
        state, info = update(state, spec=spec, task_gradient=task)
    assert info.bit_errors == 0
    assert (state.params["b"]["kernel"] > BASE["b"]["kernel"]).mean() > 0.95


def test_added_gradient_is_the_losses_own(spec, carrier, book):
    aim = embedding.mark(BASE, spec, carrier, book[0])
    transform = embedding.add_fingerprint_gradient(losses.code_mse, spec, aim, weight=2.0)
    ones = jax.tree.map(jnp.ones_like, BASE)
    updates, _ = transform.update(ones, transform.init(BASE), BASE)
    # At the base every chip reads 0, where d/dy mean (y - b)^2 = -2 b / m.
    pulled = carriers.spread(-2.0 * book[0].astype(jnp.float32) / M, carrier)
    start = 0
    for leaf in spec.leaves:
        a, b = leaf.path.split("/")
        expected = 1 + 2.0 * np.asarray(pulled[start : start + leaf.size]).reshape(leaf.shape) / leaf.scale
        np.testing.assert_allclose(updates[a][b], expected, rtol=1e-3, atol=1e-5)
        start += leaf.size


def test_an_nnx_models_state_serves_as_parameters():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.hidden = nnx.Linear(30, 100, rngs=rngs)
            self.norm = nnx.BatchNorm(100, rngs=rngs)
            self.out = nnx.Linear(100, 10, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(nnx.relu(self.norm(self.hidden(x), use_running_average=True)))

    net = Net(nnx.Rngs(0))
    graph, base, rest = nnx.split(net, nnx.Param, ...)
    spec = carriers.select(base, "kernel")
    assert spec.num_weights == 30 * 100 + 100 * 10
    carrier = carriers.draw(KEY, spec, M)
    book = codes.codebook(KEY, range(3), M)
    copies = embedding.embed_batch(base, spec, carrier, book)
    for row in range(3):
        copy = jax.tree.map(lambda leaf, row=row: leaf[row], copies)
        assert jax.tree.structure(copy) == jax.tree.structure(base)
        np.testing.assert_array_equal(jnp.sign(extraction.extract(copy, base, spec, carrier)), book[row])
    assert nnx.merge(graph, copy, rest)(jnp.ones((2, 30))).shape == (2, 10)


def test_bad_input_is_refused(spec, carrier, book):
    refused = pytest.raises
    with refused(ValueError, match=r"embed: expected code of shape \(64,\), but got shape \(63,\)"):
        embedding.embed(BASE, spec, carrier, book[0, :-1])
    with refused(ValueError, match=r"codewords of -1 and \+1"):
        embedding.embed(BASE, spec, carrier, (book[0] + 1) / 2)
    with refused(ValueError, match=r"codes of shape \[K, 64\]"):
        embedding.embed_batch(BASE, spec, carrier, book[0])
    with refused(ValueError, match=r"codes of shape \[K, 64\]"):
        embedding.embed_batch(BASE, spec, carrier, book[:0])
    other = carriers.draw(KEY, carriers.select(BASE, "a/"), M)
    with refused(ValueError, match=r"embed: expected a carrier for the 4,800 weights .* one drawn for 3,600"):
        embedding.embed(BASE, spec, other, book[0])
    for strength in (0.0, -1.0, np.nan, np.inf):
        with refused(ValueError, match="strength to be a positive finite number"):
            embedding.embed(BASE, spec, carrier, book[0], strength)
    for bad in (np.nan, np.inf):
        params = {**BASE, "b": {"kernel": BASE["b"]["kernel"].at[39, 29].set(bad)}}
        with refused(ValueError, match="embed: expected finite weights in params"):
            embedding.embed(params, spec, carrier, book[0])


def test_calibrate_stops_where_copies_cost_too_much():
    base = {"kernel": jnp.float32(np.random.default_rng(0).normal(size=(64, 64)))}
    spec = carriers.select(base)
    carrier = carriers.draw(KEY, spec, M)

    def score(params):  # loses the square of the relative change: 0.0009 at strength 0.03
        change = np.asarray(params["kernel"], np.float64) - np.asarray(base["kernel"], np.float64)
        return 1 - np.square(change).mean() / np.square(np.asarray(base["kernel"], np.float64)).mean()

    found = embedding.calibrate(base, spec, carrier, score, max_drop=0.002, strengths=(0.1, 0.01, 0.03, 0.05))
    assert found.strength == 0.03
    assert found.strengths == (0.01, 0.03, 0.05)  # in rising order, and none beyond the first that costs too much
    np.testing.assert_allclose(found.mean_drops, np.square(found.strengths), rtol=0.02)
    assert found.worst_drops >= found.mean_drops
    with pytest.raises(ValueError, match=r"calibrate: expected a strength that costs at most 1e-06"):
        embedding.calibrate(base, spec, carrier, score, max_drop=1e-6)
    with pytest.raises(ValueError, match="max_drop"):
        embedding.calibrate(base, spec, carrier, score, max_drop=0)
