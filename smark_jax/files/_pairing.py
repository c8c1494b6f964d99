"""Matches the suspect's layers to the base's: by shapes, then by content, in bounded time.

Layers are grouped by the shapes that their leaves can take, so that only layers that could match are compared. Their
agreement is one matrix product per group of equal shapes, a block of the suspect's layers at a time, of which only
agreements that chance does not reach are kept. So memory does not grow with the number of pairs, and time grows with
the number of the suspect's leaves, which may be a hundred thousand.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from smark_jax.files import _changes, _content
from smark_jax.files._changes import Option, Place, Shape
from smark_jax.files._content import AS_IT_IS

MAX_COMPARISONS = 2**27
"""The most pairs of layers of equal shapes that are compared."""
_BLOCK = 2**22  # pairs whose agreement is in memory at once
_MAX_PRODUCTS = 2**34
_SAMPLE, _LEAST_SAMPLE = 4096, 64
_LAYOUTS = 4  # whose samples are in memory at once
_KEPT = 16  # the most partners of a layer that are remembered
_ROUNDS = 4
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

    choices: dict[str, Place]
    settled: frozenset[str]
    open: dict[str, tuple[str, ...]]


class _Group(NamedTuple):
    """Base layers of equal shapes, with the suspect's layers that could match them: positions, and shapes by role."""

    ours: np.ndarray
    theirs: np.ndarray
    shapes: tuple[tuple[str, Shape], ...]


class _Candidates(NamedTuple):
    """Pairs of layers that agree by more than chance, the best first; arrays of one length."""

    ours: np.ndarray
    theirs: np.ndarray
    agreement: np.ndarray


class Leaves(NamedTuple):
    """What is paired: layers and leaves of both sides, and channel counts for undoing a flattening."""

    ours: Layers
    theirs: Layers
    base: Mapping[str, np.ndarray]
    suspect: Mapping[str, np.ndarray]
    channels: tuple[int, ...]

    def options(self, layer: str, role: str, shape: Shape) -> list[Option]:
        """The layouts of one of the suspect's leaves that have this shape."""
        name = self.theirs[layer][role]
        return _changes.options(name, self.suspect[name], shape, self.channels)


def pair(leaves: Leaves, *, alone: bool = False, signs: bool = False) -> Paired:
    """Pairs layers whose contents agree best, beginning with the most alike.

    Args:
      leaves: the layers of both sides.
      alone: whether also to pair layers that have no alternative, whatever their content.
      signs: whether to compare the signs of entries, which factors of channels leave alone.

    Raises:
      TooMany: when more than :data:`MAX_COMPARISONS` would be needed.
    """
    names, others = list(leaves.ours), list(leaves.theirs)
    choices: dict[str, Place] = {}
    settled: set[str] = set()
    asked: dict[str, tuple[str, ...]] = {}
    rows, columns = set(range(len(names))), set(range(len(others)))
    groups = _groups(leaves, rows, columns)
    for _ in range(_ROUNDS):
        found = list(_best_first(leaves, groups, signs)) or (_without_alternative(groups) if alone else [])
        for row, column, agreement, sure in found:
            for role, name in leaves.ours[names[row]].items():
                leaf = leaves.base[name]
                options = leaves.options(others[column], role, leaf.shape)
                best = _changes.best(options, leaf)
                if best.told:
                    choices[name] = best.option
                    alike = max(best.correlation, agreement) >= _content.ALIKE
                    settled |= {name} if sure and best.sure and alike else set()
                else:
                    asked[name] = _answers(options)
        rows -= {row for row, *_ in found}
        columns -= {column for _, column, *_ in found}
        groups = _groups(leaves, rows, columns) if found else groups
        if not found or not groups:
            break
    for group in groups:
        for role, shape in group.shapes:
            free = (leaves.options(others[column], role, shape) for column in group.theirs[:_LISTED].tolist())
            answers = _answers(option for some in free for option in some)
            asked |= {leaves.ours[names[row]][role]: answers for row in group.ours.tolist()}
    return Paired(choices, frozenset(settled), {name: some for name, some in asked.items() if some})


def _answers(options: Iterable[Option]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(option.answer for option in options))[:_LISTED]


def _groups(leaves: Leaves, rows: set[int], columns: set[int]) -> list[_Group]:
    """The layers that are left on both sides, by the shapes that their leaves have in common."""
    index: dict[tuple[str, int], dict[Shape, list[int]]] = {}
    others = list(leaves.theirs.values())
    for column in sorted(columns):
        for role, name in others[column].items():
            leaf = leaves.suspect[name]
            shapes = index.setdefault((role, leaf.size), {})
            shapes.setdefault(leaf.shape, []).append(column)

    def fitting(role: str, shape: Shape) -> set[int]:
        some = index.get((role, math.prod(shape)), {}).items()
        return {c for source, there in some if _changes.changes(source, shape, leaves.channels) for c in there}

    alike: dict[tuple[tuple[str, Shape], ...], list[int]] = {}
    ours = list(leaves.ours.values())
    for row in sorted(rows):
        shapes = tuple((role, leaves.base[name].shape) for role, name in sorted(ours[row].items()))
        alike.setdefault(shapes, []).append(row)
    found = []
    left = MAX_COMPARISONS
    for shapes, some in alike.items():
        sets = sorted((fitting(*shape) for shape in shapes), key=len)
        there = sorted(sets[0].intersection(*sets[1:])) if sets else []
        left -= len(some) * len(there)
        if left < 0:
            more = f"{len(some):,} of the base with {len(there):,} of the suspect, all of the same shapes"
            raise TooMany(f"more than {MAX_COMPARISONS:,} comparisons of layers ({more})")
        if there:
            found.append(_Group(np.array(some), np.array(there), shapes))
    return found


def _without_alternative(groups: list[_Group]) -> list[tuple[int, int, float, bool]]:
    """Pairs of which neither layer fits any other."""
    number: dict[int, int] = {}
    for group in groups:
        for column in group.theirs.tolist():
            number[column] = number.get(column, 0) + len(group.ours)
    single = [group for group in groups if len(group.ours) == len(group.theirs) == 1]
    return [(int(g.ours[0]), int(g.theirs[0]), 0.0, True) for g in single if number[int(g.theirs[0])] == 1]


def _best_first(leaves: Leaves, groups: list[_Group], signs: bool) -> Iterator[tuple[int, int, float, bool]]:
    """Pairs by falling agreement, each layer once, and whether the pair stands out among all pairs of either layer."""
    parts = [_candidates(leaves, group, signs) for group in groups]
    if not parts:
        return
    ours, theirs, agreement = (np.concatenate(some) for some in zip(*parts, strict=True))
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    order = np.argsort(-agreement, kind="stable")
    rows, columns, values = ours[order].tolist(), theirs[order].tolist(), agreement[order].tolist()
    by_row: dict[int, list[int]] = {}
    by_column: dict[int, list[int]] = {}
    for place, (row, column) in enumerate(zip(rows, columns, strict=True)):
        by_row.setdefault(row, []).append(place)
        by_column.setdefault(column, []).append(place)
    for place, (row, column, value) in enumerate(zip(rows, columns, values, strict=True)):
        if row in used_rows or column in used_columns:
            continue
        rivals = [p for p in by_row[row] if p != place and columns[p] not in used_columns]
        rivals += [p for p in by_column[column] if p != place and rows[p] not in used_rows]
        yield row, column, value, all(value - values[p] >= _content.MARGIN for p in rivals)
        used_rows.add(row)
        used_columns.add(column)


def _candidates(leaves: Leaves, group: _Group, signs: bool) -> _Candidates:
    """The pairs of a group whose agreement chance does not reach.

    The agreement is the mean correlation of the layers' leaves in their best layouts, weighted by size; constant leaves
    do not count. The least is five standard deviations of the Fisher transform of a correlation by chance.
    """
    names, others = list(leaves.ours), list(leaves.theirs)
    sizes = [math.prod(shape) for _, shape in group.shapes]
    products = len(group.ours) * len(group.theirs) * sum(min(_SAMPLE, size) for size in sizes)
    share = min(1.0, _MAX_PRODUCTS / max(1, products))
    numbers = [min(size, max(_LEAST_SAMPLE, int(share * _SAMPLE))) for size in sizes]
    mine = [
        _content.directions(
            [leaves.base[leaves.ours[names[row]][role]] for row in group.ours], [AS_IT_IS], number, signs
        )[:, 0]
        for (role, _), number in zip(group.shapes, numbers, strict=True)
    ]
    varied = [some.any(axis=1, keepdims=True) for some in mine]
    weights = np.sum([np.where(there, size, 0) for there, size in zip(varied, sizes, strict=True)], axis=0)
    least = np.maximum(_content.ALIKE, np.tanh(5 / np.sqrt(np.maximum(weights - 3, 1))) - 1e-5)
    best = _Candidates(*(np.zeros(0, kind) for kind in (np.int64, np.int64, np.float32)))
    step = max(1, _BLOCK // (len(group.ours) + _LAYOUTS * max(numbers)))
    for start in range(0, len(group.theirs), step):
        block = group.theirs[start : start + step]
        total = np.zeros((len(group.ours), len(block)), np.float32)
        for (role, shape), number, some, there, size in zip(group.shapes, numbers, mine, varied, sizes, strict=True):
            theirs = [leaves.suspect[leaves.theirs[others[column]][role]] for column in block.tolist()]
            agreement = _correlations(some, theirs, shape, leaves.channels, number, signs)
            total += np.where(there, np.float32(size), 0) * agreement
        total /= np.maximum(weights, 1)
        row, column = np.nonzero((total >= least) & (weights > 0))
        found = _Candidates(group.ours[row], block[column], total[row, column])
        best = _kept(_Candidates(*(np.concatenate(both) for both in zip(best, found, strict=True))))
    return best


def _correlations(
    mine: np.ndarray, theirs: list[np.ndarray], shape: Shape, channels: Shape, number: int, signs: bool
) -> np.ndarray:
    """The correlation of n leaves, given their directions, with k leaves, each in its best layout: shape [n, k]."""
    best = np.full((len(mine), len(theirs)), -1, np.float32)
    alike: dict[Shape, list[int]] = {}
    for place, leaf in enumerate(theirs):
        alike.setdefault(leaf.shape, []).append(place)
    for source, places in alike.items():
        changes = _changes.changes(source, shape, channels)
        for start in range(0, len(changes), _LAYOUTS):
            some = changes[start : start + _LAYOUTS]
            found = _content.directions([theirs[place] for place in places], some, number, signs)
            for layout in range(len(some)):
                best[:, places] = np.maximum(best[:, places], mine @ found[:, layout].T)
    return best


def _kept(pairs: _Candidates) -> _Candidates:
    """The best partners of each of the base's layers, at most :data:`_KEPT` of them."""
    order = np.lexsort((pairs.theirs, -pairs.agreement, pairs.ours))
    ours = pairs.ours[order]
    first = np.r_[True, ours[1:] != ours[:-1]] if len(ours) else np.zeros(0, bool)
    rank = np.arange(len(ours)) - np.maximum.accumulate(np.where(first, np.arange(len(ours)), 0))
    order = order[rank < _KEPT]
    return _Candidates(*(values[order] for values in pairs))
