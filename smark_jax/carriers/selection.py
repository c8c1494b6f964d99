"""The leaves of a model that carry a fingerprint, as one vector of weights in units of their RMS."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from smark_jax import _roles, _trees, _validate
from smark_jax._types import AnyArray, PyTree

# Tied leaves have at least this many weights, since a few equal numbers may be chance.
_LEAST_TIED = 16


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One carrying leaf.

    Attributes:
      path: its steps joined by ``/``.
      shape: of the leaf.
      tied: other names of the same tensor, which are written together with it (see :func:`with_ties`).
    """

    path: str
    shape: tuple[int, ...]
    tied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many weights the leaf has."""
        return math.prod(self.shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("scales",), meta_fields=("leaves",))
@dataclasses.dataclass(frozen=True)
class Spec:
    """The carrying leaves in order. A pytree: the scales are data, the rest is static.

    So a jitted function that takes a spec is compiled once for all models of an architecture.

    Attributes:
      leaves: the leaves, static.
      scales: the RMS of each leaf in the base model. :func:`select` gives Python floats, which keep full precision
        outside jit.
    """

    leaves: tuple[Leaf, ...]
    scales: tuple[float | Array, ...]

    @property
    def num_weights(self) -> int:
        """D, the length of the vector that :func:`read` returns."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def factors(self) -> tuple[float | Array, ...]:
        """One over each scale: reading multiplies the weights by these factors."""
        return tuple(1 / scale for scale in self.scales)


def select(params: PyTree, match: str | Callable[[str], object] | None = None) -> Spec:
    """Chooses the leaves that carry, from the base model alone.

    Every leaf of trained weights carries (:func:`roles`) unless ``match`` excludes it. These leaves do not carry:

    - leaves that are all zero (a fresh bias), which have no scale to hide a mark in;
    - running statistics, counters, position tables and the scales of quantisers: marking them would break a copy, or
      further training would replace them;
    - leaves that come near zero and have no negative value.

    Of tied leaves, the first carries and the others receive the same values.

    Args:
      params: the base model's parameter pytree (with batch norm: its whole variables dict).
      match: a regular expression searched in each leaf's path (``"kernel"``, ``"Conv"``), or a predicate on it.

    Returns:
      The selection, with each leaf's RMS as its scale.

    Raises:
      SmarkError: when no leaf is left, or a leaf holds NaN or infinite weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"dense": {"bias": jnp.zeros(4), "kernel": jnp.ones((3, 4))}}
      >>> [leaf.path for leaf in select(params).leaves]
      ['dense/kernel']
    """
    named = _named("select", params)
    wanted = predicate(match)
    facts = _facts(named)
    found = _roles.of(facts)
    chosen = {path: fact for path, fact in facts.items() if found[path].carries and fact.floating and wanted(path)}
    for path, fact in chosen.items():
        _validate.all_finite("select", f"weights in leaf {path!r}", math.isfinite(fact.rms))
    leaves: dict[str, Leaf] = {}
    taken: set[str] = set()
    for path, fact in chosen.items():
        if fact.rms > 0 and path not in taken:
            leaves[path] = Leaf(path, fact.shape, _twins(path, named, facts))
            taken |= {path, *leaves[path].tied}
    if not leaves:
        some = ", ".join(f"{path} ({found[path]})" for path in itertools.islice(named, 5)) or "none at all"
        raise _validate.fail(
            "select",
            "at least one floating-point leaf of trained weights that is not all zeros",
            f"none that matches {match!r}" if isinstance(match, str) else "none",
            f"The model's leaves: {some}{', ...' if len(named) > 5 else ''}.",
        )
    return Spec(tuple(leaves.values()), tuple(chosen[path].rms for path in leaves))


def predicate(match: str | Callable[[str], object] | None) -> Callable[[str], object]:
    """``match`` of :func:`select` as a predicate on a leaf's path."""
    if match is None:
        return lambda path: True
    return match if callable(match) else _expression(match).search


def roles(params: PyTree) -> dict[str, _roles.Role]:
    """What each leaf is for, by its path: recognised by the names of any framework and by content.

    Raises:
      SmarkError: when two leaves have the same path.

    Examples:
      >>> import jax.numpy as jnp
      >>> norm = {"gamma": jnp.ones(3), "moving_variance": jnp.ones(3)}
      >>> [f"{path}: {role}" for path, role in roles({"norm": norm}).items()]
      ['norm/gamma: scale', 'norm/moving_variance: variance']
    """
    return _roles.of(_facts(_named("roles", params)))


def with_ties(spec: Spec, base: PyTree) -> Spec:
    """The selection, with the other names that its leaves' tensors have in ``base``.

    Leaves are tied if they have the same shape, dtype and values, have at least 16 weights and are not constant: an
    embedding that is also the output layer. A leaf that itself carries is not tied to another.
    """
    named = _named("with_ties", base)
    own = {leaf.path for leaf in spec.leaves} & named.keys()
    kind = {path: (leaf.shape, leaf.dtype) for path, leaf in named.items()}
    others = {path for path in named if path not in own and kind[path] in {kind[name] for name in own}}
    if not others:
        return spec
    alike = {kind[path] for path in others}
    facts = _facts({path: named[path] for path in named if path in others or (path in own and kind[path] in alike)})
    ties = {path: tuple(p for p in _twins(path, named, facts) if p in others) for path in own & facts.keys()}
    leaves = tuple(dataclasses.replace(leaf, tied=ties.get(leaf.path, ())) for leaf in spec.leaves)
    return dataclasses.replace(spec, leaves=leaves)


def with_tied(leaves: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """Leaves by name, with the missing names of tied leaves added, since files drop them."""
    found = dict(leaves)
    for leaf in spec.leaves:
        there = [name for name in (leaf.path, *leaf.tied) if name in leaves]
        found |= {name: leaves[there[0]] for name in (leaf.path, *leaf.tied) if there and name not in leaves}
    return found


def _named(who: str, params: PyTree) -> dict[str, Any]:
    """The leaves by path, as arrays."""
    named = _trees.named(who, params)
    return {path: leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for path, leaf in named.items()}


def _facts(named: Mapping[str, Any]) -> dict[str, _roles.Facts]:
    found = {}
    for path, leaf in named.items():
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        narrow = leaf.dtype != bool and leaf.dtype.itemsize == 1
        found[path] = (leaf.shape, floating, narrow, _measure(leaf) if floating and leaf.size else ())
    found = jax.device_get(found)
    return {
        path: _roles.Facts(tuple(shape), floating, narrow, *(value.item() for value in content))
        for path, (shape, floating, narrow, content) in found.items()
    }


def _measure(leaf: Any) -> tuple[Any, ...]:
    """Measures with NumPy where that needs no copy of the leaf, since compiling for each shape would take longer."""
    here = not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and leaf.is_fully_replicated)
    if here and (not isinstance(leaf, jax.Array) or all(device.platform == "cpu" for device in leaf.devices())):
        return _roles.measured(np.asarray(leaf))
    return _measured(leaf)


_measured = jax.jit(_roles.measured)


def _twins(path: str, named: Mapping[str, Any], facts: Mapping[str, _roles.Facts]) -> tuple[str, ...]:
    """The other names of a leaf's tensor."""
    leaf, fact = named[path], facts[path]
    if fact.size < _LEAST_TIED or fact.low == fact.high:
        return ()
    alike = (other for other in facts if facts[other] == fact and other != path)
    return tuple(p for p in alike if named[p].dtype == leaf.dtype and bool((named[p] == leaf).all()))


def _expression(match: str) -> re.Pattern[str]:
    try:
        return re.compile(match)
    except (re.error, OverflowError, RecursionError) as error:
        cause = "The characters ( ) [ ] * + ? . are special: write \\( for a bracket, or give only a part of the name."
        raise _validate.fail("select", "a regular expression", f"{match[:60]!r} ({error})", cause) from None


def read(params: PyTree, spec: Spec) -> Float[Array, " D"]:
    """The carrying weights as one float32 vector, each leaf divided by its scale in ``spec``, shape [D].

    Raises:
      SmarkError: when a carrying leaf is missing from ``params`` or has another shape.
    """
    return read_leaves(carrying("read", params, spec), spec.factors)


def finite(params: PyTree, spec: Spec) -> Bool[Array, ""]:
    """Whether no carrying weight is NaN or infinite; unlike a check on :func:`read`, it builds no vector.

    Raises:
      SmarkError: when a carrying leaf is missing from ``params`` or has another shape.
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
      SmarkError: when a carrying leaf is missing or has another shape, or ``vector`` has another length.
    """
    _validate.vector("write", "vector", vector, spec.num_weights, "Was it made for another model's spec?")
    return replace(params, spec, _write(narrow("write", params, spec), spec, vector))


@jax.jit
def _write(leaves: list[Any], spec: Spec, vector: Array) -> list[Array]:
    return add(leaves, changes(vector, spec))


def narrow(who: str, params: PyTree, spec: Spec) -> list[Any]:
    """The carrying leaves in the order of ``spec``; None for host arrays that JAX would convert to a narrower dtype."""
    leaves = carrying(who, params, spec)
    return [None if _too_wide(leaf) else leaf for leaf in leaves]


def _too_wide(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | np.generic) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def replace(params: PyTree, spec: Spec, leaves: list[Any]) -> PyTree:
    """``params`` with new carrying leaves, in the order of ``spec``; the rest and all types stay as they were.

    Where :func:`narrow` has None, ``leaves`` hold the change, which is added here in the leaf's own dtype.
    """
    by_path = {}
    for leaf, old, new in zip(spec.leaves, carrying("replace", params, spec), leaves, strict=True):
        if _too_wide(old):  # under the caller's jit, JAX's narrower array has to suffice
            new = old + (new if _validate.is_traced(new) else np.asarray(new).astype(old.dtype))
        by_path |= dict.fromkeys((leaf.path, *leaf.tied), new)
    return _trees.map_named(by_path.get, params)


def check_params(who: str, params: PyTree, spec: Spec) -> None:
    """Refuses, in the name of ``who``, a model that lacks a carrying leaf or has one of another shape.

    Raises:
      SmarkError: with the leaf, the base's shape and the shape found.
    """
    carrying(who, params, spec)


def carrying(who: str, params: PyTree, spec: Spec) -> list[Any]:
    """The leaves that ``spec`` names, in its order."""
    named = _trees.named(who, params)
    if any(leaf.tied for leaf in spec.leaves):
        named = with_tied(named, spec)
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


@jax.jit
def read_leaves(leaves: list[Any], factors: tuple[float | Array, ...]) -> Float[Array, " D"]:
    """:func:`read` for carrying leaves given in order, each with one over its scale."""
    scaled = [jnp.ravel(x).astype(jnp.float32) * factor for x, factor in zip(leaves, factors, strict=True)]
    # The barrier keeps XLA from fusing the products into the concatenation and computing it weight by weight.
    return jnp.concatenate(jax.lax.optimization_barrier(scaled))


def changes(vector: Array, spec: Spec) -> list[Array]:
    """The changes of the carrying leaves for a vector of shape [D] in units of their scales."""
    found, start = [], 0
    for leaf, scale in zip(spec.leaves, spec.scales, strict=True):
        found.append(vector[start : start + leaf.size].reshape(leaf.shape) * scale)
        start += leaf.size
    return found


def add(leaves: list[Any], changes: list[Array]) -> list[Array]:
    """The leaves of :func:`narrow` with the changes added; in place of None, the change to add."""
    added = []
    for x, change in zip(leaves, changes, strict=True):
        if x is not None:
            wide = x if x.dtype.itemsize > 4 else x.astype(jnp.float32)
            change = (wide + change).astype(x.dtype)
        added.append(change)
    return added
