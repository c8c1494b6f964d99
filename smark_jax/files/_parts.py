"""Leaves that one side keeps in one and the other in two or three: queries, keys and values, gates and their inputs.

What is left on either side is cut into equal parts along an axis, and parts are paired with whole leaves by content.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from smark_jax.files import _changes, _pairing
from smark_jax.files._changes import Joined, Option, Place

_COUNTS = (3, 2)


class _Part(NamedTuple):
    """A part of a leaf: which of how many along which axis."""

    name: str
    number: int
    of: int
    axis: int

    @property
    def words(self) -> str:
        return f"part {self.number + 1} of {self.of} of axis {self.axis}"


def fused(
    suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], channels: tuple[int, ...]
) -> _pairing.Paired:
    """Leaves of the base that are parts of larger leaves of the suspect."""
    cut, parts = _cut(suspect, base)
    found = _pair(base, cut, channels)
    places: dict[str, Place] = {}
    for whole in _agreeing({name: parts[option.source] for name, option in found.items()}):
        for name in whole:
            part = parts[found[name].source]
            places[name] = found[name]._replace(source=part.name, part=part.words)
    return _pairing.Paired(places, frozenset(places), {})


def split(
    suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], channels: tuple[int, ...]
) -> _pairing.Paired:
    """Leaves of the base whose parts are leaves of the suspect."""
    cut, parts = _cut(base, suspect)
    found = _pair(cut, suspect, channels)
    places: dict[str, Place] = {}
    for whole in _agreeing({key: parts[key] for key in found}):
        by_index = {parts[key].number: found[key] for key in whole}
        name, _, count, axis = parts[whole[0]]
        options = tuple(by_index.get(index) for index in range(count))
        places[name] = Joined(options, axis, base[name].shape)
    return _pairing.Paired(places, frozenset(places), {})


def _cut(
    leaves: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, _Part]]:
    """The parts of leaves that have the size of one of the others, and what each is, by names of their own."""
    sizes = {leaf.size for leaf in others.values()}
    arrays: dict[str, np.ndarray] = {}
    parts: dict[str, _Part] = {}
    for name, leaf in leaves.items():
        for count in _COUNTS:
            for axis in _axes(leaf, count) if leaf.size % count == 0 and leaf.size // count in sizes else ():
                long = leaf.shape[axis] // count
                for number in range(count):
                    key = str(len(parts))
                    arrays[key] = leaf[(slice(None),) * axis + (slice(number * long, (number + 1) * long),)]
                    parts[key] = _Part(name, number, count, axis)
    return arrays, parts


def _axes(leaf: np.ndarray, count: int) -> Iterator[int]:
    """The axes along which a leaf may hold so many parts: its first, its last, and those of this length."""
    for axis, size in enumerate(leaf.shape):
        if size == count or (size % count == 0 and axis in (0, leaf.ndim - 1)):
            yield axis


def _pair(
    base: Mapping[str, np.ndarray], suspect: Mapping[str, np.ndarray], channels: tuple[int, ...]
) -> dict[str, Option]:
    leaves = _pairing.Leaves(_changes.singles(base), _changes.singles(suspect), base, suspect, channels)
    return {name: place for name, place in _pairing.pair(leaves).choices.items() if isinstance(place, Option)}


def _agreeing(parts: Mapping[str, _Part]) -> list[list[str]]:
    """The names grouped by the leaf that their parts are cut from, in the one way of cutting it that most agree on."""
    ways: dict[str, dict[tuple[int, int], list[str]]] = {}
    for name, part in parts.items():
        ways.setdefault(part.name, {}).setdefault((part.of, part.axis), []).append(name)
    return [max(found.values(), key=len) for found in ways.values()]
