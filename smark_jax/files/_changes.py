"""The layouts a leaf can have come from, the layers of a file, and how well content agrees."""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from smark_jax._roles import Role, of_name

ALIKE = 0.3  # a copy that is still of use correlates by more than 0.5, what is no copy by about 0
_MARGIN = 0.2
_SAMPLE = 1 << 14
_TOLD = (Role.KERNEL, Role.BIAS, Role.SCALE, Role.MEAN, Role.VAR)  # what names tell apart in every framework
_COLLECTIONS = ("params/", "batch_stats/")


class Option(NamedTuple):
    """A leaf of the suspect in one layout: ``view`` in C order has the values, ``shape`` is theirs."""

    source: str
    change: str
    view: np.ndarray
    shape: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The option as ``given`` takes it."""
        return f"{self.source}: {self.change}" if self.change else self.source

    def leaf(self) -> np.ndarray:
        """The values in this layout."""
        return np.ascontiguousarray(self.view).reshape(self.shape)


class Choice(NamedTuple):
    """The option that agrees best with a leaf of the base, and whether no other agrees nearly as well."""

    option: Option
    correlation: float
    sure: bool
    options: tuple[Option, ...]
    leaf: np.ndarray


class Pair(NamedTuple):
    """A layer of the suspect taken for one of the base: what becomes of its leaves, by the base's names.

    ``agreement`` is the mean correlation of the leaves, weighted by their sizes; constant leaves have no say.
    """

    choices: dict[str, Choice]
    agreement: float


Pairs = dict[tuple[str, str], Pair]
"""By the names of the base's layer and the suspect's."""


def channels(suspect: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> set[int]:
    """How many channels an image may have had when it was flattened: those that some convolution puts out."""
    ours = {leaf.shape[-1] for leaf in base.values() if leaf.ndim > 2}
    return ours | {leaf.shape[0] for leaf in suspect.values() if leaf.ndim > 2}


def options(source: str, leaf: np.ndarray, channels: Iterable[int]) -> list[Option]:
    """The leaf in every layout it can have come from, as it is first."""
    found = [Option(source, "", leaf, leaf.shape)]
    if leaf.ndim > 2:
        order = (*range(2, leaf.ndim), 1, 0)
        words = {3: "OIW to WIO", 4: "OIHW to HWIO", 5: "OIDHW to DHWIO"}.get(leaf.ndim, "O, I first to I, O last")
        found.append(Option(source, words, leaf.transpose(order), tuple(leaf.shape[axis] for axis in order)))
    if leaf.ndim == 2:
        for words, matrix in (("", leaf), ("transposed", leaf.T)):
            found += [Option(source, words, matrix, matrix.shape)] if words else []
            rows, columns = matrix.shape
            for depth in sorted(channels):
                if 1 < depth < rows and rows % depth == 0:
                    view = matrix.reshape(depth, rows // depth, columns, copy=False).transpose(1, 0, 2)
                    change = f"flattened CHW to HWC ({depth} channels)"
                    found.append(Option(source, f"{words}, {change}" if words else change, view, matrix.shape))
    return found


def fitting(options: Iterable[Option], leaf: np.ndarray) -> list[Option]:
    """Those of the base's shape."""
    return [option for option in options if option.shape == leaf.shape]


def best(options: list[Option], leaf: np.ndarray) -> Choice:
    """The option whose content agrees best with the base's leaf."""
    scores = [_correlation(option.view, leaf) for option in options]
    order = sorted(range(len(options)), key=lambda i: -scores[i])
    first, second = scores[order[0]], scores[order[1]] if len(order) > 1 else -np.inf
    sure = len(options) == 1 or (first >= ALIKE and first - second >= _MARGIN)
    if not sure:
        values = options[0].leaf()
        sure = all(np.array_equal(values, option.leaf(), equal_nan=True) for option in options[1:])
    return Choice(options[order[0]], first, sure, tuple(options), leaf)


def _correlation(view: np.ndarray, leaf: np.ndarray) -> float:
    """Pearson's correlation of at most 16,384 evenly spread entries; 0 where either is constant."""
    leaf, view = np.atleast_1d(leaf), np.atleast_1d(view)
    index = np.linspace(0, leaf.size - 1, min(leaf.size, _SAMPLE)).astype(np.int64)
    ours = leaf[np.unravel_index(index, leaf.shape)].astype(np.float64)
    theirs = view[np.unravel_index(index, view.shape)].astype(np.float64)
    good = np.isfinite(ours) & np.isfinite(theirs)
    if not good.any():
        return 0.0
    ours, theirs = ours[good] - ours[good].mean(), theirs[good] - theirs[good].mean()
    norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return float(ours @ theirs) / norms if 0 < norms < np.inf else 0.0


def layers(leaves: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """The leaves' names by layer and role: ``{"conv1": {"kernel": "conv1.weight", "bias": "conv1.bias"}, ...}``."""
    found: dict[str, dict[str, str]] = {}
    for name, leaf in leaves.items():
        bare = next((name[len(c) :] for c in _COLLECTIONS if name.startswith(c)), name).replace("/", ".")
        layer, _, last = bare.rpartition(".")
        said = of_name(last)
        role: str = said if said is not None and said in _TOLD else last
        role = Role.SCALE if role is Role.KERNEL and leaf.ndim == 1 else role
        roles = found.setdefault(layer, {})
        roles[last if role in roles else role] = name
    return found


def singles(leaves: Mapping[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """Each leaf as a layer of its own, for names that say nothing."""
    return {name: {"": name} for name in leaves}


def pairs(
    ours: Mapping[str, Mapping[str, str]],
    theirs: Mapping[str, Mapping[str, str]],
    base: Mapping[str, np.ndarray],
    suspect: Mapping[str, np.ndarray],
    channels: set[int],
) -> Pairs:
    """For each layer of the base and each of the suspect that has all its roles in shapes that fit: what fits best."""
    listed = {name: options(name, leaf, channels) for name, leaf in suspect.items()}
    varied = {name for name, leaf in base.items() if leaf.size and not (leaf == leaf.reshape(-1)[0]).all()}
    found: Pairs = {}
    for (layer, roles), (other, places) in itertools.product(ours.items(), theirs.items()):
        if roles.keys() <= places.keys():
            fits = {name: fitting(listed[places[role]], base[name]) for role, name in roles.items()}
            if all(fits.values()):
                choices = {name: best(some, base[name]) for name, some in fits.items()}
                sizes = {name: base[name].size for name in choices if name in varied}
                total = sum(choices[name].correlation * size for name, size in sizes.items())
                found[layer, other] = Pair(choices, total / sum(sizes.values()) if sizes else 0.0)
    return found


def sure_pairs(left: Pairs) -> Pairs:
    """The pairs that content tells apart from all others of the same layer; if there are none, those without others."""
    rivals: dict[tuple[int, str], list[float]] = {}
    for key, pair in left.items():
        for side in (0, 1):
            rivals.setdefault((side, key[side]), []).append(pair.agreement)
    highest = {where: sorted(values)[-2:] for where, values in rivals.items()}

    def stands_out(key: tuple[str, str], pair: Pair) -> bool:
        beaten = (highest[side, key[side]] for side in (0, 1))
        return pair.agreement >= ALIKE and all(
            top[-1] == pair.agreement and (len(top) == 1 or top[-1] - top[0] >= _MARGIN) for top in beaten
        )

    found = {key: pair for key, pair in left.items() if stands_out(key, pair)}
    alone = {key: pair for key, pair in left.items() if all(len(rivals[side, key[side]]) == 1 for side in (0, 1))}
    return found or alone
