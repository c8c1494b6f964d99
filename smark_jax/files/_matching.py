"""Finds the suspect's counterpart of each of the base's leaves: by names if they agree, else by content."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping

import numpy as np

from smark_jax.files import _changes, _content, _pairing, _parts
from smark_jax.files._changes import Place
from smark_jax.files._pairing import Paired

Leaves = Mapping[str, np.ndarray]
_Layers = Callable[[Leaves], _pairing.Layers]

_WRAPPERS = ("module", "_module", "_orig_mod")  # steps that PyTorch's wrappers put into names, anywhere
_LEAST_TIED = 16
_NOTHING = Paired({}, frozenset(), {})


def same_names(suspect: Leaves, base: Leaves) -> dict[str, str]:
    """The suspect's leaves with the same names as the base's leaves, apart from an outer level and wrappers' steps.

    Uses the outer level under which the most names agree. The result is empty if fewer than half of the names agree.
    """
    plain, wanted = _plain(suspect), _plain(base)
    if len(plain) < len(suspect) or len(wanted) < len(base):
        return {}
    around = f"{next(iter(wanted)).split('/')[0]}/"
    found: dict[str, str] = {}
    for cut in ("", around) if all(name.startswith(around) for name in wanted) else ("",):
        ends = {name[len(cut) :]: full for name, full in wanted.items()}
        levels: dict[str, int] = {}
        for name in plain:
            for level in _levels(name):
                if name[len(level) :] in ends:
                    levels[level] = levels.get(level, 0) + 1
        for level in sorted(levels, key=lambda level: (-levels[level], len(level)))[:1]:
            here = {full: plain[level + end] for end, full in ends.items() if level + end in plain}
            found = max(found, here, key=len)
    return found if 2 * len(found) >= len(base) else {}


def _plain(leaves: Leaves) -> dict[str, str]:
    """Leaves' names by their steps joined by ``/``, without those of wrappers."""
    steps = ((name, name.replace(".", "/").split("/")) for name in leaves)
    return {"/".join(step for step in path if step not in _WRAPPERS): name for name, path in steps}


def _levels(name: str) -> list[str]:
    """The possible outer levels of a leaf: none, or up to four steps of its path."""
    steps = name.split("/", 4)
    return ["/".join([*steps[:depth], ""]) for depth in range(len(steps))]


def by_name(suspect: Leaves, base: Leaves, names: Mapping[str, str], channels: tuple[int, ...]) -> Paired:
    """Pairs leaves by name, and the remaining ones by content.

    Names can be swapped on purpose. So if content contradicts the names in a layer and gives a better match, content
    wins.
    """
    choices: dict[str, Place] = {}
    settled: set[str] = set()
    asked: dict[str, tuple[str, ...]] = {}
    fits = {name: _changes.options(o, suspect[o], base[name].shape, channels) for name, o in names.items()}
    whole = all(fits.values())
    for name, other in names.items():
        as_it_is = suspect[other].shape == base[name].shape
        options = fits[name][:1] if as_it_is else fits[name]
        best = _changes.best(options, base[name]) if options else None
        if best is not None and best.told and (whole or as_it_is or best.correlation >= _content.ALIKE):
            choices[name] = best.option
            settled |= {name} if best.sure and best.correlation >= _content.ALIKE else set()
        elif best is not None and whole:
            asked[name] = tuple(option.answer for option in options)
        else:
            choices[name] = _changes.unchanged(other, suspect[other])
    denied = {name for name in choices if base[name].ndim > 1 and name not in settled and fits[name]}
    doubted = {layer: roles for layer, roles in _changes.layers(base).items() if not denied.isdisjoint(roles.values())}
    doubted_names = {name for roles in doubted.values() for name in roles.values()}
    lost = set(base) - set(names)
    kept = {source for name, place in choices.items() if name not in doubted_names for source in place.sources}
    kept |= {names[name] for name in asked}
    free = {name: leaf for name, leaf in suspect.items() if name not in kept}
    rest = {name: base[name] for name in base if name in doubted_names | lost}
    better = _NOTHING
    if rest and free:
        with contextlib.suppress(_pairing.TooMany):
            better = by_layer(free, rest, channels)
    told = {name: place for name, place in better.choices.items() if name in better.settled}
    layers = [set(roles.values()) for roles in _changes.layers(rest).values()]
    moved = {name for layer in layers if not layer.isdisjoint(told) for name in layer & better.choices.keys()}
    moved |= {name for name in lost & better.choices.keys() if _alike(better.choices[name], base[name])}
    taken = {source for name in moved for source in better.choices[name].sources}
    choices = {n: place for n, place in choices.items() if taken.isdisjoint(place.sources) and n not in moved}
    choices |= {name: better.choices[name] for name in moved}
    return Paired(choices, frozenset((settled - moved) & choices.keys() | told.keys() & moved), asked)


def _alike(place: Place, leaf: np.ndarray) -> bool:
    """Whether content speaks for a place, even if it speaks for others nearly as well."""
    found = _changes.best([place], leaf).correlation if isinstance(place, _changes.Option) else 1.0
    return found >= _content.ALIKE


def by_layer(suspect: Leaves, base: Leaves, channels: tuple[int, ...]) -> Paired:
    """Pairs by content: layers, then single leaves, then parts of leaves.

    Remaining layers and leaves are paired if only one fits.
    """
    found = _NOTHING
    for group in (_changes.layers, _changes.singles):
        found = _with(found, _pairing.pair(_left(found, suspect, base, channels, group)))
    with contextlib.suppress(_pairing.TooMany):
        ours, theirs = _unpaired(found, suspect, base)
        kernels = {name: leaf for name, leaf in ours.items() if len(_changes.squeezed(leaf.shape)) > 1}
        scaled = _left(_NOTHING, theirs, kernels, channels, _changes.singles)
        found = _with(found, _pairing.pair(scaled, signs=True))
        for cut in (_parts.fused, _parts.split):
            ours, theirs = _unpaired(found, suspect, base)
            found = _with(found, cut(theirs, ours, channels))
    for group in (_changes.layers, _changes.singles):
        found = _with(found, _pairing.pair(_left(found, suspect, base, channels, group), alone=True))
    return found


def _with(found: Paired, more: Paired) -> Paired:
    choices = found.choices | more.choices
    asked = {name: some for name, some in (found.open | more.open).items() if name not in choices}
    return Paired(choices, found.settled | more.settled, asked)


def _unpaired(found: Paired, suspect: Leaves, base: Leaves) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The leaves of the base, and of the suspect, that are not paired yet."""
    used = {source for place in found.choices.values() for source in place.sources}
    ours = {name: leaf for name, leaf in base.items() if name not in found.choices}
    return ours, {name: leaf for name, leaf in suspect.items() if name not in used}


def _left(found: Paired, suspect: Leaves, base: Leaves, channels: tuple[int, ...], group: _Layers) -> _pairing.Leaves:
    """What is not paired yet, in layers."""
    ours, theirs = _unpaired(found, suspect, base)
    sizes = {leaf.size for leaf in ours.values()}
    theirs = {name: leaf for name, leaf in theirs.items() if leaf.size in sizes}
    return _pairing.Leaves(group(ours), group(theirs), ours, theirs, channels)


def with_twins(choices: Mapping[str, Place], base: Leaves) -> dict[str, Place]:
    """The choices, and the same ones for missing leaves that equal a chosen one: files drop a tensor's second name.

    As for :func:`smark_jax.carriers.with_ties`, such leaves have 16 weights or more and are not constant.
    """
    found = dict(choices)
    missing = {name: leaf for name, leaf in base.items() if name not in choices and leaf.size >= _LEAST_TIED}
    kinds = {(leaf.shape, leaf.dtype) for leaf in missing.values()}
    chosen = {_digest(base[name]): name for name in choices if (base[name].shape, base[name].dtype) in kinds}
    for name, leaf in missing.items():
        twin = chosen.get(_digest(leaf))
        if twin is not None and np.ptp(leaf) != 0:
            found[name] = choices[twin]
    return found


def _digest(leaf: np.ndarray) -> tuple[str, bytes]:
    return str((leaf.shape, leaf.dtype)), hashlib.sha256(leaf.tobytes()).digest()
