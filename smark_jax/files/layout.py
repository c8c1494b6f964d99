"""A suspect's leaves under the base's names and in the base's layout.

Leaves are paired by name where the names agree, and otherwise layer by layer: by the shapes that a layer's leaves can
take (:mod:`smark_jax.files._changes`), then by content. A true copy of a leaf correlates with the base's leaf, in the
right layout and in no other; what is left over is paired where only one layer fits. Where neither tells, the question
is asked (:class:`Ambiguous`), not answered. Suspect and base are looked at, and nothing else: no customer's codeword
can enter, so that p-values hold as they do without.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _validate
from smark_jax.files import _changes
from smark_jax.files._changes import Option

_WHO = "match_layout"
_NEXT = (
    "If the suspect is of another width, give it the base's names and layout and run alignment.align. If leaves are "
    "named otherwise, say which is which: given={'base leaf': 'suspect leaf: transposed'} (smark trace: --map)."
)


class Move(NamedTuple):
    """Where a leaf came from.

    Attributes:
      base: its name in the base.
      suspect: its name in the suspect.
      change: what was done to it, in words: ``"renamed"``, ``"transposed"``, ``"OIHW to HWIO"``,
        ``"flattened CHW to HWC (64 channels)"``, ``"transposed, flattened CHW to HWC (64 channels)"``.
    """

    base: str
    suspect: str
    change: str


class Layout(NamedTuple):
    """A suspect as the base is laid out.

    Attributes:
      leaves: the suspect's values under the base's names, with the suspect's dtypes.
      moves: the leaves that had another name or layout; none for a file that was left as it is.
      unused: the suspect's leaves that the base has no place for, such as ``num_batches_tracked``.
    """

    leaves: dict[str, np.ndarray]
    moves: tuple[Move, ...]
    unused: tuple[str, ...]


class Ambiguous(ValueError):
    """Shapes and content do not tell how a suspect's leaves are laid out: the person who asks has to say.

    Attributes:
      options: for each leaf of the base in question, the answers that ``given`` takes.
    """

    def __init__(self, options: Mapping[str, tuple[str, ...]]) -> None:
        name, answers = next(iter(options.items()))
        listed = "; ".join(f"{leaf}: {' or '.join(map(repr, some[:4]))}" for leaf, some in list(options.items())[:4])
        more = f"; and {len(options) - 4} leaves more" if len(options) > 4 else ""
        super().__init__(
            f"{_WHO}: expected names, shapes or content that tell each leaf's place, but got several that fit "
            f"({listed}{more}).\nIt may be another model. If you know the layout, say it: "
            f"given={{{name!r}: {answers[0]!r}}} (smark trace: --map {f'{name}={answers[0]}'!r})."
        )
        self.options = dict(options)


def match_layout(
    suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], given: Mapping[str, str] | None = None
) -> Layout:
    """Brings a suspect from another framework, or with other names, into the base's layout.

    Known are PyTorch's conventions: kernels of convolutions as OIHW, dense kernels as [out, in], the rows of the dense
    layer behind a flattening in the order CHW, the names of layers, of batch norm and of its statistics, and a level
    such as ``params`` or ``state_dict`` around the whole. Values are moved and never changed.

    A suspect with the base's names whose shapes differ and fit in no layout (other width) is returned as it is, for
    :func:`smark_jax.alignment.align`.

    Args:
      suspect: leaves by name, as :func:`read` returns them.
      base: the base's leaves by name, as :func:`flatten` returns them.
      given: for some of the base's leaves, the suspect's leaf, and, behind a colon, its change where content does not
        tell: ``{"Dense_0/kernel": "fc1.weight: transposed"}``.

    Raises:
      Ambiguous: when several places or layouts fit alike.
      ValueError: when the base is empty, leaves of it are found nowhere, or ``given`` names what is not there.

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
    channels = _changes.channels(suspect, base)
    chosen = _given(suspect, base, given or {}, channels)
    names = _same_names(suspect, base)
    if names is not None:
        rest = {name: other for name, other in names.items() if name not in chosen}
        chosen |= _by_name(suspect, base, rest, chosen, channels)
    else:
        chosen |= _by_layer(suspect, base, chosen, channels)
    moves = tuple(
        Move(name, option.source, option.change or "renamed")
        for name, option in sorted(chosen.items())
        if option.change or option.source != name
    )
    taken = {option.source for option in chosen.values()}
    leaves = {name: chosen[name].leaf() for name in base}
    return Layout(leaves, moves, tuple(sorted(set(suspect) - taken)))


def _given(
    suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], given: Mapping[str, str], channels: set[int]
) -> dict[str, Option]:
    """The caller's answers."""
    chosen: dict[str, Option] = {}
    for name, answer in given.items():
        source, colon, change = (answer, "", "") if answer in suspect else answer.partition(": ")
        if name not in base or source not in suspect:
            wrong, names = (name, base) if name not in base else (source, suspect)
            raise _validate.fail(_WHO, f"a leaf {wrong!r} as given says", f"{sorted(names)[:8]}", "Is it misspelt?")
        options = _changes.options(source, suspect[source], channels)
        fitting = [o for o in options if o.change == change] if colon else _changes.fitting(options, base[name])
        if not fitting:
            could = sorted({option.change or "no change" for option in options})
            got = f"{change!r}" if colon else f"shape {suspect[source].shape} for {base[name].shape}"
            raise _validate.fail(_WHO, f"a change of {source!r} among {could}", got, "Name one of these.")
        chosen[name] = _decided({name: (fitting, base[name])})[name]
    return chosen


def _same_names(suspect: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, str] | None:
    """For each of the base's leaves the suspect's with the same name, a level around the whole aside."""
    plain = {name.replace(".", "/"): name for name in suspect}
    first = next(iter(base)).replace(".", "/")
    around = f"{first.split('/')[0]}/"
    for cut in ("", around) if all(name.replace(".", "/").startswith(around) for name in base) else ("",):
        end = first[len(cut) :]
        levels = {name[: len(name) - len(end)] for name in plain if name.endswith(end)}
        for level in sorted((level for level in levels if level == "" or level.endswith("/")), key=len):
            names = {name: level + name.replace(".", "/")[len(cut) :] for name in base}
            if len(plain) == len(suspect) and all(other in plain for other in names.values()):
                return {name: plain[other] for name, other in names.items()}
    return None


def _by_name(
    suspect: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    chosen: Mapping[str, Option],
    channels: set[int],
) -> dict[str, Option]:
    """Pairs by name: as they are, unless all those of another shape have a layout that fits.

    Names can be exchanged on purpose. Where content denies them and tells better, it is followed.
    """
    kept = {name: _changes.options(other, suspect[other], channels)[0] for name, other in names.items()}
    differ = [name for name in names if suspect[names[name]].shape != base[name].shape]
    fits = {
        name: (_changes.fitting(_changes.options(names[name], suspect[names[name]], channels), base[name]), base[name])
        for name in differ
    }
    if not all(options for options, _ in fits.values()):
        return kept
    kept |= _decided(fits)
    kernels = [name for name in names if base[name].ndim > 1]

    def agree(options: Mapping[str, Option]) -> bool:
        return all(_changes.best([options[name]], base[name]).correlation >= _changes.ALIKE for name in kernels)

    try:
        found = kept if agree(kept) else _by_layer(suspect, base, chosen, channels)
    except ValueError:
        return kept
    return found if agree(found) else kept


def _decided(fits: Mapping[str, tuple[list[Option], np.ndarray]]) -> dict[str, Option]:
    """The option whose content agrees with the base's, leaf by leaf."""
    found = {name: _changes.best(options, leaf) for name, (options, leaf) in fits.items()}
    open_ones = {name: tuple(o.answer for o in fits[name][0]) for name, choice in found.items() if not choice.sure}
    if open_ones:
        raise Ambiguous(open_ones)
    return {name: choice.option for name, choice in found.items()}


def _by_layer(
    suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], chosen: Mapping[str, Option], channels: set[int]
) -> dict[str, Option]:
    """Pairs by layers first, then, where no layer fits as a whole, leaf by leaf."""
    taken = {option.source for option in chosen.values()}
    ours = {name: leaf for name, leaf in base.items() if name not in chosen}
    theirs = {name: leaf for name, leaf in suspect.items() if name not in taken}
    found: dict[str, Option] = {}
    for group in (_changes.layers, _changes.singles):
        pairs = _changes.pairs(group(ours), group(theirs), ours, theirs, channels)
        found |= _assign(pairs)
        used = {option.source for option in found.values()}
        ours = {name: leaf for name, leaf in ours.items() if name not in found}
        theirs = {name: leaf for name, leaf in theirs.items() if name not in used}
    if ours:
        name, leaf = next(iter(ours.items()))
        expected = f"a leaf for {name!r} of shape {leaf.shape}"
        others = sorted({str(other.shape) for other in theirs.values()})[:6]
        got = f"the shapes {', '.join(others)}" if others else "no leaf that is left"
        raise _validate.fail(_WHO, f"{expected} (and for {len(ours) - 1} more)", got, _NEXT)
    return found


def _assign(pairs: _changes.Pairs) -> dict[str, Option]:
    """Takes pairs that content tells apart, then those without another choice, until nothing is left to take.

    Raises:
      Ambiguous: when pairs are left and each has another that fits alike, or a leaf of a pair has two layouts.
    """
    left, found = dict(pairs), {}
    asked: dict[str, tuple[str, ...]] = {}
    while left and (sure := _changes.sure_pairs(left)):
        for pair in sure.values():
            found |= {name: choice.option for name, choice in pair.choices.items()}
            asked |= {n: tuple(o.answer for o in c.options) for n, c in pair.choices.items() if not c.sure}
        ours, theirs = {layer for layer, _ in sure}, {layer for _, layer in sure}
        left = {key: other for key, other in left.items() if key[0] not in ours and key[1] not in theirs}
    for pair in left.values():
        for name, choice in pair.choices.items():
            asked[name] = (*asked.get(name, ()), choice.option.answer)
    if asked:
        raise Ambiguous(asked)
    return found
