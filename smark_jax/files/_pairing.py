"""Matches the suspect's layers to the base's: by shapes, then by content, in bounded time.

Layers are grouped by the shapes that their leaves can take, so that only layers that could match are compared. Their
agreement is one matrix product per group of equal shapes. The number of comparisons is bounded, since a suspect may
hold a hundred thousand leaves of one shape.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from smark_jax.files import _changes
from smark_jax.files._changes import Option

MAX_COMPARISONS = 20_000_000
"""The most pairs of layers of equal shapes that are compared."""
_MAX_PRODUCTS = 2**34
_SAMPLE, _LEAST_SAMPLE = 4096, 64
_ROUNDS = 12
_LISTED = 16

Layers = Mapping[str, Mapping[str, str]]
"""The names of leaves by layer and role."""


class TooMany(Exception):
    """Too many layers of equal shapes to compare them all; the text states which."""


class Paired(NamedTuple):
    """The pairs that shapes and content determine.

    Attributes:
      choices: the suspect's leaf, in its layout, for each paired leaf of the base.
      settled: the paired leaves of the base whose partner is confirmed by content.
      open: leaves of the base for which several leaves or layouts fit equally well, each with some possible answers.
    """

    choices: dict[str, Option]
    settled: frozenset[str]
    open: dict[str, tuple[str, ...]]


class _Group(NamedTuple):
    """Base layers of equal shapes, the suspect's layers that could match them, and their agreement, shape [n, k].

    ``least``, shape [n], is the agreement that chance does not reach: small layers agree with others by accident.
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
    """Pairs layers whose content stands out from all others, and repeats until no such pair is left.

    Args:
      ours: the base's layers.
      theirs: the suspect's layers.
      base: the base's leaves by name.
      suspect: the suspect's leaves by name.
      channels: the numbers of channels that an image may have had when it was flattened.
      alone: whether also to pair layers that have no alternative, whatever their content.

    Raises:
      TooMany: when more than :data:`MAX_COMPARISONS` would be needed.
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
    """The agreement of layers, and the smallest agreement that cannot be an accident.

    The agreement is the mean correlation of the layers' leaves in their best layouts, weighted by size; constant leaves
    do not count. The least is five standard deviations of the Fisher transform of a correlation by chance.

    Args:
      ours: for each role, the leaves of n layers, all of one shape.
      theirs: for each role, the views of k leaves with this shape, in each layout.
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
            # Leaves of equal shape usually have equally many layouts; take only those that have this one.
            there = [place for place, some in enumerate(views) if layout < len(some)]
            matrix = _changes.directions([views[place][layout] for place in there], number)
            best[:, there] = np.maximum(best[:, there], mine @ matrix.T)
        varied = mine.any(axis=1, keepdims=True)
        total += np.where(varied, size * best, 0)
        weights += np.where(varied, size, 0)
    least = np.maximum(_changes.ALIKE, np.tanh(5 / np.sqrt(np.maximum(weights[:, 0] - 3, 1))) - 1e-5)
    return total / np.maximum(weights, 1), least


def _told_apart(groups: list[_Group], columns: int, lonely: bool) -> list[tuple[int, int, float]]:
    """Pairs that stand out among all pairs of either layer; if none do and ``lonely``, pairs without alternatives."""
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
    """The largest and second largest value of each row; -2, below any correlation, if there is no second."""
    if values.shape[1] < 2:
        return values[:, 0].astype(np.float64), np.full(len(values), -2.0)
    two = np.partition(values, values.shape[1] - 2, axis=1)[:, -2:].astype(np.float64)
    return two[:, 1], two[:, 0]


def _without(group: _Group, rows: np.ndarray, columns: np.ndarray) -> _Group:
    left, free = ~np.isin(group.ours, rows), ~np.isin(group.theirs, columns)
    return _Group(group.ours[left], group.theirs[free], group.agreement[left][:, free], group.least[left])
