r"""Which axes of which weights share a channel space, read off a network's own jaxpr.

Every axis of every leaf starts with an identity of its own for each of its entries. The pass walks through the
network's equations: where two entries must keep together (a kernel's input channel and the activation that it meets,
the two sides of a residual addition, a bias and the channel that it is added to), their identities are linked.
Reshapes, transposes, concatenations and slices carry identities along. Connected components are the network's *units*;
units that touch the same axes in the same way can change places with each other and form a *space*. Images, logits,
kernels' windows and everything that an unknown operation touches stay fixed.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import sparse

from smark_jax import _validate
from smark_jax._types import ApplyFn, PyTree

FIXED = -1
"""The space of entries that stay where they are."""


class Segment(NamedTuple):
    """A run of entries of an axis.

    Attributes:
      space: number of the space, or :data:`FIXED`.
      outer: how often the whole space is repeated.
      inner: how often each unit is repeated in a row. Entry ``(o * size + unit) * inner + i`` is the unit's.
      length: entries of the run, ``outer * size * inner``.
    """

    space: int
    outer: int
    inner: int
    length: int


class Graph(NamedTuple):
    """The channel spaces of a network.

    Attributes:
      shapes: each leaf's shape, by path.
      layout: by path and axis, the runs that make up the axis, in order.
      sizes: units of each space.
      consumed: paths and axes over which the network sums: a kernel's inputs.
      groups: for each space, how many units in a row are normalised together (group norm); 1 for the others.
      unfollowed: what the pass could not follow; the entries concerned are fixed.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layout: Mapping[tuple[str, int], tuple[Segment, ...]]
    sizes: tuple[int, ...]
    consumed: frozenset[tuple[str, int]]
    groups: tuple[int, ...]
    unfollowed: tuple[str, ...]

    def places(self, space: int) -> list[tuple[str, int]]:
        """Paths and axes at which a space's units have entries."""
        return [place for place, segments in self.layout.items() if any(s.space == space for s in segments)]

    def spaces(self, path: str, axis: int) -> set[int]:
        """The spaces of an axis, without :data:`FIXED`."""
        return {segment.space for segment in self.layout[path, axis]} - {FIXED}

    def entries(self, path: str, axis: int, sizes: Sequence[int]) -> dict[int, np.ndarray]:
        """By space, the axis' entries of each unit, shape [units, entries of each], when spaces have these sizes."""
        found: dict[int, list[np.ndarray]] = {}
        start = 0
        for segment in self.layout[path, axis]:
            if segment.space == FIXED:
                start += segment.length
                continue
            shape = (segment.outer, sizes[segment.space], segment.inner)
            run = start + np.arange(math.prod(shape)).reshape(shape).swapaxes(0, 1).reshape(shape[1], -1)
            found.setdefault(segment.space, []).append(run)
            start += math.prod(shape)
        return {space: np.concatenate(runs, axis=1) for space, runs in found.items()}

    def length(self, path: str, axis: int, sizes: Sequence[int]) -> int:
        """Entries of the axis when spaces have these sizes."""
        runs = self.layout[path, axis]
        return sum(s.length if s.space == FIXED else s.outer * sizes[s.space] * s.inner for s in runs)

    def widths(self, leaves: Mapping[str, np.ndarray]) -> tuple[int, ...]:
        """How many units each space has in a model of the same architecture whose leaves may be wider.

        Raises:
          ValueError: when a leaf's shape fits no widths.
        """
        sizes: dict[int, int] = {}
        cause = "The suspect is of another architecture, or its kernels are transposed."
        for path, leaf in leaves.items():
            shape = self.shapes[path]
            if leaf.ndim != len(shape):
                raise _validate.fail("alignment", f"leaf {path!r} of {len(shape)} axes", f"shape {leaf.shape}", cause)
        pending = [place for place in self.layout if place[0] in leaves]
        while pending:
            solved = []
            for path, axis in pending:
                rest, unknown = leaves[path].shape[axis], {}
                for segment in self.layout[path, axis]:
                    if segment.space == FIXED:
                        rest -= segment.length
                    elif segment.space in sizes:
                        rest -= segment.outer * segment.inner * sizes[segment.space]
                    else:
                        unknown[segment.space] = unknown.get(segment.space, 0) + segment.outer * segment.inner
                if len(unknown) > 1:
                    continue
                solved.append((path, axis))
                for space, times in unknown.items():
                    sizes[space], rest = divmod(rest, times)
                if rest or any(sizes[space] < 1 for space in unknown):
                    known = {s: sizes.get(s, self.sizes[s]) for s in range(len(self.sizes))}
                    usual = self.length(path, axis, [known[s] for s in range(len(known))])
                    expected = f"leaf {path!r} with {usual} entries on axis {axis}"
                    if unknown:
                        expected = f"leaf {path!r} with a multiple of {max(unknown.values())} entries on axis {axis}"
                    raise _validate.fail("alignment", expected, f"shape {leaves[path].shape}", cause)
            if not solved:  # only sums of widths are known: as in the base
                space = next(s for s in range(len(self.sizes)) if s not in sizes)
                sizes[space] = self.sizes[space]
            pending = [place for place in pending if place not in solved]
        return tuple(sizes.get(space, size) for space, size in enumerate(self.sizes))

    def normalised(self, space: int) -> bool:
        """Whether a normalisation takes the scale out of a space's incoming weights: it has more than biases."""
        places = self.places(space)
        made = [p for p in places if p not in self.consumed and len(self.shapes[p[0]]) > 1]
        return sum(len(self.shapes[path]) == 1 for path, _ in places) > len(made)


def trace(apply_fn: ApplyFn, params: PyTree, example_images: Any) -> Graph:
    """The channel spaces of ``apply_fn(params, example_images)``.

    Args:
      apply_fn: the network, pure.
      params: what it takes first; only shapes and dtypes are looked at.
      example_images: images as it takes them; only shape and dtype are looked at.

    Raises:
      ValueError: when the network refuses these parameters or images.
    """
    shaped = lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x))  # noqa: E731
    try:
        closed = jax.make_jaxpr(apply_fn)(jax.tree.map(shaped, params), shaped(example_images))
    except Exception as error:
        cause = "apply_fn(base, example_images) must give logits; with batch norm, base is the whole variables dict."
        raise _validate.fail("alignment", "a network that takes base and images", f"an error: {error}", cause) from None
    named = [(_validate.path_name(p), np.shape(x)) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    walk = _Walk()
    start = [
        tuple(_Role((axis,), walk.fresh((size,)), (path, axis)) for axis, size in enumerate(shape) if size > 1)
        for path, shape in named
    ]
    axes = {role.source: role.ids for roles in start for role in roles if role.source}
    start.append(tuple(_Role((i,), walk.fixed((n,)), None) for i, n in enumerate(np.shape(example_images)) if n > 1))
    for roles in walk.run(closed.jaxpr, [walk.constant(c) for c in closed.consts], start):
        walk.freeze(roles)
    return _graph(dict(named), axes, walk)


class _Role(NamedTuple):
    """Identities along some axes of a value: ``ids`` has these axes' sizes as its shape."""

    axes: tuple[int, ...]
    ids: np.ndarray
    source: tuple[str, int] | None


_Roles = tuple[_Role, ...]

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p
    logistic lt max min mul ne neg nextafter not optimization_barrier or polygamma pow real reduce_precision rem round
    rsqrt select_n sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split())
_CALLS = frozenset(
    """pjit jit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr checkpoint remat remat2
    custom_lin""".split()
)


class _Walk:
    """The pass over a jaxpr: hands out identities, links and fixes them."""

    def __init__(self) -> None:
        self.count = 0
        self.links: list[np.ndarray] = []
        self.frozen: list[np.ndarray] = []
        self.together: list[np.ndarray] = []
        self.consumed: set[tuple[str, int]] = set()
        self.unfollowed: dict[str, None] = {}

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        first, self.count = self.count, self.count + math.prod(shape)
        return np.arange(first, self.count).reshape(shape)

    def fixed(self, shape: tuple[int, ...]) -> np.ndarray:
        ids = self.fresh(shape)
        self.frozen.append(ids.reshape(-1))
        return ids

    def constant(self, value: Any) -> _Roles:
        return tuple(_Role((axis,), self.fixed((n,)), None) for axis, n in enumerate(np.shape(value)) if n > 1)

    def freeze(self, roles: _Roles) -> None:
        self.frozen.extend(role.ids.reshape(-1) for role in roles)

    def link(self, a: np.ndarray, b: np.ndarray) -> None:
        self.links.append(np.stack([a.reshape(-1), b.reshape(-1)]))

    def run(self, jaxpr: Any, consts: Sequence[_Roles], inputs: Sequence[_Roles]) -> list[_Roles]:
        env: dict[Any, _Roles] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        read = lambda atom: () if hasattr(atom, "val") else env.get(atom, ())  # noqa: E731
        for eqn in jaxpr.eqns:
            roles = [read(atom) for atom in eqn.invars]
            out = self.equation(eqn, roles)
            env.update(zip(eqn.outvars, (tuple(map(_simplified, o)) for o in out), strict=True))
            for var in eqn.outvars:
                env[var] = tuple(role for role in env[var] if role.axes)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, roles: list[_Roles]) -> list[_Roles]:
        name, params = eqn.primitive.name, eqn.params
        shapes = [tuple(atom.aval.shape) for atom in eqn.invars]
        outs = [tuple(var.aval.shape) for var in eqn.outvars]
        if name in _CALLS:
            inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
            if inner is not None:
                closed = hasattr(inner, "consts")
                body, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
                if len(body.invars) == len(roles):
                    return self.run(body, [self.constant(c) for c in consts], roles)
        if name in _ELEMENTWISE:
            return [self.elementwise(roles)] * len(outs)
        if name in _REDUCTIONS:
            gone = set(params["axes"])
            for role in roles[0]:
                kept = [i for i, axis in enumerate(role.axes) if axis not in gone]
                if kept and len(kept) < len(role.axes):
                    first = role.ids[tuple(0 if i in kept else slice(None) for i in range(role.ids.ndim))]
                    self.together.append(first.reshape(-1))
            return [_moved(roles[0], [a for a in range(len(shapes[0])) if a not in gone])]
        rule: Callable[..., _Roles] | None = getattr(self, f"rule_{name}", None)
        out = rule(roles, shapes, outs[0], params) if rule else None
        if out is not None and len(outs) == 1:
            return [out]
        if name == "split":
            return self.split(roles[0], params)
        if name not in ("iota", "random_bits", "random_wrap", "random_seed", "random_unwrap"):
            self.give_up(name, [role for operand in roles for role in operand])
        return [tuple(_Role((a,), self.fixed((n,)), None) for a, n in enumerate(o) if n > 1) for o in outs]

    def give_up(self, why: str, roles: Sequence[_Role]) -> None:
        """What an operation does with these entries is unknown: they are fixed, and the operation is reported."""
        if roles:
            self.unfollowed[why] = None
            self.freeze(tuple(roles))

    def elementwise(self, operands: Sequence[_Roles]) -> _Roles:
        found: dict[tuple[int, ...], _Role] = {}
        for role in itertools.chain(*operands):
            if role.axes in found:
                self.link(found[role.axes].ids, role.ids)
            else:
                found[role.axes] = role
        # A group's own entry beside its members' (group norm): the members' entries say more.
        widest = sorted(found, key=len, reverse=True)
        kept: list[tuple[int, ...]] = []
        for axes in widest:
            if not any(set(axes) & set(other) for other in kept):
                kept.append(axes)
        return tuple(found[axes] for axes in sorted(kept))

    def contract(
        self, left: _Roles, left_axes: Sequence[int], right: _Roles, right_axes: Sequence[int], why: str
    ) -> None:
        """Links what is multiplied and summed over."""
        pairs: dict[tuple[int, ...], list[_Role]] = {}
        for roles, axes in ((left, left_axes), (right, right_axes)):
            for role in roles:
                inside = [axis in axes for axis in role.axes]
                if not any(inside):
                    continue
                if not all(inside):
                    self.give_up(why, [role])
                    continue
                at = [list(axes).index(axis) for axis in role.axes]
                order = np.argsort(at)
                ids = role.ids.transpose(order)
                pairs.setdefault(tuple(sorted(at)), []).append(role._replace(ids=ids))
                if role.source:
                    self.consumed.add(role.source)
        for both in pairs.values():
            if len(both) == 2:
                self.link(both[0].ids, both[1].ids)
            else:
                self.give_up(why, both)

    def rule_dot_general(self, roles: list[_Roles], shapes: Any, out: Any, params: Any) -> _Roles:
        (contract_l, contract_r), (batch_l, batch_r) = params["dimension_numbers"]
        self.contract(roles[0], contract_l, roles[1], contract_r, "dot_general")
        free = [
            [a for a in range(len(shape)) if a not in (*contracted, *batch)]
            for shape, contracted, batch in ((shapes[0], contract_l, batch_l), (shapes[1], contract_r, batch_r))
        ]
        left = _moved(roles[0], [*batch_l, *free[0]])
        right = _moved(roles[1], [*batch_r, *free[1]])
        shift = {axis: axis for axis in range(len(batch_l))}
        shift |= {len(batch_l) + i: len(batch_l) + len(free[0]) + i for i in range(len(free[1]))}
        right = tuple(role._replace(axes=tuple(shift[a] for a in role.axes)) for role in right)
        return _sourceless(self.elementwise([left, right]))

    def rule_conv_general_dilated(self, roles: list[_Roles], shapes: Any, out: Any, params: Any) -> _Roles:
        lhs, rhs, result = params["dimension_numbers"]
        groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
        image = {role.axes: role for role in roles[0]}
        kernel = {role.axes: role for role in roles[1]}
        self.freeze(tuple(role for axes, role in kernel.items() if set(axes) & set(rhs[2:])))
        feature, made = image.get((lhs[1],)), kernel.get((rhs[0],))
        depthwise = groups == shapes[0][lhs[1]] == shapes[1][rhs[0]]
        if groups == 1 and batch_groups == 1:
            self.contract(roles[0], [lhs[1]], roles[1], [rhs[1]], "conv_general_dilated")
        elif depthwise and batch_groups == 1 and feature and made:
            self.link(feature.ids, made.ids)
        else:
            self.give_up("grouped convolution", [*roles[0], *roles[1]])
        batch = image.get((lhs[0],))
        kept = [(batch, result[0]), (made, result[1])]
        return tuple(_Role((axis,), role.ids, None) for role, axis in kept if role is not None)

    def rule_reshape(self, roles: list[_Roles], shapes: Any, out: tuple[int, ...], params: Any) -> _Roles:
        if params.get("dimensions") is not None:
            self.give_up("reshape", roles[0])
            return ()
        found: list[_Role] = []
        pending = list(roles[0])
        for before, after in _reshape_groups(shapes[0], out):
            inside = [role for role in pending if set(role.axes) <= set(before)]
            crossing = [role for role in pending if set(role.axes) & set(before) and role not in inside]
            if len(inside) > 1:
                self.give_up("reshape that merges two channel axes", inside)
                found.append(_Role(tuple(after), self.fixed(tuple(out[a] for a in after)), None))
            elif inside:
                role = inside[0]
                shape = [shapes[0][a] for a in before]
                spread = np.broadcast_to(
                    role.ids.reshape([n if a in role.axes else 1 for a, n in zip(before, shape, strict=True)]), shape
                )
                found.append(_Role(tuple(after), spread.reshape([out[a] for a in after]), role.source))
            if crossing:
                self.give_up("reshape across two channel axes", crossing)
            pending = [role for role in pending if not set(role.axes) & set(before)]
        return tuple(found)

    def rule_transpose(self, roles: list[_Roles], shapes: Any, out: Any, params: Any) -> _Roles:
        return _moved(roles[0], params["permutation"])

    def rule_squeeze(self, roles: list[_Roles], shapes: Any, out: Any, params: Any) -> _Roles:
        return _moved(roles[0], [a for a in range(len(shapes[0])) if a not in params["dimensions"]])

    def rule_broadcast_in_dim(self, roles: list[_Roles], shapes: Any, out: Any, params: Any) -> _Roles:
        to = params["broadcast_dimensions"]
        return tuple(role._replace(axes=tuple(to[a] for a in role.axes)) for role in roles[0])

    def rule_concatenate(self, roles: list[_Roles], shapes: Any, out: tuple[int, ...], params: Any) -> _Roles:
        d = params["dimension"]
        joined, others = [], []
        for operand, shape in zip(roles, shapes, strict=True):
            along = [role for role in operand if d in role.axes]
            self.give_up("concatenate", [role for role in along if role.axes != (d,)])
            plain = [role.ids for role in along if role.axes == (d,)]
            joined.append(plain[0] if plain else self.fixed((shape[d],)))
            others.append(tuple(role for role in operand if d not in role.axes))
        whole = _Role((d,), np.concatenate(joined), None)
        return (*self.elementwise(others), *((whole,) if out[d] > 1 else ()))

    def rule_slice(self, roles: list[_Roles], shapes: Any, out: Any, params: Any) -> _Roles:
        strides = params["strides"] or (1,) * len(shapes[0])
        cuts = [slice(*cut) for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
        return tuple(role._replace(ids=role.ids[tuple(cuts[a] for a in role.axes)], source=None) for role in roles[0])

    def split(self, roles: _Roles, params: Any) -> list[_Roles]:
        axis, ends = params["axis"], np.cumsum(params["sizes"])
        starts = [0, *ends[:-1]]
        whole = slice(None)
        return [
            tuple(
                role._replace(ids=role.ids[tuple(slice(a, b) if x == axis else whole for x in role.axes)], source=None)
                for role in roles
            )
            for a, b in zip(starts, ends, strict=True)
        ]

    def rule_pad(self, roles: list[_Roles], shapes: Any, out: tuple[int, ...], params: Any) -> _Roles:
        found = []
        for role in roles[0]:
            changes = [params["padding_config"][a] for a in role.axes]
            if all(change == (0, 0, 0) for change in changes):
                found.append(role)
            elif len(changes) == 1 and changes[0][2] == 0 and min(changes[0][:2]) >= 0:
                low, high, _ = changes[0]
                found.append(
                    _Role(role.axes, np.concatenate([self.fixed((low,)), role.ids, self.fixed((high,))]), None)
                )
            else:
                self.give_up("pad", [role])
        return tuple(found)

    def rule_reduce_window(self, roles: list[_Roles], shapes: Any, out: Any, params: Any) -> _Roles:
        window = params["window_dimensions"]
        touched = [role for role in roles[0] if any(window[a] != 1 for a in role.axes)]
        self.give_up("reduce_window over channels", touched)
        return tuple(role for role in roles[0] if role not in touched)

    rule_reduce_window_max = rule_reduce_window
    rule_reduce_window_sum = rule_reduce_window
    rule_reduce_window_min = rule_reduce_window


def _simplified(role: _Role) -> _Role:
    """Without the axes along which identities do not change."""
    ids, kept = role.ids, []
    for axis in reversed(range(ids.ndim)):
        first = ids.take([0], axis=axis)
        if ids.shape[axis] == 1 or (ids == first).all():
            ids = first.squeeze(axis)
        else:
            kept.append(role.axes[axis])
    return role._replace(axes=tuple(reversed(kept)), ids=ids)


def _moved(roles: _Roles, order: Sequence[int]) -> _Roles:
    """Roles of a value whose axes became ``order``; a role that lost an axis is gone."""
    place = {axis: i for i, axis in enumerate(order)}
    found = []
    for role in roles:
        if all(axis in place for axis in role.axes):
            axes = [place[axis] for axis in role.axes]
            by = np.argsort(axes)
            found.append(role._replace(axes=tuple(sorted(axes)), ids=role.ids.transpose(by)))
    return tuple(found)


def _sourceless(roles: _Roles) -> _Roles:
    return tuple(role._replace(source=None) for role in roles)


def _reshape_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of neighbouring axes, before and after, with equal numbers of entries."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        a = b = 1
        while a != b or not (left or right):
            if i < len(before) and (a <= b or j == len(after)):
                a, left, i = a * before[i], [*left, i], i + 1
            else:
                b, right, j = b * after[j], [*right, j], j + 1
        groups.append((left, right))
    return groups


def _graph(shapes: dict[str, tuple[int, ...]], axes: dict[tuple[str, int], np.ndarray], walk: _Walk) -> Graph:
    """Components of the links, gathered into spaces by what they touch."""
    n = walk.count
    pairs = np.concatenate([np.zeros((2, 0), int), *walk.links], axis=1)
    matrix = sparse.coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(n, n))
    _, label = sparse.csgraph.connected_components(matrix, directed=False)
    places = list(axes)
    entries = [label[axes[place]] for place in places]
    counts = sparse.coo_matrix(
        (
            np.ones(sum(map(len, entries)), np.int64),
            (np.concatenate([[], *entries]).astype(int), np.repeat(np.arange(len(places)), [len(e) for e in entries])),
        ),
        shape=(int(label.max(initial=-1)) + 1, len(places)),
    ).tocsr()
    still = set(label[np.concatenate([np.zeros(0, int), *walk.frozen])].tolist())
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for component in dict.fromkeys(np.concatenate([np.zeros(0, int), *entries]).tolist()):
        row = counts[component]
        if component not in still and row.nnz > 1:
            alike.setdefault(tuple(zip(row.indices.tolist(), row.data.tolist(), strict=True)), []).append(component)
    rank = {c: (s, u) for s, units in enumerate(g for g in alike.values() if len(g) > 1) for u, c in enumerate(units)}
    sizes = [len(units) for units in alike.values() if len(units) > 1]
    layout = {
        place: _segments([rank.get(c, (FIXED, 0)) for c in e.tolist()], sizes)
        for place, e in zip(places, entries, strict=True)
    }
    # An axis whose units stand in no regular order is left alone, and with it the spaces that it touches.
    irregular = {
        rank[c][0]
        for place, e in zip(places, entries, strict=True)
        if layout[place] is None
        for c in e.tolist()
        if c in rank
    }
    if irregular:
        walk.unfollowed["channels in a changing order"] = None
        renumber = {s: i for i, s in enumerate(s for s in range(len(sizes)) if s not in irregular)}
        rank = {c: (renumber[s], u) for c, (s, u) in rank.items() if s in renumber}
        sizes = [size for s, size in enumerate(sizes) if s in renumber]
        layout = {
            place: _segments([rank.get(c, (FIXED, 0)) for c in e.tolist()], sizes)
            for place, e in zip(places, entries, strict=True)
        }
    whole = {
        (path, axis): layout.get((path, axis)) or (Segment(FIXED, 1, 1, size),)
        for path, shape in shapes.items()
        for axis, size in enumerate(shape)
    }
    groups = [1] * len(sizes)
    for ids in walk.together:
        for component in label[ids[:1]].tolist():
            if component in rank:
                groups[rank[component][0]] = max(groups[rank[component][0]], len(ids))
    return Graph(shapes, whole, tuple(sizes), frozenset(walk.consumed), tuple(groups), tuple(walk.unfollowed))


def _segments(entries: list[tuple[int, int]], sizes: Sequence[int]) -> tuple[Segment, ...] | None:
    """An axis' entries (space, unit) as runs; None when a space's units do not follow in their order."""
    found, at = [], 0
    while at < len(entries):
        space = entries[at][0]
        if space == FIXED:
            end = next((i for i in range(at, len(entries)) if entries[i][0] != FIXED), len(entries))
            found.append(Segment(FIXED, 1, 1, end - at))
            at = end
            continue
        inner = next((i for i in range(at, len(entries)) if entries[i] != entries[at]), len(entries)) - at
        block = [(space, unit) for unit in range(sizes[space]) for _ in range(inner)]
        outer = 0
        while entries[at + outer * len(block) : at + (outer + 1) * len(block)] == block:
            outer += 1
        if outer == 0:
            return None
        found.append(Segment(space, outer, inner, outer * len(block)))
        at += outer * len(block)
    return tuple(found)
