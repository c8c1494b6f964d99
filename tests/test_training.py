import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parties import party_secrets
from test_parallel import apply_linear, linear_problem

from smark_jax import aggregation, parallel, training

IMAGES = np.arange(40, dtype=np.float32).reshape(20, 2)
LABELS = np.arange(20)


def test_partition_deals_each_example_to_one_party():
    images, labels = training.partition(IMAGES, LABELS, 3, seed=0)
    assert images.shape == (3, 6, 2)
    assert len(set(labels.reshape(-1).tolist())) == 18
    np.testing.assert_array_equal(images[..., 0], 2 * labels)
    again = training.partition(IMAGES, LABELS, 3, seed=0)[1]
    np.testing.assert_array_equal(labels, again)
    assert (labels != training.partition(IMAGES, LABELS, 3, seed=1)[1]).any()


def test_batches_pass_over_each_partys_data_once_an_epoch():
    images, labels = training.partition(IMAGES, LABELS, 2, seed=0)
    drawn = list(training.batches(images, labels, 3, epochs=2, seed=0))
    assert len(drawn) == training.num_batches(10, 3, 2) == 6
    for party in range(2):
        for epoch in (drawn[:3], drawn[3:]):
            seen = np.concatenate([y[party] for _, y in epoch])
            assert len(set(seen.tolist())) == 9
            assert set(seen.tolist()) <= set(labels[party].tolist())
    for x, y in drawn:
        np.testing.assert_array_equal(x[..., 0], 2 * y)
    assert (drawn[0][1] != drawn[3][1]).any()


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6])
def test_batches_go_on_where_they_were_interrupted(start):
    images, labels = training.partition(IMAGES, LABELS, 2, seed=0)
    whole = list(training.batches(images, labels, 3, epochs=2, seed=0))
    rest = list(training.batches(images, labels, 3, epochs=2, seed=0, start=start))
    assert len(rest) == 6 - start
    for (x, y), (again, labels_again) in zip(whole[start:], rest, strict=True):
        np.testing.assert_array_equal(x, again)
        np.testing.assert_array_equal(y, labels_again)


def step_and_keys(num_parties: int = 2):
    step = parallel.train_step(apply_linear, optax.adam(0.1), aggregation.FixedPoint(1.0, num_parties))
    return step, aggregation.pair_keys(party_secrets(num_parties))


def test_fit_learns_and_can_be_resumed_where_it_stopped():
    params, images, labels = linear_problem(2)
    step, pair_keys = step_and_keys()
    batches = list(training.batches(images, labels, 5, epochs=10, seed=0))
    losses = []
    state = training.fit(
        step, step.init(params), batches, pair_keys, lambda state, info: losses.append(float(info.loss))
    )
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    half = training.fit(step, step.init(params), batches[:9], pair_keys)
    resumed = training.fit(step, half, batches[9:], pair_keys)
    np.testing.assert_array_equal(resumed.params["w"], state.params["w"])


def test_fit_stops_before_it_takes_a_broken_round():
    params, images, labels = linear_problem(2)
    step, pair_keys = step_and_keys()
    broken = images.copy()
    broken[1, 2] = np.inf
    kept = []
    batches = [(images, labels), (images, labels), (broken, labels), (images, labels)]
    with pytest.raises(ValueError, match=r"fit: expected finite gradients .* from 1 in round 2"):
        training.fit(step, step.init(params), batches, pair_keys, lambda state, info: kept.append(state))
    assert len(kept) == 2
    assert np.isfinite(kept[-1].params["w"]).all()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="num_parties"):
        training.partition(IMAGES, LABELS, 0, seed=0)
    with pytest.raises(ValueError, match="20 examples for 21 parties"):
        training.partition(IMAGES, LABELS, 21, seed=0)
    with pytest.raises(ValueError, match="20 images and 19 labels"):
        training.partition(IMAGES, LABELS[:-1], 2, seed=0)
    images, labels = training.partition(IMAGES, LABELS, 2, seed=0)
    with pytest.raises(ValueError, match="batch size of at most 10"):
        training.batches(images, labels, 11, 1, seed=0)
    with pytest.raises(ValueError, match="epochs"):
        training.batches(images, labels, 5, 0, seed=0)


def squares(params, x, y, scale):
    """Least squares of a line, whose gradient NumPy has in closed form."""
    return scale * jnp.mean(jnp.square(x * params["w"] - y))


def line():
    x = np.linspace(-1, 1, 24, dtype=np.float32)
    return x, 2 * x + np.float32(0.5)


def test_minimise_takes_the_steps_that_numpy_takes():
    batches = list(training.minibatches(line(), batch_size=8, epochs=3, seed=4))
    optimizer, told = optax.sgd(0.1), []
    state, info = training.minimise(
        squares,
        optimizer,
        training.begin({"w": jnp.float32(0)}, optimizer),
        batches,
        arguments=(2.0,),
        total=9,
        on_progress=lambda done, total, loss: told.append((done, total, float(loss))),
    )
    w, losses = 0.0, []
    for x, y in batches:
        losses.append(2 * np.mean((x * w - y) ** 2, dtype=np.float64))
        w -= 0.1 * 2 * np.mean(2 * x * (x * w - y), dtype=np.float64)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(info.losses, losses, rtol=1e-5)
    assert told == [(done, 9, float(loss)) for done, loss in enumerate(info.losses, 1)]


def test_minimise_goes_on_where_it_stopped_with_what_the_loss_carries():
    def counting(params, seen, x, y):
        return squares(params, x, y, 1.0), seen + x.size

    def run(state, stop=None):
        draws = training.minibatches(line(), batch_size=8, epochs=4, seed=1, start=state.steps)
        return training.minimise(counting, optimizer, state, itertools.islice(draws, stop))[0]

    optimizer = optax.adam(0.05)
    start = training.begin({"w": jnp.float32(0)}, optimizer, carried=jnp.int32(0))
    whole, half = run(start), run(start, 5)
    assert (half.steps, whole.steps, int(whole.carried)) == (5, 12, 96)
    again = run(half)
    np.testing.assert_array_equal(again.params["w"], whole.params["w"])
    assert int(again.carried) == 96
    with pytest.raises(ValueError, match=r"minibatches: expected arrays of the same length, 25 or more"):
        training.minibatches(line(), batch_size=25, epochs=1, seed=0)
