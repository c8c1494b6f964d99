"""Encodes a participant's update as words, and decodes their sum on the server's side."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from smark_jax import _trees, _validate, aggregation, keys
from smark_jax.federation.task import Format

METRIC_RANGE = 16.0
"""Metrics travel in the words of the update, scaled so that this value of a metric equals one clip."""


class Mean(NamedTuple):
    """The mean of the updates in a sum.

    Attributes:
      change: mean change of every array, weighted by examples, float32.
      metrics: mean of every metric, weighted likewise.
      clipped: how many weights were clipped in all updates together.
      examples: the total number of examples.
    """

    change: dict[str, np.ndarray]
    metrics: dict[str, float]
    clipped: int
    examples: int


def encode(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    metrics: Mapping[str, Any],
    form: Format,
) -> UInt32[np.ndarray, " num_words"]:
    """A participant's message before masking: the difference between the trained model and the one it received.

    Raises:
      SmarkError: when the arrays differ in name or shape, or a metric is missing.
    """
    _trees.same("federation", [dict(before), dict(after)])
    missing = [name for name in form.metrics if name not in metrics]
    if missing:
        cause = "Return it in the MetricRecord of the train function, or take it out of the strategy's metrics."
        raise _validate.fail("federation", f"the metrics {form.metrics}", f"none named {missing}", cause)
    change = {name: np.asarray(after[name], np.float32) - np.asarray(before[name], np.float32) for name in before}
    # Clipped, not refused: a server that saw who fails would learn something about a participant's data each time.
    clipped = sum(int(np.count_nonzero(~(np.abs(array) <= form.clip))) for array in change.values())
    change = {name: np.nan_to_num(array, posinf=form.clip, neginf=-form.clip) for name, array in change.items()}
    scaled = np.array([metrics[name] for name in form.metrics], np.float32) * (form.clip / METRIC_RANGE)
    scaled = np.nan_to_num(scaled, posinf=form.clip, neginf=-form.clip)
    count = min(int(metrics[form.weight]), form.most_examples)
    clipped += int(metrics[form.weight]) > form.most_examples
    fixed = aggregation.FixedPoint(form.clip, form.num_parties)
    rounding = jax.random.wrap_key_data(jnp.asarray(keys.new().to_words()[:2]), impl="threefry2x32")
    flat = np.concatenate([*(array.reshape(-1) for array in change.values()), scaled])
    words, examples = aggregation.encode_weighted(flat, count, form.most_examples, fixed, rounding)
    return np.concatenate([np.asarray(words), np.array([clipped, examples], np.uint32)])


def decode(
    total: UInt32[np.ndarray, " num_words"], like: Mapping[str, np.ndarray], num_survivors: int, form: Format
) -> Mean:
    """Decodes a sum of messages of :func:`encode` into their mean.

    Raises:
      SmarkError: when the survivors had no examples, or are more than the format has room for.
    """
    fixed = aggregation.FixedPoint(form.clip, form.num_parties)
    flat, examples = aggregation.decode_weighted((total[:-2], total[-1]), form.most_examples, fixed, num_survivors)
    ends = np.cumsum([*(array.size for array in like.values())])
    *parts, scaled = np.split(np.asarray(flat), ends)
    change = {name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)}
    metrics = dict(zip(form.metrics, (scaled * (METRIC_RANGE / form.clip)).tolist(), strict=True))
    return Mean(change, metrics, int(total[-2]), examples)
