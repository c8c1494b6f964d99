"""What each leaf of a model is for: a weight, which may carry a mark, or something that must not be changed.

One table covers the names of all frameworks; where a name says nothing (Keras' ``vars/3``), the leaf's content decides.
When in doubt, a leaf is left unchanged: leaving out a small vector costs nothing, a negative variance ruins the copy.
"""

import enum
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Role(enum.StrEnum):
    """What a leaf is for; the value is shown to users."""

    KERNEL = "kernel"
    BIAS = "bias"
    SCALE = "scale"
    MEAN = "running mean"
    VAR = "variance"
    COUNTER = "whole numbers"
    POSITION = "position table"
    QUANTISER = "scale of a quantiser"
    BOUNDED = "values from zero up"
    WEIGHT = "weight"

    @property
    def carries(self) -> bool:
        """Whether such a leaf is trained and free to move, so that it may carry a mark."""
        return self in (Role.KERNEL, Role.BIAS, Role.SCALE, Role.WEIGHT)

    @property
    def trains(self) -> bool:
        """Whether gradients move it, unlike statistics, counters, tables and the scales of quantisers."""
        return self.carries or self is Role.BOUNDED


# By a leaf's last step, in lower case: PyTorch, Keras and TensorFlow, linen, nnx, Haiku, Sonnet, Paddle, MXNet.
_NAMES = {
    Role.KERNEL: "kernel weight w embedding embeddings weight_orig",
    Role.BIAS: "bias b beta bias_orig",
    Role.SCALE: "scale gamma",
    Role.MEAN: "mean running_mean moving_mean mean_ema _mean moving_average",
    Role.VAR: "var variance running_var moving_var moving_variance var_ema _variance running_std std",
    Role.COUNTER: "num_batches_tracked count counter step steps global_step local_step iteration iterations "
    "num_updates weight_u weight_v _u _v token_type_ids observer_enabled fake_quant_enabled",
    Role.POSITION: "position_ids position_index relative_position_index relative_coords_table inv_freq freqs_cis freqs "
    "cos_cached sin_cached attn_mask masked_bias",
    Role.QUANTISER: "zero_point zero_points scales qzeros g_idx weight_scale weight_scale_inv weight_zero_point "
    "input_scale input_zero_point output_scale output_zero_point activation_scale act_scale k_scale v_scale kv_scale "
    "min_val max_val kernel_min kernel_max absmax nested_absmax quant_map nested_quant_map scb",
}
_BY_NAME = {name: role for role, names in _NAMES.items() for name in names.split()}
# Collections that hold no weights, whatever their leaves are called: linen's, and path steps of these names.
_WITHOUT_WEIGHTS = ("batch_stats", "state", "cache", "buffers")
# nnx ends a path with "value" or "raw_value", and TensorFlow ends a name with an output number.
_ENDINGS = re.compile(r"(/(raw_)?value)?(:\d+)?$")
_RAMP = 8  # this many trained values in a row rise or fall throughout with probability 1 in 20,160
_NEAR_ZERO = 0.5
_WAVES = 0.02  # how far sin^2 + cos^2 may be from 1: rounding to bfloat16 is smaller


class Facts(NamedTuple):
    """Properties of a leaf's content; all False or zero for a leaf that is not floating-point.

    Attributes:
      shape: of the leaf.
      floating: whether its dtype is floating-point.
      narrow: whether its numbers take one byte each, as quantised weights do.
      rms: root mean square.
      low: smallest value.
      high: largest value.
      whole: whether all values are whole numbers.
      ramp: whether they rise or fall throughout, for vectors.
      waves: whether a matrix consists of sines and their cosines, in two halves or alternating.
    """

    shape: tuple[int, ...]
    floating: bool
    narrow: bool
    rms: float = 0.0
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    ramp: bool = False
    waves: bool = False

    @property
    def size(self) -> int:
        """How many values the leaf has."""
        return math.prod(self.shape)


def measured(leaf: Any) -> tuple[Any, ...]:
    """The fields of :class:`Facts` from ``rms`` on, for a non-empty floating-point leaf; for NumPy or JAX under jit."""
    with np.errstate(all="ignore"):
        wide = leaf.astype(np.float32) if leaf.dtype.itemsize < 4 else leaf
        flat, false = wide.reshape(-1), np.zeros((), bool)
        ramp = waves = false
        if flat.shape[0] >= _RAMP and max(leaf.shape) == flat.shape[0]:
            ramp = (flat[1:] > flat[:-1]).all() | (flat[1:] < flat[:-1]).all()
        if leaf.ndim > 1 and leaf.shape[-1] >= 4 and leaf.shape[-1] % 2 == 0:
            power = (wide * wide).reshape(-1, leaf.shape[-1])
            half = leaf.shape[-1] // 2
            pairs = (power[:, :half] + power[:, half:], power[:, ::2] + power[:, 1::2])
            waves = sum((abs(pair - 1) < _WAVES).all() for pair in pairs) > 0
        return (wide * wide).mean() ** 0.5, wide.min(), wide.max(), (wide == wide.round()).all(), ramp, waves


def steps(path: str) -> list[str]:
    """The steps of a leaf's path in lower case, split at ``/`` or ``.``, without endings that say nothing."""
    return _ENDINGS.sub("", path.lower()).replace(".", "/").split("/")


def of_name(path: str) -> Role | None:
    """The role that a leaf's name implies: by its last step, or the one before (``mean_ema/average``)."""
    *before, last = steps(path)
    if before and before[-1] in ("mean_ema", "var_ema", "moving_mean", "moving_variance"):
        return _BY_NAME[before[-1]]
    return _BY_NAME.get(last)


def of(facts: Mapping[str, Facts]) -> dict[str, Role]:
    """The role of each leaf, by its name and its content."""
    named = {path: _of_leaf(path, fact) for path, fact in facts.items()}
    layers: dict[str, list[str]] = {}
    for path in facts:
        layers.setdefault("/".join(steps(path)[:-1]), []).append(path)
    found = {path: role or Role.WEIGHT for path, role in named.items()}
    for paths in layers.values():
        found |= _quantisers(paths, found, facts) | _statistics(paths, named, facts)
    for path, fact in facts.items():
        if found[path].carries and fact.size > 1 and 0 <= fact.low < _NEAR_ZERO * fact.rms < math.inf:
            found[path] = Role.BOUNDED
    return found


def _of_leaf(path: str, fact: Facts) -> Role | None:
    """The role that a leaf's name and its own content imply."""
    said = of_name(path)
    if any(step in _WITHOUT_WEIGHTS for step in steps(path)[:1]):
        return said if said in (Role.VAR, Role.COUNTER) else Role.MEAN if fact.floating else Role.COUNTER
    if said is not None and not said.carries:
        return said
    if not fact.floating:
        return Role.COUNTER
    if fact.whole and math.isfinite(fact.rms) and (fact.low < fact.high or (fact.size == 1 and said is None)):
        return Role.COUNTER
    if fact.waves or (fact.ramp and said is None):
        return Role.POSITION
    return said


def _quantisers(paths: list[str], found: Mapping[str, Role], facts: Mapping[str, Facts]) -> dict[str, Role]:
    """Scales next to a zero point or to one-byte weights."""
    names = {steps(path)[-1] for path in paths}
    narrow = any(facts[path].narrow and len(facts[path].shape) > 1 for path in paths)
    if not narrow and not any("zero_point" in name for name in names):
        return {}
    scales = (path for path in paths if found[path] in (Role.SCALE, Role.WEIGHT) and facts[path].floating)
    return {path: Role.QUANTISER for path in scales}


def _statistics(paths: list[str], named: Mapping[str, Role | None], facts: Mapping[str, Facts]) -> dict[str, Role]:
    """Vectors without a recognised name, next to others of their shape of which one may be a variance."""
    found: dict[str, Role] = {}
    vectors = [path for path in paths if facts[path].floating and 1 < facts[path].size == max(facts[path].shape)]
    for path in vectors:
        alike = [other for other in vectors if facts[other].shape == facts[path].shape]
        unknown = [other for other in alike if named[other] is None]
        if path in unknown and len(alike) > 1 and any(facts[other].low >= 0 for other in unknown):
            found[path] = Role.VAR if facts[path].low >= 0 else Role.MEAN
    return found
