"""Informed extraction: the soft chips in the difference between a suspect and the base model.

The base is subtracted because its weights are by far the largest noise that a read-out could contain. One compiled
function serves all suspects and all models of an architecture: suspect, base and mark are arguments.

A suspect may be incomplete. Carrying leaves that it lacks or has in another shape, and weights that are NaN or
infinite, are left out: they count neither for nor against anybody. Shifts are bounded
(:mod:`smark_jax.carriers.shifts`), so that a few huge weights do not drown the others. :func:`coverage` says what was
left out. All of this depends on suspect and base only.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smark_jax import _trees, _validate, carriers
from smark_jax._types import PyTree
from smark_jax.carriers import hadamard, marks, selection, shapes, sharded, shifts
from smark_jax.extraction import rectification, weighting

# extract_batch reads this many suspects at a time, so that working memory does not grow with the batch.
_SUSPECTS_PER_PASS = 8


class LeftOut(NamedTuple):
    """Weights of a carrying leaf that are not read: the leaf's name in the base, how many, and why."""

    leaf: str
    weights: int
    reason: str


class Coverage(NamedTuple):
    """The part of a suspect that is read.

    Attributes:
      weights: carrying weights of the base; for a white mark without those that the carrier does not cover (a tail of
        the last leaves), for one with a shape without its vectors, which are no evidence.
      read: how many of these the suspect has; too low where single weights of the tail's first leaf are missing.
      left_out: the others, by leaf.
      bounded: weights whose shift exceeds the bound: it counts as ``bound``, or as none where the mark has a shape.
      bound: in units of their leaf's RMS; 0 where the mark has a shape.
    """

    weights: int
    read: int
    left_out: tuple[LeftOut, ...]
    bounded: int
    bound: float

    def __str__(self) -> str:
        missing = sum(left.weights for left in self.left_out)
        parts = [f"{left.leaf} ({left.weights:,}: {left.reason})" for left in self.left_out]
        lines = [f"{missing:,} weights were left out: {', '.join(parts)}"] if parts else []
        what = f"{self.bounded:,} weights are so far from the base's that they count as "
        what += f"{self.bound:g} RMS away" if self.bound else "unchanged"
        return "; ".join(lines + [what] * bool(self.bounded)) or "all carrying weights were read"


def extract(suspect: PyTree, base: PyTree, mark: carriers.Mark, rectify: bool = False) -> Float[Array, " m"]:
    r"""The suspect's soft chips: ``despread`` of its weights' shifts from the base's, shape [m].

    A copy embedded at strength s reads ``s * sqrt(D / m)`` times its codeword; the mean of several copies reads the
    mean of theirs. :func:`smark_jax.tracing.trace` does not depend on the scale. Composes with jit, vmap and grad
    (where the base's values cannot be checked).

    Carrying leaves that the suspect lacks, has in another shape or not as floating-point numbers, and weights that are
    NaN or infinite, read as zero: they are left out (:func:`coverage` counts them). Shifts beyond the bound of
    :mod:`smark_jax.carriers.shifts` count as that bound; copies, and attacks that a model survives, stay within it.

    Pruning, regularisation and coarse quantisation move a weight by far more than a mark does, mostly in a way that
    depends on the weight itself. ``rectify`` reads the score :math:`\partial_b \log p(s \mid b)` of the suspect's
    weight s given the base's weight b, which is the locally most powerful statistic for a small shift of b. By Bayes'
    rule it is the score of :math:`p(b \mid s)` plus a function of b. With :math:`p(b \mid s)` taken as normal, this
    gives :math:`q = (\mathrm{E}[b \mid s] - b) / (v + \bar v / 10)` less :math:`\mathrm{E}[q \mid b]`. In each leaf
    the means are piecewise linear over bins of at least 128 weights, v is the mean square of the numerator in the bin
    of s, and :math:`\bar v` that in the leaf; q is scaled to a mean weight of 1. So a pruned weight says little, and a
    kept one much. An intact copy reads as without ``rectify``, except for a share of bins over weights, below 1 %.
    Shifts are bounded leaf by leaf. A leaf is left out if its shifts are a thousand times smaller than typical, or if
    the base predicts it completely (alignment takes leaves that have nothing in common with the base from the base).
    The reading depends on suspect and base only, so the bound on false accusation holds as without ``rectify``. Decide
    on ``rectify`` before tracing; if you try both ways, count them in ``num_alignments`` of ``trace``.

    Parameters that are split over a mesh of devices (leaves with a ``NamedSharding``) are read in place: only chips
    cross between devices, and each device also holds the carrier (about a byte per weight of the whole model). If
    suspect and base are split differently, the base's leaves are moved; if only the base is split, the suspect's are.
    This does not hold with ``rectify``, which sorts whole leaves, nor under a jit of your own, where the compiler
    decides.

    Args:
      suspect: the model to read, with the base's structure.
      base: the model that the copies were made from.
      mark: the model's mark.
      rectify: subtract what suspect and base predict of each other, and weight the rest by its information.

    Returns:
      Soft chips in units of the leaves' RMS, shape [m].

    Raises:
      SmarkError: when the suspect has no carrying leaf, the base lacks one or holds NaN or infinite weights, the
        carrier was drawn for another number of weights, or one model's leaves are split over several meshes.
    """
    marks.check("extract", mark, base)
    spec = mark.spec
    found, original = carried("extract", suspect, base, spec)
    where = None if rectify else sharded.layout("extract", found, spec) or sharded.layout("extract", original, spec)
    if mark.shape is not None:
        chips, ok = _shaped(_leaves(found, spec), _leaves(original, spec), mark, where, rectify)
    elif where is None:
        chips, ok = _extract(_leaves(found, spec), _leaves(original, spec), spec.factors, mark.carrier, rectify)
    else:
        chips, ok = sharded.despread_difference(found, original, mark, where)
    _validate.all_finite("extract", "carrying weights in the base", ok)
    return chips


def extract_vectors(suspect: PyTree, base: PyTree, mark: carriers.Mark) -> Float[Array, " m"]:
    """The chips in the leaves of a shaped mark that :func:`extract` does not count as evidence: gains and biases.

    They are read in the same way. Usual attacks leave these leaves alone, and whoever wants to can reset them, so what
    they say is reported beside the verdict and is not part of it. Chips of zero where a mark has no such leaves.

    Raises:
      SmarkError: as :func:`extract`, or when the mark has no shape.
    """
    marks.check("extract_vectors", mark, base)
    if mark.shape is None:
        cause = "Without a shape, extract reads all leaves together."
        raise _validate.fail("extract_vectors", "a mark with a shape", "one without", cause)
    found, original = carried("extract_vectors", suspect, base, mark.spec)
    chips, ok = weighting.read(_leaves(found, mark.spec), _leaves(original, mark.spec), mark, vectors=True)
    _validate.all_finite("extract_vectors", "carrying weights in the base", ok)
    return chips


def _shaped(
    found: list[Any], base: list[Any], mark: carriers.Mark, where: sharded.Layout | None, rectify: bool
) -> tuple[Array, Array]:
    """The one reading of a mark with a shape, and whether the base is finite."""
    if rectify:
        cause = "The one reading of a shaped mark already subtracts shrinkage and weighs."
        raise _validate.fail("extract", "a mark without a shape to rectify", "one with a shape", cause)
    if where is None:
        return weighting.read(found, base, mark)
    where = sharded.automatic(where)
    found, base = (sharded.placed(leaves, where) for leaves in (found, base))
    values, mean, ok = weighting.parts(found, base, mark)
    return sharded.despread_parts(values, mark, where) / mean, ok


def extract_batch(suspects: PyTree, base: PyTree, mark: carriers.Mark) -> Float[Array, "M m"]:
    """:func:`extract` of M suspects at once.

    Args:
      suspects: pytree whose leaves carry a leading axis of M suspects.
      base: the model that the copies were made from, without that axis.
      mark: the model's mark.

    Returns:
      Soft chips, shape [M, m].

    Raises:
      SmarkError: as :func:`extract`, or when the leaves disagree about M.
    """
    number = _validate.stacked("extract_batch", "suspects", suspects)
    marks.check("extract_batch", mark, base)
    spec = mark.spec
    found, original = (_leaves(part, spec) for part in carried("extract_batch", suspects, base, spec, number))
    if mark.shape is None:
        chips, ok = _extract_batch(found, original, spec.factors, mark.carrier)
    else:
        chips, ok = weighting.read_batch(found, original, mark, _SUSPECTS_PER_PASS)
    _validate.all_finite("extract_batch", "carrying weights in the base", ok)
    return chips


def coverage(suspect: PyTree, base: PyTree, mark: carriers.Mark) -> Coverage:
    """How much of a suspect :func:`extract` reads, and what it leaves out.

    Args:
      suspect: the model to read.
      base: the model that the copies were made from.
      mark: the model's mark.

    Raises:
      SmarkError: when the base lacks a carrying leaf, or the carrier was drawn for another number of weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, extraction, keys
      >>> base = {"bias": jnp.cos(jnp.arange(90.0)), "kernel": jnp.sin(jnp.arange(9000.0))}
      >>> mark = carriers.mark(keys.from_bytes(bytes(32)), base, 64)
      >>> print(extraction.coverage({"kernel": base["kernel"].at[:3].set(jnp.nan)}, base, mark))
      93 weights were left out: bias (90: missing), kernel (3: NaN or infinite)
    """
    marks.check("coverage", mark, base)
    spec, total = mark.spec, mark.carrier.num_carrying
    odd = _odd(suspect, spec)
    found, original = (_leaves(part, spec) for part in carried("coverage", suspect, base, spec, require=False))
    if mark.shape is None:
        ends = list(itertools.accumulate(leaf.size for leaf in spec.leaves))
        carries = [min(max(0, total - end + leaf.size), leaf.size) for leaf, end in zip(spec.leaves, ends, strict=True)]
        counts, limit, beyond = jax.device_get(_counts(found, original, spec.factors))
    else:
        carries = [0 if shapes.is_vector(leaf) else leaf.size for leaf in spec.leaves]
        counts, limit, beyond = jax.device_get(weighting.counts(found, original, mark))
    left_out, read = [], 0
    for leaf, broken, most in zip(spec.leaves, counts, carries, strict=True):
        if leaf.path in odd:
            left_out.append(LeftOut(leaf.path, leaf.size, odd[leaf.path]))
            continue
        if broken:
            left_out.append(LeftOut(leaf.path, int(broken), "NaN or infinite"))
        read += max(0, most - int(broken))
    return Coverage(sum(carries), read, tuple(left_out), int(beyond), float(limit))


def least_weights(num_chips: int, threshold: float) -> int:
    r"""How many of a copy's weights must remain for it to be traceable at all.

    If n out of D weights of an intact copy remain, evenly distributed, a chip reads :math:`(n / D) \delta b_i` and the
    other chips add noise of variance :math:`(n / D)(1 - n / D) \delta^2 m / D`, so that :math:`T^2` is at most
    m / (1 + m / n). That reaches :math:`t^2` once :math:`n = m t^2 / (m - t^2)`.

    Args:
      num_chips: m.
      threshold: t, the absolute T from which a customer is accused; if it is infinite or t^2 >= m, no number suffices.

    Returns:
      n, rounded up; 0 where no number suffices, since then the chips are too few and the suspect is not to blame.
    """
    square = threshold**2
    return math.ceil(num_chips * square / (num_chips - square)) if square < num_chips else 0


def _odd(suspect: PyTree, spec: carriers.Spec, number: int | None = None) -> dict[str, str]:
    """The carrying leaves that are missing in the suspect or differ from the base's in form, and why."""
    stacked = () if number is None else (number,)
    named = _trees.named("extract", suspect)
    odd = {}
    for leaf in spec.leaves:
        if leaf.path not in named:
            odd[leaf.path] = "missing"
        elif (shape := np.shape(named[leaf.path])) != (*stacked, *leaf.shape):
            odd[leaf.path] = f"of shape {shape} where the base's is {leaf.shape}"
        elif not jnp.issubdtype(dtype := _dtype(named[leaf.path]), jnp.floating):
            odd[leaf.path] = f"of type {dtype}"
    return odd


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def carried(
    who: str, suspect: PyTree, base: PyTree, spec: carriers.Spec, number: int | None = None, require: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The carrying leaves of suspect and base by path; the base's own replace odd leaves of the suspect (shift zero).

    Args:
      who: the function that refuses.
      suspect: a suspect, or a stack of them.
      base: whose leaves are known to be complete.
      spec: the carrying leaves.
      number: of suspects in the stack.
      require: whether to refuse a suspect without any leaf to read.
    """
    odd, named, whole = _odd(suspect, spec, number), _trees.named("extract", suspect), _trees.named("extract", base)
    if require and len(odd) == len(spec.leaves):
        first = {name: leaf[0] if number is not None else leaf for name, leaf in named.items()}
        selection.check_params(f"{who}: suspect", first, spec)
        path, reason = next(iter(odd.items()))
        cause = "Is it a weights file?"
        raise _validate.fail(f"{who}: suspect", "floating-point weights", f"leaf {path!r} {reason}", cause)

    def own(path: str) -> Any:
        return whole[path] if number is None else jnp.broadcast_to(whole[path], (number, *jnp.shape(whole[path])))

    found = {leaf.path: own(leaf.path) if leaf.path in odd else _single(named[leaf.path]) for leaf in spec.leaves}
    return found, {leaf.path: whole[leaf.path] for leaf in spec.leaves}


def _leaves(named: Mapping[str, Any], spec: carriers.Spec) -> list[Any]:
    return [named[leaf.path] for leaf in spec.leaves]


def _single(leaf: Any) -> Any:
    """Converts host float64 to float32; JAX would warn where a weight is beyond float32's range."""
    if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64:
        with np.errstate(over="ignore"):
            return leaf.astype(np.float32)
    return leaf


@jax.jit
def _counts(
    found: Sequence[Array], base: Sequence[Array], factors: Sequence[float | Array]
) -> tuple[list[Array], Array, Array]:
    """The number of NaN or infinite weights by leaf, the bound, and how many shifts are beyond it."""
    vector = _shifts(found, base, factors)
    limit = shifts.bound([vector])
    broken = [jnp.sum(~jnp.isfinite(jnp.asarray(leaf).astype(jnp.float32))) for leaf in found]
    return broken, limit, jnp.sum(jnp.abs(vector) > limit)


def _shifts(found: Sequence[Array], base: Sequence[Array], factors: Sequence[float | Array]) -> Float[Array, " D"]:
    """The shifts of all carrying weights, unbounded."""
    parts = [shifts.shift(*part).reshape(-1) for part in zip(found, base, factors, strict=True)]
    # The barrier keeps XLA from fusing the products into the concatenation and computing it weight by weight.
    return jnp.concatenate(jax.lax.optimization_barrier(parts))


@functools.partial(jax.jit, static_argnames="rectify")
def _extract(
    suspect: Sequence[Array],
    base: Sequence[Array],
    factors: Sequence[float | Array],
    carrier: carriers.Carrier,
    rectify: bool = False,
) -> tuple[Array, Array]:
    ok = jnp.stack([jnp.isfinite(leaf).all() for leaf in base]).all()
    vector = _shifts(suspect, base, factors)
    limit = shifts.bound([vector])
    if rectify:
        return hadamard.despread(rectification.scores(suspect, base, factors, limit), carrier), ok
    return hadamard.despread(jnp.clip(vector, -limit, limit), carrier), ok


@jax.jit
def _extract_batch(
    suspects: Sequence[Array], base: Sequence[Array], factors: Sequence[float | Array], carrier: carriers.Carrier
) -> tuple[Array, Array]:
    chips, ok = jax.lax.map(
        lambda suspect: _extract(suspect, base, factors, carrier), suspects, batch_size=_SUSPECTS_PER_PASS
    )
    return chips, ok.all()
