"""Batches: every example once, in order, and none of the filling."""

import numpy as np
import pytest

from smark_jax import _batches


@pytest.mark.parametrize(("count", "size"), [(10, 3), (9, 3), (2, 5), (5, 5)])
def test_apply_gives_each_example_its_own_result_and_calls_with_one_shape(count, size):
    shapes = set()

    def run(x, y):
        shapes.add((x.shape, y.shape))
        return x * 10 + y

    x, y = np.arange(count), np.arange(count)[::-1] / 16
    np.testing.assert_array_equal(_batches.apply(run, size, x, y), x * 10 + y)
    assert shapes == {((min(size, count),), (min(size, count),))}


def test_shuffled_leaves_out_what_fills_no_batch_and_draws_anew_each_epoch():
    rng = np.random.default_rng(0)
    first, second = (list(_batches.shuffled(rng, 103, 10)) for _ in range(2))
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [10] * 10
        assert len(set(np.concatenate(epoch).tolist())) == 100 and np.concatenate(epoch).max() < 103
    assert np.concatenate(first).tolist() != np.concatenate(second).tolist()
