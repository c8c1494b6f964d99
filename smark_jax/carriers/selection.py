"""The leaves of a model that carry a fingerprint, as one vector of weights in units of their spread."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from smark_jax import _validate
from smark_jax._types import AnyArray, PyTree


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One carrying leaf: its path (steps joined by ``/``), its shape, and its root mean square in the base model."""

    path: str
    shape: tuple[int, ...]
    scale: float

    @property
    def size(self) -> int:
        """How many weights the leaf has."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The carrying leaves in order. Hashable, so it is a static argument under jit."""

    leaves: tuple[Leaf, ...]

    @property
    def num_weights(self) -> int:
        """D, the length of the vector that :func:`read` returns."""
        return sum(leaf.size for leaf in self.leaves)


def select(params: PyTree, match: str | Callable[[str], object] | None = None) -> Spec:
    """Chooses the leaves that carry, from the base model alone.

    Every floating-point leaf carries unless ``match`` says otherwise. A leaf that is zero throughout (a fresh bias) has
    no spread to hide in and is passed over; so are integer leaves (step counters) and the running statistics of batch
    norm (``batch_stats``), which any further training replaces.

    Args:
      params: the base model's parameter pytree (with batch norm: its whole variables dict).
      match: a regular expression searched in each leaf's path (``"kernel"``, ``"Conv"``), or a predicate on it.

    Returns:
      The selection, with each leaf's root mean square as its scale.

    Raises:
      ValueError: when no leaf is left, or a leaf holds NaN or infinite weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"dense": {"bias": jnp.zeros(4), "kernel": jnp.ones((3, 4))}}
      >>> [leaf.path for leaf in select(params).leaves]
      ['dense/kernel']
    """
    names = [_validate.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _validate.fail("select", "a path of its own for each leaf", f"{twice!r} twice", "Is '/' part of a name?")
    wanted: Callable[[str], object]
    if match is None:
        wanted = lambda path: True  # noqa: E731
    else:
        wanted = match if callable(match) else _expression(match).search
    named = [(_validate.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    carrying = {
        name: jnp.asarray(leaf)
        for name, leaf in named
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not _validate.is_statistic(name) and wanted(name)
    }
    scales = jax.device_get({name: _rms(leaf) for name, leaf in carrying.items()})
    for name, scale in scales.items():
        _validate.all_finite("select", f"weights in leaf {name!r}", math.isfinite(scale))
    leaves = [Leaf(name, leaf.shape, float(scales[name])) for name, leaf in carrying.items() if scales[name] > 0]
    if not leaves:
        some = ", ".join(name for name, _ in named[:5]) or "none at all"
        raise _validate.fail(
            "select",
            "at least one floating-point leaf that is not all zeros",
            f"none that matches {match!r}" if match is not None else "none",
            f"The model's leaves: {some}{', ...' if len(named) > 5 else ''}.",
        )
    return Spec(tuple(leaves))


def _expression(match: str) -> re.Pattern[str]:
    try:
        return re.compile(match)
    except (re.error, OverflowError, RecursionError) as error:
        cause = "In one, ( ) [ ] * + ? . have meanings of their own: write \\( for a bracket, or part of a leaf's name."
        raise _validate.fail("select", "a regular expression", f"{match[:60]!r} ({error})", cause) from None


@jax.jit
def _rms(leaf: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))))


def read(params: PyTree, spec: Spec) -> Float[Array, " D"]:
    """The carrying weights as one float32 vector, each leaf divided by its scale in ``spec``, shape [D].

    Raises:
      ValueError: when a carrying leaf is missing from ``params`` or has another shape.
    """
    return _read(carrying("read", params, spec), spec)


def finite(params: PyTree, spec: Spec) -> Bool[Array, ""]:
    """Whether no carrying weight is NaN or infinite; unlike a look at :func:`read`, it makes no vector of them.

    Raises:
      ValueError: when a carrying leaf is missing from ``params`` or has another shape.
    """
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in carrying("finite", params, spec)]).all()


def write(params: PyTree, spec: Spec, vector: Float[AnyArray, " D"]) -> PyTree:
    """Adds ``vector``, in the same units, to the carrying weights; the other leaves and all dtypes stay as they are.

    Args:
      params: the pytree to add to.
      spec: its carrying leaves.
      vector: what to add, shape [D].

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: when a carrying leaf is missing or has another shape, or ``vector`` has another length.
    """
    _validate.vector("write", "vector", vector, spec.num_weights, "Was it made for another model's spec?")
    changed = _write(carrying("write", params, spec), spec, vector)
    return replace(params, spec, changed)


def replace(params: PyTree, spec: Spec, leaves: list[Array]) -> PyTree:
    """``params`` with other carrying leaves, in the order of ``spec``."""
    by_path = {leaf.path: value for leaf, value in zip(spec.leaves, leaves, strict=True)}
    return jax.tree_util.tree_map_with_path(lambda path, old: by_path.get(_validate.path_name(path), old), params)


def check_params(who: str, params: PyTree, spec: Spec) -> None:
    """Refuses, in the name of ``who``, a model that lacks a carrying leaf or has one of another shape.

    Raises:
      ValueError: naming the leaf, the shape that the base has and the one that came.
    """
    carrying(who, params, spec)


def carrying(who: str, params: PyTree, spec: Spec) -> list[Any]:
    """The leaves that ``spec`` names, in its order."""
    named = {_validate.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    missing = [leaf.path for leaf in spec.leaves if leaf.path not in named]
    if missing:
        raise _validate.fail(
            who,
            f"the {len(spec.leaves)} carrying leaves of the base model",
            f"a model without {', '.join(map(repr, missing[:3]))}",
            "Is it another architecture, or nested one level deeper (pass variables['params'])?",
        )
    for leaf in spec.leaves:
        if jnp.shape(named[leaf.path]) != leaf.shape:
            carries = sum(math.prod(jnp.shape(named[other.path])) for other in spec.leaves)
            raise _validate.fail(
                who,
                f"leaf {leaf.path!r} of shape {leaf.shape} ({spec.num_weights:,} carrying weights in all)",
                f"shape {jnp.shape(named[leaf.path])} ({carries:,} weights)",
                "Is it another model, or a layer of another width? (Dummy neurons: run alignment.align first.)",
            )
    return [named[leaf.path] for leaf in spec.leaves]


@functools.partial(jax.jit, static_argnames="spec")
def _read(leaves: list[Array], spec: Spec) -> Array:
    scaled = [jnp.ravel(x).astype(jnp.float32) * (1 / leaf.scale) for x, leaf in zip(leaves, spec.leaves, strict=True)]
    # The barrier keeps XLA from fusing the products into the concatenation, which it would then make weight by weight.
    return jnp.concatenate(jax.lax.optimization_barrier(scaled))


@functools.partial(jax.jit, static_argnames="spec")
def _write(leaves: list[Array], spec: Spec, vector: Array) -> list[Array]:
    changed, start = [], 0
    for x, leaf in zip(leaves, spec.leaves, strict=True):
        delta = vector[start : start + leaf.size].reshape(leaf.shape) * leaf.scale
        changed.append((x.astype(jnp.float32) + delta).astype(x.dtype))
        start += leaf.size
    return changed
