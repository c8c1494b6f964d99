r"""A suspect's leaves in the base's form: shapes, fused and split projections, gains that were merged away.

One network can be written in several forms: a 1x1 convolution as a matrix, the heads of a kernel on an axis of their
own or not, queries, keys and values in one leaf or in three, the gains of a normalisation merged into kernels.
:func:`smark_jax.files.match_layout` finds forms by content, which a random rewrite hides. Here names and shapes alone
say what is done, so that it stays possible where content says nothing: entries keep their order, and only the shapes
around them change.

Merged leaves count as what leaves the function alone: gains and variances as ones, shifts and means as zeros. The
base's own gains are folded before both are compared (:func:`smark_jax.alignment.gauge.canonical`), so the two agree.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from smark_jax._roles import Role, of_name
from smark_jax.alignment._identities import gain_name, reshape_groups
from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves

Shape = tuple[int, ...]

_PROJECTIONS = ("q|query|queries", "k|key|keys", "v|value|values")
_WORD = r"(?i)(?:^|(?<=[_.\-])|(?<=\bw))(?:{})(?:$|(?=[_.\-\d]))"
_WORDS = tuple(re.compile(_WORD.format(words)) for words in _PROJECTIONS)
_ADDED = (Role.BIAS, Role.MEAN)


class Formed(NamedTuple):
    """A suspect in the base's form.

    Attributes:
      leaves: by name; those that were changed have the base's name where names say which it is.
      changes: by name of these leaves, what was done, in words.
    """

    leaves: Leaves
    changes: dict[str, str]


def formed(graph: Graph, theirs: Leaves) -> Formed:
    """The suspect's leaves in the shapes of the base's, with its projections fused or split as the base's are.

    Args:
      graph: of the base.
      theirs: the suspect's leaves by name.
    """
    found, changes = dict(theirs), {}
    for name in theirs.keys() & graph.shapes.keys():
        leaf = reshaped(graph, name, theirs[name])
        if leaf is not None and leaf.shape != theirs[name].shape:
            found[name] = leaf
            changes[name] = f"reshaped from {theirs[name].shape}"
    base, other = _projections(graph.shapes), _projections(theirs)
    split = {pattern: names for pattern, names in base.items() if not theirs.keys() >= {*names.values()}}
    if split:
        _cut(graph, split, found, changes)
    elif other and not base:
        _join(graph, other, found, changes)
    return Formed(found, changes)


def reshaped(graph: Graph, path: str, leaf: np.ndarray) -> np.ndarray | None:
    """A leaf with the axes of the base's leaf at ``path``, its entries in the same order; None where it has others.

    Axes of length one come and go, and neighbours are joined or taken apart.
    """
    shape = graph.shapes[path]
    if could_be(graph, path, leaf.shape):
        return leaf
    if leaf.size == math.prod(shape) and _in_order(leaf.shape, graph.own(path)):
        return graph.viewed({path: leaf.reshape(graph.own(path))})[path]
    if graph.own(path) != shape:
        return None
    kept = iter(size for size in leaf.shape if size != 1)
    wide = tuple(1 if size == 1 else next(kept, 0) for size in shape)
    return leaf.reshape(wide) if math.prod(wide) == leaf.size and could_be(graph, path, wide) else None


def placed(graph: Graph, names: Mapping[str, str], theirs: Leaves) -> Leaves:
    """The suspect's leaves by the base's paths, in the base's shapes where their entries allow it."""
    found = {path: (reshaped(graph, path, theirs[name]), theirs[name]) for path, name in names.items()}
    return {path: other if leaf is None else leaf for path, (leaf, other) in found.items()}


def could_be(graph: Graph, path: str, shape: Shape) -> bool:
    """Whether a shape has the axes of the base's leaf at ``path``, apart from the widths of its spaces."""
    mine = graph.shapes[path]
    return len(mine) == len(shape) and all(
        bool(graph.spaces(path, axis)) or mine[axis] == shape[axis] for axis in range(len(shape))
    )


def mergeable(graph: Graph, ours: Leaves) -> frozenset[str]:
    """The base's vectors that somebody may have merged into kernels: gains, and what is added beside them."""
    paths: set[str] = set()
    for some in graph.factors.values():
        for factor in some:
            paths |= factor.vector.paths
            paths |= {graph.biases[name] for name in (gain_name(factor.gain),) if name in graph.biases}
    layers = {path.removeprefix("params/").removeprefix("batch_stats/").rpartition("/")[0] for path in paths}
    for path in ours:
        layer, _, last = path.removeprefix("params/").removeprefix("batch_stats/").rpartition("/")
        if layer in layers and of_name(last) in (Role.MEAN, Role.VAR):
            paths.add(path)
    return frozenset(path for path in paths if max(ours[path].shape, default=1) == ours[path].size)


def neutral(path: str, leaf: np.ndarray) -> np.ndarray:
    """What a merged leaf counts as: zeros for what is added, ones for what multiplies."""
    return np.zeros_like(leaf) if of_name(path) in _ADDED else np.ones_like(leaf)


def _in_order(source: Shape, target: Shape) -> bool:
    """Whether neighbouring axes are only joined or taken apart, and axes of length one come and go."""
    one, other = ([size for size in shape if size != 1] for shape in (source, target))
    return 0 not in one and all(len(a) == 1 or len(b) == 1 for a, b in reshape_groups(one, other))


def _projections(leaves: Collection[str]) -> dict[str, dict[int, str]]:
    """Names of queries', keys' and values' leaves by their common pattern, where all three are there."""
    found: dict[str, dict[int, str]] = {}
    for name in leaves:
        steps = name.split("/")
        for at, step in enumerate(steps):
            for part, word in enumerate(_WORDS):
                if word.search(step):
                    pattern = "/".join([*steps[:at], "*", *steps[at + 1 :]])
                    found.setdefault(pattern, {})[part] = name
    return {pattern: {i: names[i] for i in range(3)} for pattern, names in found.items() if len(names) == 3}


def _fits(pattern: str, name: str) -> bool:
    """Whether a name is the pattern with one step in place of its star."""
    steps, others = pattern.split("/"), name.split("/")
    return len(steps) == len(others) and all(a in ("*", b) for a, b in zip(steps, others, strict=True))


def _cut(graph: Graph, split: Mapping[str, Mapping[int, str]], found: Leaves, changes: dict[str, str]) -> None:
    """Cuts leaves of the suspect that hold the base's queries, keys and values together."""
    for pattern, names in split.items():
        shape = graph.shapes[names[0]]
        ways = {name: _lead(leaf.shape, shape) for name, leaf in found.items() if name not in graph.shapes}
        fused = [name for name, lead in ways.items() if lead and _fits(pattern, name)]
        if len(fused) == 1 and all(graph.shapes[name] == shape for name in names.values()):
            whole = found.pop(fused[0]).reshape(ways[fused[0]] or 1, 3, -1)
            for part, name in names.items():
                found[name] = whole[:, part].reshape(shape)
                changes[name] = f"part {part + 1} of 3 of {fused[0]}"
    shapes = {graph.shapes[name] for names in split.values() for name in names.values()}
    whole = {math.prod(shape) for shape in graph.shapes.values()}
    for name in [name for name, leaf in found.items() if name not in graph.shapes and leaf.size not in whole]:
        ways = {shape: lead for shape in shapes if (lead := _lead(found[name].shape, shape))}
        if len(ways) == 1:  # of another name: pairing says whose parts they are
            ((shape, lead),) = ways.items()
            parts = found.pop(name).reshape(lead, 3, -1)
            for part in range(3):
                words = f"part {part + 1} of 3 of {name}"
                found[words], changes[words] = parts[:, part].reshape(shape), words


def _join(graph: Graph, split: Mapping[str, Mapping[int, str]], found: Leaves, changes: dict[str, str]) -> None:
    """Joins the suspect's queries, keys and values where the base holds them together."""
    for pattern, names in split.items():
        leaves = [found[names[part]] for part in range(3)]
        if any(leaf.shape != leaves[0].shape for leaf in leaves):
            continue
        own = {path: graph.own(path) for path in graph.shapes if path not in found}
        ways = {path: _lead(shape, leaves[0].shape) for path, shape in own.items()}
        fused = [path for path, lead in ways.items() if lead]
        named = [path for path in fused if _fits(pattern, path)]
        if not fused or len(named) > 1:
            continue
        path, parts = (named or fused)[0], ", ".join(names[part] for part in range(3))
        name = path if named else parts
        for source in names.values():
            del found[source]
        whole = np.stack([leaf.reshape(ways[path] or 1, -1) for leaf in leaves], axis=1)
        found[name] = graph.viewed({path: whole.reshape(graph.own(path))})[path]
        changes[name] = f"joined from {parts}"


def _lead(whole: Shape, part: Shape) -> int | None:
    """How often three parts follow each other in a leaf of shape ``whole``; None where no single axis holds them."""
    starts = {math.prod(part[:axis]) for axis in range(len(part) + 1)}
    ends = {math.prod(part[axis:]) for axis in range(len(part) + 1)}
    found = {
        math.prod(whole[:axis])
        for axis, size in enumerate(whole)
        if size % 3 == 0 and math.prod(whole[:axis]) in starts and math.prod(whole[axis + 1 :]) in ends
    }
    return found.pop() if len(found) == 1 and math.prod(whole) == 3 * math.prod(part) else None


def missed(ours: Leaves, left_out: Collection[str]) -> float:
    """The share of the base's weights that the suspect lacks or has in another shape."""
    return sum(ours[path].size for path in left_out) / max(1, sum(leaf.size for leaf in ours.values()))


def differing(graph: Graph, theirs: Leaves, ours: Leaves) -> str:
    """What keeps a suspect from the base's form, in words, and what to do next.

    Args:
      graph: of the base.
      theirs: the suspect's leaves by the base's paths, as far as they were paired.
      ours: the base's.
    """
    lacking = sorted(ours.keys() - theirs.keys())
    other = {path: leaf.shape for path, leaf in theirs.items() if not could_be(graph, path, leaf.shape)}
    found = [f"{len(lacking)} of {len(ours)} leaves are missing ({_some(lacking)})"] if lacking else []
    sizes: dict[tuple[int, int], int] = {}
    for path, shape in other.items():
        mine = graph.shapes[path]
        pairs = {(a, b) for a, b in zip(mine, shape, strict=False) if a != b and len(mine) == len(shape)}
        for pair in pairs:
            sizes[pair] = sizes.get(pair, 0) + 1
    for (mine, its), count in sorted(sizes.items(), key=lambda item: -item[1])[:3]:
        found.append(f"{its} channels where the base has {mine} ({count} leaves)")
    split = [path for path, shape in other.items() if math.prod(shape) == ours[path].size and len(shape) > 1]
    for path in sorted(split, key=lambda path: (-ours[path].size, path))[:1]:
        whole = graph.own(path)
        found.append(f"{path!r} is {other[path]}, not {whole} (other heads, or transposed)")
    share = missed(ours, [*lacking, *other])
    return (
        f"It lacks {100 * share:.0f} % of the base's weights, or has them in other shapes"
        f"{': ' if found else '.'}{'; '.join(found)}{'.' if found else ''} "
        "Only weights of the base's widths, depth and heads can be aligned: bring it to the base's layout "
        "(files.match_layout), or test its answers (smark_jax.blackbox)."
    )


def _some(names: Collection[str]) -> str:
    first = list(names)[:3]
    return ", ".join(map(repr, first)) + (", ..." if len(names) > len(first) else "")
