"""Which layer of the suspect is which of the base: by shapes, then by content, in bounded time.

Layers are put together by the shapes that their leaves can take, so that only those are compared that could be each
other's. How well they agree is one matrix product for each set of equal shapes. The number of comparisons is bounded:
a suspect may hold a hundred thousand leaves of one shape.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from smark_jax.files import _changes
from smark_jax.files._changes import Option

MAX_COMPARISONS = 20_000_000
"""Most pairs of layers of equal shapes that are compared."""
_MAX_PRODUCTS = 2**34
_SAMPLE, _LEAST_SAMPLE = 4096, 64
_ROUNDS = 12
_LISTED = 16

Layers = Mapping[str, Mapping[str, str]]
"""The names of leaves by layer and role."""


class TooMany(Exception):
    """There are more layers of equal shapes than are compared; the text says how many comparisons it would take."""


class Paired(NamedTuple):
    """What shapes and content tell.

    Attributes:
      choices: for leaves of the base, the suspect's leaf in its layout.
      settled: those of them that content tells.
      open: leaves of the base for which several fit alike, and some of the answers.
    """

    choices: dict[str, Option]
    settled: frozenset[str]
    open: dict[str, tuple[str, ...]]


class _Group(NamedTuple):
    """The base's layers of equal shapes, the suspect's that could be one of them, and how well they agree, [n, k].

    ``least`` is the agreement from which chance is excluded, shape [n]: small layers agree with some other by accident.
    """

    ours: np.ndarray
    theirs: np.ndarray
    agreement: np.ndarray
    least: np.ndarray


def pair(
    ours: Layers,
    theirs: Layers,
    base: Mapping[str, np.ndarray],
    suspect: Mapping[str, np.ndarray],
    channels: set[int],
    alone: bool,
) -> Paired:
    """Pairs layers that content tells apart from all others, until none is left.

    Args:
      ours: the base's layers.
      theirs: the suspect's.
      base: its leaves by name.
      suspect: its leaves by name.
      channels: that an image may have had when it was flattened.
      alone: whether to pair layers without another choice as well, whatever their content.

    Raises:
      TooMany: when it would take more than :data:`MAX_COMPARISONS`.
    """
    listed = {
        name: _changes.options(name, suspect[name], channels) for roles in theirs.values() for name in roles.values()
    }
    names, others = list(ours), list(theirs)
    groups = _groups(ours, theirs, names, others, base, listed)
    choices: dict[str, Option] = {}
    settled: set[str] = set()
    asked: dict[str, tuple[str, ...]] = {}
    for _ in range(_ROUNDS):
        found = _told_apart(groups, len(others), alone)
        if not found:
            break
        for row, column, agreement in found:
            for role, name in ours[names[row]].items():
                best = _changes.best(_changes.fitting(listed[theirs[others[column]][role]], base[name]), base[name])
                if best.sure:
                    choices[name] = best.option
                    settled |= {name} if max(best.correlation, agreement) >= _changes.ALIKE else set()
                else:
                    asked[name] = _answers(best.options)
        rows, columns = (np.array(side) for side in list(zip(*found, strict=True))[:2])
        groups = [left for group in groups if (left := _without(group, rows, columns)).agreement.size]
    for group in groups:
        for role, first in ours[names[group.ours[0]]].items():
            free = (listed[theirs[others[column]][role]] for column in group.theirs[:_LISTED].tolist())
            answers = _answers(option for some in free for option in _changes.fitting(some, base[first]))
            asked |= {ours[names[row]][role]: answers for row in group.ours.tolist()}
    return Paired(choices, frozenset(settled), {name: some for name, some in asked.items() if some})


def _answers(options: Iterable[Option]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(option.answer for option in options))[:_LISTED]


def _groups(
    ours: Layers,
    theirs: Layers,
    names: list[str],
    others: list[str],
    base: Mapping[str, np.ndarray],
    listed: Mapping[str, list[Option]],
) -> list[_Group]:
    index: dict[tuple[str, tuple[int, ...]], set[int]] = {}
    for column, other in enumerate(others):
        for role, leaf in theirs[other].items():
            for option in listed[leaf]:
                index.setdefault((role, option.shape), set()).add(column)
    alike: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for row, name in enumerate(names):
        alike.setdefault(tuple((role, base[leaf].shape) for role, leaf in sorted(ours[name].items())), []).append(row)
    found = []
    left = MAX_COMPARISONS
    for shapes, rows in alike.items():
        sets = sorted((index.get(shape, set()) for shape in shapes), key=len)
        columns = sorted(sets[0].intersection(*sets[1:])) if sets else []
        left -= len(rows) * len(columns)
        if left < 0:
            more = f"{len(rows):,} of the base with {len(columns):,} of the suspect, all of the same shapes"
            raise TooMany(f"more than {MAX_COMPARISONS:,} comparisons of layers ({more})")
        if columns:
            mine = [[base[ours[names[row]][role]] for row in rows] for role, _ in shapes]
            fits = [[_at(listed[theirs[others[c]][role]], shape) for c in columns] for role, shape in shapes]
            found.append(_Group(np.array(rows), np.array(columns), *_agreement(mine, fits)))
    return found


def _at(options: list[Option], shape: tuple[int, ...]) -> list[np.ndarray]:
    return [option.view for option in options if option.shape == shape]


def _agreement(ours: list[list[np.ndarray]], theirs: list[list[list[np.ndarray]]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean correlation of the layers' leaves in their best layouts, weighted by sizes; constant leaves have no say.

    And the least that is no accident: five standard deviations of Fisher's transform of a correlation by chance.

    Args:
      ours: for each role the leaves of n layers, all of one shape.
      theirs: for each role the views of k leaves that have this shape, in each layout.
    """
    rows, columns = len(ours[0]), len(theirs[0])
    products = (
        rows
        * columns
        * sum(len(views[0]) * min(_SAMPLE, some[0].size) for some, views in zip(ours, theirs, strict=True))
    )
    share = min(1.0, _MAX_PRODUCTS / max(1, products))
    total = np.zeros((rows, columns), np.float32)
    weights = np.zeros((rows, 1), np.float32)
    for some, views in zip(ours, theirs, strict=True):
        size = some[0].size
        number = min(size, max(_LEAST_SAMPLE, int(share * _SAMPLE)))
        mine = _changes.directions(some, number)
        best = np.full((rows, columns), -1, np.float32)
        for layout in range(max(map(len, views))):
            # Leaves of one shape have as many layouts, but for those that are laid out in a way of their own.
            there = [place for place, some in enumerate(views) if layout < len(some)]
            matrix = _changes.directions([views[place][layout] for place in there], number)
            best[:, there] = np.maximum(best[:, there], mine @ matrix.T)
        varied = mine.any(axis=1, keepdims=True)
        total += np.where(varied, size * best, 0)
        weights += np.where(varied, size, 0)
    least = np.maximum(_changes.ALIKE, np.tanh(5 / np.sqrt(np.maximum(weights[:, 0] - 3, 1))) - 1e-5)
    return total / np.maximum(weights, 1), least


def _told_apart(groups: list[_Group], columns: int, lonely: bool) -> list[tuple[int, int, float]]:
    """Pairs that stand out from all others of both layers; if there are none, perhaps those without others."""
    best, second, count = np.full(columns, -2.0), np.full(columns, -2.0), np.zeros(columns, int)
    tops = []
    for _, theirs, agreement, _ in groups:
        by_row = _top_two(agreement)
        tops.append(by_row)
        first, next_one = _top_two(agreement.T)
        second[theirs] = np.maximum(np.minimum(best[theirs], first), np.maximum(second[theirs], next_one))
        best[theirs] = np.maximum(best[theirs], first)
        count[theirs] += len(agreement)
    found: list[tuple[int, int, float]] = []
    alone: list[tuple[int, int, float]] = []
    for (ours, theirs, agreement, least), (first, next_one) in zip(groups, tops, strict=True):
        at = agreement.argmax(axis=1)
        column = theirs[at]
        out = (first >= least) & (first - next_one >= _changes.MARGIN)
        out &= (best[column] == first) & (first - second[column] >= _changes.MARGIN)
        found += zip(ours[out].tolist(), column[out].tolist(), first[out].tolist(), strict=True)
        if len(theirs) == 1 and len(ours) == 1 and count[theirs[0]] == 1:
            alone.append((int(ours[0]), int(theirs[0]), float(first[0])))
    return found or alone * lonely


def _top_two(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the second largest of each row; -2, less than any correlation, where there is no second."""
    if values.shape[1] < 2:
        return values[:, 0].astype(np.float64), np.full(len(values), -2.0)
    two = np.partition(values, values.shape[1] - 2, axis=1)[:, -2:].astype(np.float64)
    return two[:, 1], two[:, 0]


def _without(group: _Group, rows: np.ndarray, columns: np.ndarray) -> _Group:
    left, free = ~np.isin(group.ours, rows), ~np.isin(group.theirs, columns)
    return _Group(group.ours[left], group.theirs[free], group.agreement[left][:, free], group.least[left])
