r"""Brings a suspect's leaves under the base's names and into the base's layout.

Leaves are paired by name if the names agree (:mod:`smark_jax.files._matching`). Otherwise they are paired layer by
layer, then leaf by leaf: by the shapes that they can take (:mod:`smark_jax.files._changes`), and by content
(:mod:`smark_jax.files._pairing`). A true copy of a leaf correlates with the base's leaf in the right layout and in no
other; of several leaves that do, the nearest is taken. Then leaves that one side keeps in one and the other in parts
are paired (:mod:`smark_jax.files._parts`). Remaining leaves are paired if only one layer fits. Leaves that remain
ambiguous, or that the suspect lacks, are left out. If content determines nothing at all, the caller is asked
(:class:`smark_jax.errors.Ambiguous`). At the end, factors of channels are divided out of the leaves that they explain,
as of folded batch norm (:mod:`smark_jax.files._folds`). All this uses only the suspect and the base and no customer's
codeword, so p-values stay valid. The time it takes is proportional to the number of the suspect's leaves.

A map given by the caller could have been chosen by looking at codewords. So it is accepted only where content does not
decide, and p-values pay for every map that could have been given there. Let the leaves that content leaves open form G
sets of equal shapes, and let the map name leaves in t of them. In each of these t sets, let K be the number of the
base's leaves, n the number of the suspect's, and o the number of layouts of one leaf. P-values then pay for the
following number of maps; the sum of its inverse over all maps is at most 1:

.. math:: \binom{G}{t} 2^t \prod_{\text{sets}} \sum_{k \ge 1} \binom{K}{k} \frac{n!}{(n - k)!} o^k .
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, errors
from smark_jax.files import _changes, _folds, _limits, _matching, _pairing, _scaled
from smark_jax.files._changes import Option, Place

_WHO = "match_layout"
_AS_IT_IS = "as it is"  # an answer's change for an unchanged leaf, where content does not decide
_NEXT = (
    "If the suspect is of another width, give it the base's names and layout and run alignment.align. If leaves are "
    "named otherwise, say which is which: given={'base leaf': 'suspect leaf: transposed'} (smark trace: --map)."
)
_NEXT_AT_DESK = (
    "If the suspect is of another width, give it the base's names and layout and pass --align. If leaves are named "
    "otherwise, say which is which: --map 'BASE LEAF=SUSPECT LEAF: transposed'."
)


class Move(NamedTuple):
    """Where a leaf came from.

    Attributes:
      base: its name in the base.
      suspect: its name in the suspect.
      change: what was done to it, in words: ``"renamed"``, ``"transposed"``, ``"OIHW to HWIO"``,
        ``"flattened CHW to HWC (64 channels)"``, ``"part 2 of 3 of axis 0, transposed"``,
        ``"OIHW to HWIO, factors along axis 3 undone"``.
    """

    base: str
    suspect: str
    change: str


class Layout(NamedTuple):
    """A suspect in the base's layout.

    Attributes:
      leaves: the suspect's values under the base's names, with the suspect's dtypes. Leaves of which factors of
        channels were divided out are float32 at least; a part that the suspect lacks is NaN.
      moves: the leaves that had another name or layout; empty for a file whose leaves were used unchanged.
      unused: the suspect's leaves that have no counterpart in the base, such as ``num_batches_tracked``.
      missing: the base's leaves that the suspect lacks, or whose counterpart remains ambiguous.
      log_maps: natural logarithm of the number of maps that ``given`` was chosen from; 0 if it decided nothing.
    """

    leaves: dict[str, np.ndarray]
    moves: tuple[Move, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...] = ()
    log_maps: float = 0.0


def _ambiguous(options: Mapping[str, tuple[str, ...]]) -> errors.Ambiguous:
    """The error that asks the caller how leaves of the base are laid out in the suspect."""
    name, answers = next(iter(options.items()))
    listed = "; ".join(f"{leaf}: {' or '.join(map(repr, some[:4]))}" for leaf, some in list(options.items())[:4])
    more = f"; and {len(options) - 4} leaves more" if len(options) > 4 else ""
    expected, got = "names, shapes or content that determine each leaf's place", f"several that fit ({listed}{more})"
    known = "It may be another model. If you know the layout, say it:"
    question = _validate.fail(
        _WHO,
        expected,
        got,
        f"{known} given={{{name!r}: {answers[0]!r}}} (smark trace: --map {f'{name}={answers[0]}'!r}).",
        kind=errors.Ambiguous,
        desk=f"{known} --map {f'{name}={answers[0]}'!r}.",
    )
    question.options = dict(options)
    return question


def match_layout(
    suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], given: Mapping[str, str] | None = None
) -> Layout:
    """Brings a suspect from another framework, or with other names, into the base's layout.

    It knows the layouts of PyTorch, JAX, Keras, ONNX and TensorFlow Lite, both ways: of the kernels of convolutions,
    also depthwise, and of dense layers; CHW or HWC order after a flattening; heads of attention on an axis of their own
    or not; queries, keys and values in one leaf or in three. It knows the names of layers, of batch norm and of its
    statistics, an outer level such as ``params`` or ``state_dict``, and the steps ``module`` and ``_orig_mod`` of
    wrappers. Values are moved; they change only where factors of channels are divided out, as those of batch norm that
    a runtime folded into a kernel.

    Leaves that have the base's names but fit in no layout (another width, another number of classes) are returned
    unchanged, for :func:`smark_jax.alignment.align`. Leaves that are not arrays of real numbers are left out. Weights
    in int8 or float8 with scales beside them (``SCB``, ``weight_scale``) become float32 where the base's are not so.

    Args:
      suspect: leaves by name, as :func:`read` returns them.
      base: the base's leaves by name, as :func:`flatten` returns them.
      given: for some of the base's leaves, the suspect's leaf and, after a colon, its change if content does not
        decide: ``{"Dense_0/kernel": "fc1.weight: transposed"}``. It cannot overrule content, and p-values must count
        the maps that could have been given: ``log_maps``.

    Raises:
      Ambiguous: when several places or layouts fit equally well, and content determines no leaf.
      Undecided: when no leaf fits any of the base's, or too many leaves have equal shapes.
      SmarkError: when the base is empty, or ``given`` names a leaf that does not exist or contradicts content.

    Examples:
      >>> import numpy as np
      >>> from smark_jax import files
      >>> kernel = np.sin(np.arange(12.0)).reshape(3, 4)
      >>> base = {"Dense_0/kernel": kernel, "Dense_0/bias": np.zeros(4)}
      >>> layout = files.match_layout({"fc.weight": kernel.T, "fc.bias": np.ones(4)}, base)
      >>> [tuple(move) for move in layout.moves]
      [('Dense_0/bias', 'fc.bias', 'renamed'), ('Dense_0/kernel', 'fc.weight', 'transposed')]
    """
    if not base:
        raise _validate.fail(_WHO, "leaves in the base", "none", "Is it the base's flatten or read?")
    odd = {name for name, leaf in suspect.items() if not _changes.real(leaf)}
    real = {name: leaf for name, leaf in suspect.items() if name not in odd}
    suspect = _scaled.dequantised(real, base, _limits.MAX_BYTES)
    channels = _changes.channels(base)
    names = _matching.same_names(suspect, base)
    try:
        found = (
            _matching.by_name(suspect, base, names, channels) if names else _matching.by_layer(suspect, base, channels)
        )
    except _pairing.TooMany as error:
        cause = "Give the suspect the base's names, or leave out everything that is not one of its weights."
        raise _validate.fail(_WHO, "layers that can be compared", str(error), cause, kind=errors.Undecided) from None
    chosen, log_maps = _with_given(suspect, base, given or {}, found, channels)
    asked = {name: some for name, some in found.open.items() if name not in chosen}
    if asked and not names and not found.settled:
        raise _ambiguous(asked)
    if not chosen:
        name, leaf = next(iter(base.items()))
        expected = f"a leaf for {name!r} of shape {leaf.shape} (and for {len(base) - 1} more)"
        others = sorted({str(other.shape) for other in suspect.values()})[:6]
        got = f"the shapes {', '.join(others)}" if others else "no leaf of real numbers"
        raise _validate.fail(_WHO, expected, got, _NEXT, kind=errors.Undecided, desk=_NEXT_AT_DESK)
    chosen = _matching.with_twins(chosen, base)
    undone = {name: _folds.undone(chosen[name].leaf(), base[name]) for name in base if name in chosen}
    moves = tuple(
        Move(name, source, ", ".join(filter(None, (change, undone[name][1]))) or "renamed")
        for name, place in sorted(chosen.items())
        for source, change in place.moves
        if change or undone[name][1] or source != name
    )
    taken = {source for place in chosen.values() for source in place.sources}
    leaves = {name: leaf for name, (leaf, _) in undone.items()}
    missing = tuple(sorted(set(base) - set(chosen)))
    return Layout(leaves, moves, tuple(sorted((odd | suspect.keys()) - taken)), missing, log_maps)


def _with_given(
    suspect: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    given: Mapping[str, str],
    found: _pairing.Paired,
    channels: tuple[int, ...],
) -> tuple[dict[str, Place], float]:
    """The pairs found, completed by the caller's answers where content is undecided, and the log of how many maps."""
    answers = {name: _answer(suspect, base, name, answer, channels) for name, answer in given.items()}
    free = {
        n: option for n, option in answers.items() if n not in found.choices or found.choices[n].moves != option.moves
    }
    owners = {source: name for name in found.settled for source in found.choices[name].sources}
    for name, option in free.items():
        settled = name if name in found.settled else owners.get(option.source)
        if settled:
            said, told = f"{name}={option.answer}", f"{settled!r} is {found.choices[settled].answer!r}"
            cause = "A map is taken only where content leaves it open: leave this part of it out."
            raise _validate.fail(_WHO, f"a map that content does not contradict ({told})", repr(said), cause)
    sources = [option.source for option in answers.values()]
    if len(set(sources)) < len(sources):
        twice = next(source for source in sources if sources.count(source) > 1)
        raise _validate.fail(_WHO, "a leaf of its own for each of the base's", f"{twice!r} twice", "Is it misspelt?")
    taken = {option.source for option in free.values()}
    chosen = {name: place for name, place in found.choices.items() if taken.isdisjoint(place.sources)} | answers
    return chosen, _log_maps(suspect, base, set(free), found, channels) if free else 0.0


def _answer(
    suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], name: str, answer: str, channels: tuple[int, ...]
) -> Option:
    """Parses and checks one of the caller's answers."""
    source, colon, change = (answer, "", "") if answer in suspect else answer.partition(": ")
    if name not in base or source not in suspect:
        whose, wrong, names = ("base", name, base) if name not in base else ("suspect", source, suspect)
        some = ", ".join(map(repr, sorted(names)[:8]))
        cause = f"The {whose}'s leaves: {some}{', ...' if len(names) > 8 else ''}."
        raise _validate.fail(_WHO, f"a leaf of the {whose} in the map", repr(wrong), cause)
    options = _changes.options(source, suspect[source], base[name].shape, channels)
    if not options:
        got = f"shape {suspect[source].shape} for {base[name].shape}"
        raise _validate.fail(_WHO, f"a leaf for {name!r} that fits in some layout", got, "Is it another leaf?")
    fitting = [option for option in options if not colon or option.change == ("" if change == _AS_IT_IS else change)]
    if not fitting:
        could = ", ".join(sorted({option.change or _AS_IT_IS for option in options}))
        raise _validate.fail(_WHO, f"a change of {source!r} among these: {could}", f"{change!r}", "Name one of these.")
    best = _changes.best(fitting, base[name])
    if not best.told:
        raise _ambiguous({name: tuple(f"{source}: {option.change or _AS_IT_IS}" for option in fitting)})
    return best.option


def _log_maps(
    suspect: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    free: set[str],
    found: _pairing.Paired,
    channels: tuple[int, ...],
) -> float:
    """The natural logarithm of the number of maps that could have been given; see the module's docstring."""
    from scipy import special  # here and not above: bases are read without

    used = {source for name in found.settled for source in found.choices[name].sources}
    theirs: dict[tuple[int, ...], int] = {}
    for source in suspect.keys() - used:
        shape = suspect[source].shape
        theirs[shape] = theirs.get(shape, 0) + 1
    ours: dict[tuple[int, ...], list[str]] = {}
    for name in base.keys() - found.settled:
        ours.setdefault(base[name].shape, []).append(name)
    fits = {
        shape: [
            (count, len(ways)) for other, count in theirs.items() if (ways := _changes.changes(other, shape, channels))
        ]
        for shape in ours
    }
    ours = {shape: names for shape, names in ours.items() if fits[shape]}
    total, touched = 0.0, 0
    for shape, names in ours.items():
        if free.isdisjoint(names):
            continue
        touched += 1
        number, layouts = sum(count for count, _ in fits[shape]), max(ways for _, ways in fits[shape])
        k = np.arange(1, min(len(names), number) + 1)
        subsets = special.gammaln(len(names) + 1) - special.gammaln(k + 1) - special.gammaln(len(names) - k + 1)
        orders = special.gammaln(number + 1) - special.gammaln(number - k + 1)
        total += float(np.logaddexp.reduce(subsets + orders + k * math.log(layouts)))
    return total + math.log(math.comb(len(ours), touched)) + touched * math.log(2)
