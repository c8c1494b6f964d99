import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from smark_jax import carriers, codes, embedding, errors, extraction, keys, losses
from smark_jax.embedding import _search

RNG = np.random.default_rng(0)
BASE = {
    "a": {"kernel": jnp.float32(RNG.normal(0, 0.05, (90, 40))), "bias": jnp.zeros(40)},
    "b": {"kernel": jnp.float32(RNG.normal(0, 3.0, (40, 30)))},
}
KEY = keys.from_bytes(bytes(32))
M = 64


@pytest.fixture(scope="module")
def mark():
    return carriers.mark(keys.derive(KEY, "carrier"), BASE, M)


@pytest.fixture(scope="module")
def book():
    return codes.codebook(keys.derive(KEY, "code"), range(5), M)


def test_closed_form_moves_each_weight_by_its_strength(mark, book):
    copy = embedding.embed(BASE, mark, book[0], strength=0.02)
    for name in "ab":
        moved = np.asarray(copy[name]["kernel"] - BASE[name]["kernel"], np.float64).reshape(-1)
        carrying = moved[np.abs(moved) > 0]
        spread = np.sqrt(np.square(np.asarray(BASE[name]["kernel"], np.float64)).mean())
        np.testing.assert_allclose(np.sqrt(np.square(carrying).mean()) / spread, 0.02, rtol=0.05)
    np.testing.assert_array_equal(copy["a"]["bias"], 0)


def test_intact_copy_reads_its_codeword_at_the_stated_size(mark, book):
    copy = embedding.embed(BASE, mark, book[1], strength=0.02)
    chips = extraction.extract(copy, BASE, mark)
    expected = 0.02 * np.sqrt(mark.carrier.num_carrying / M) * np.asarray(book[1], np.float64)
    np.testing.assert_allclose(chips, expected, atol=1e-4)


def test_a_batch_equals_one_by_one(mark, book):
    copies = embedding.embed_batch(BASE, mark, book)
    assert copies["a"]["kernel"].shape == (5, 90, 40)
    for row, code in enumerate(book):
        one = embedding.embed(BASE, mark, code)
        for got, expected in zip(jax.tree.leaves(copies), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(got[row], expected)
    two = embedding.embed_batch(BASE, mark, book[3:])  # whoever else is in the batch
    np.testing.assert_array_equal(two["a"]["kernel"], copies["a"]["kernel"][3:])


def test_the_mean_of_copies_reads_the_mean_of_codewords(mark, book):
    copies = embedding.embed_batch(BASE, mark, book)
    mean = jax.tree.map(lambda leaf: leaf.mean(axis=0), copies)
    chips = extraction.extract(mean, BASE, mark)
    scale = 0.03 * np.sqrt(mark.carrier.num_carrying / M)
    np.testing.assert_allclose(chips, scale * np.asarray(book, np.float64).mean(axis=0), atol=1e-4)


def test_bfloat16_stays_and_reads(book):
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
    mark16 = carriers.mark(KEY, base, M)
    copy = embedding.embed(base, mark16, book[0], strength=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(copy)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(jnp.sign(extraction.extract(copy, base, mark16)), book[0])


@pytest.mark.parametrize("loss", [losses.bit_cross_entropy, losses.code_mse, losses.sign_hinge])
@pytest.mark.parametrize("optimizer", [optax.adam(1e-3), optax.sgd(0.02, momentum=0.9)])
def test_trained_embedding_reaches_the_codeword_under_any_loss(mark, book, loss, optimizer):
    """Starting from a model that reads another customer's word, so that about half of the chips begin wrong."""
    params = embedding.embed(BASE, mark, book[1], strength=0.003)
    optimizer = optax.chain(embedding.add_fingerprint_gradient(loss, mark, book[0]), optimizer)
    state, nothing = optimizer.init(BASE), jax.tree.map(jnp.zeros_like, BASE)

    @jax.jit
    def read(params):
        chips = extraction.extract(params, BASE, mark)
        return loss(chips, book[0].astype(jnp.float32)), jnp.sum(chips * book[0] <= 0)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(nothing, state, params)
        return optax.apply_updates(params, updates), state

    before, wrong = read(params)
    assert wrong == int((book[0] != book[1]).sum())
    for _ in range(61):
        params, state = step(params, state)
    after, wrong = read(params)
    assert wrong == 0
    assert after < before


def test_trained_embedding_follows_the_task_as_well(mark, book):
    """With a task that pulls all weights of one leaf up, both goals are met."""
    optimizer = optax.chain(embedding.add_fingerprint_gradient(losses.sign_hinge, mark, book[0]), optax.adam(1e-3))
    task = jax.tree.map(jnp.zeros_like, BASE)
    task["b"]["kernel"] -= 0.1

    def step(carried, _):
        params, state = carried
        updates, state = optimizer.update(task, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=50))(BASE)
    assert (extraction.extract(params, BASE, mark) * book[0] > 0).all()
    assert (params["b"]["kernel"] > BASE["b"]["kernel"]).mean() > 0.95


def test_added_gradient_is_the_losses_own(mark, book):
    transform = embedding.add_fingerprint_gradient(losses.code_mse, mark, book[0], weight=2.0)
    ones = jax.tree.map(jnp.ones_like, BASE)
    updates, _ = transform.update(ones, transform.init(BASE), BASE)
    # At the base every chip reads 0, where d/dy mean (y - b)^2 = -2 b / m.
    pulled = carriers.spread(-2.0 * book[0].astype(jnp.float32) / M, mark)
    start = 0
    for leaf, scale in zip(mark.spec.leaves, mark.spec.scales, strict=True):
        a, b = leaf.path.split("/")
        expected = 1 + 2.0 * np.asarray(pulled[start : start + leaf.size]).reshape(leaf.shape) / scale
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
    mark = carriers.mark(KEY, base, M, match="kernel")
    assert mark.spec.num_weights == 30 * 100 + 100 * 10
    book = codes.codebook(KEY, range(3), M)
    copies = embedding.embed_batch(base, mark, book)
    for row in range(3):
        copy = jax.tree.map(lambda leaf, row=row: leaf[row], copies)
        assert jax.tree.structure(copy) == jax.tree.structure(base)
        np.testing.assert_array_equal(jnp.sign(extraction.extract(copy, base, mark)), book[row])
    assert nnx.merge(graph, copy, rest)(jnp.ones((2, 30))).shape == (2, 10)


def test_bad_input_is_refused(mark, book):
    refused = pytest.raises
    with refused(ValueError, match=r"embed: expected word of shape \(64,\), but got shape \(63,\)"):
        embedding.embed(BASE, mark, book[0, :-1])
    with refused(ValueError, match=r"codewords of -1 and \+1"):
        embedding.embed(BASE, mark, (book[0] + 1) / 2)
    with refused(ValueError, match=r"words of shape \[K, 64\]"):
        embedding.embed_batch(BASE, mark, book[0])
    with refused(ValueError, match=r"words of shape \[K, 64\]"):
        embedding.embed_batch(BASE, mark, book[:0])
    other = mark._replace(carrier=carriers.mark(KEY, BASE, M, match="a/").carrier)
    with refused(ValueError, match=r"embed: expected a carrier for the 4,800 weights .* one drawn for 3,600"):
        embedding.embed(BASE, other, book[0])
    for strength in (0.0, -1.0, np.nan, np.inf):
        with refused(ValueError, match="strength to be a positive finite number"):
            embedding.embed(BASE, mark, book[0], strength)
    for bad in (np.nan, np.inf):
        params = {**BASE, "b": {"kernel": BASE["b"]["kernel"].at[39, 29].set(bad)}}
        with refused(ValueError, match="embed: expected finite weights in the base"):
            embedding.embed(params, mark, book[0])


@pytest.mark.parametrize(
    ("cost", "most"),
    [
        (lambda x: x, 3),
        (lambda x: 30 * x, 4),
        (lambda x: x / 30, 5),
        (lambda x: x**2, 5),
        (lambda x: 9 * x**0.5, 7),
        (lambda x: x**5, 12),
        (lambda x: math.floor(20 * x) / 19, 12),  # so many of 19 images change their answer
        (lambda x: math.inf if x > 0.02 else x, 12),
    ],
)
def test_the_largest_strength_within_bounds_is_found_in_few_tries(cost, most):
    tries = []

    def tried(strength):
        tries.append(strength)
        return cost(strength), strength if cost(strength) <= 1 else None

    best, _ = _search.largest(tried, 1.0)
    limit = next(x for x in np.geomspace(2000, 1e-4, 200_000) if cost(x) <= 1)
    assert best <= limit * 1.0001 and (best > limit / 1.04 or cost(best) >= 1 / 1.04)
    assert len(tries) <= most and len(set(tries)) == len(tries)


def test_a_search_ends_where_every_strength_is_within_bounds_or_none_is():
    best, _ = _search.largest(lambda strength: (0.0, strength), 1.0)
    assert 1000 / 1.04 < best <= 1000
    best, high = _search.largest(lambda strength: (math.inf, None), 1.0)
    assert best is None and 0.001 <= high < 0.001 * 1.04


def test_calibrate_stops_where_copies_cost_too_much():
    rng = np.random.default_rng(0)
    base = {"kernel": jnp.float32(rng.normal(size=(64, 64)))}
    mark = carriers.mark(KEY, base, M)
    images = np.float32(rng.normal(size=(200, 64)))
    apply_fn = lambda params, x: x @ params["kernel"]  # noqa: E731  # changes by about the strength

    found = embedding.calibrate(base, mark, apply_fn, images, max_change=0.1)
    before = np.asarray(images, np.float64) @ np.asarray(base["kernel"], np.float64)
    words = np.random.default_rng(0).choice([-1, 1], (3, M)).astype(np.int8)
    errors_of, same = [], []
    for word in words:
        copy = embedding.embed(base, mark, word, found.strength)
        after = np.asarray(images, np.float64) @ np.asarray(copy["kernel"], np.float64)
        centred, moved = (x - x.mean(axis=1, keepdims=True) for x in (before, after))
        errors_of.append(np.square(moved - centred).sum() / np.square(centred).sum())
        same.append((before.argmax(axis=1) == after.argmax(axis=1)).mean())
    np.testing.assert_allclose(found.cost.change, np.sqrt(np.mean(errors_of)), rtol=1e-4)
    np.testing.assert_allclose(found.worst.change, np.sqrt(np.max(errors_of)), rtol=1e-4)
    np.testing.assert_allclose(found.cost.agreement, np.mean(same), rtol=1e-6)
    assert 0.095 < found.cost.change <= 0.1  # the strength is known to within 4 %
    assert found.interval.change[0] < found.cost.change < found.interval.change[1]
    assert found.interval.agreement[0] < found.cost.agreement < found.interval.agreement[1]

    answers = before.argmax(axis=1)
    labelled = {"max_change": None, "max_drop": 0.02, "labels": answers}
    found = embedding.calibrate(base, mark, apply_fn, images, **labelled)
    assert found.cost.drop == pytest.approx(1 - found.cost.agreement)  # the base is right throughout
    assert 0 < found.cost.drop <= 0.02 and found.worst.drop <= 0.06
    with pytest.raises(errors.TooCostly, match=r"calibrate: expected a strength that costs at most 1e-06 of change"):
        embedding.calibrate(base, mark, apply_fn, images, max_change=1e-6)
    with pytest.raises(ValueError, match="max_drop"):
        embedding.calibrate(base, mark, apply_fn, images, max_drop=0, labels=answers)
    with pytest.raises(ValueError, match="max_drop without labels"):
        embedding.calibrate(base, mark, apply_fn, images, max_drop=0.1)
    with pytest.raises(ValueError, match="calibrate: expected finite outputs of the base"):
        embedding.calibrate(base, mark, lambda params, x: jnp.inf * (x @ params["kernel"]), images)
