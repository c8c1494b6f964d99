import conftest
import numpy as np
import optax
import pytest
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
    return step, aggregation.pair_keys(conftest.party_secrets(num_parties))


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
