"""The pass over a network's equations: which entries of which axes must keep together, and which stay fixed."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Role(NamedTuple):
    """Identities along some axes of a value; the shape of ``ids`` is the sizes of these axes."""

    axes: tuple[int, ...]
    ids: np.ndarray
    source: tuple[str, int] | None


Roles = tuple[Role, ...]

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


class Walk:
    """The pass over a jaxpr: it assigns identities, links them and fixes them."""

    def __init__(self) -> None:
        self.count = 0
        self.links: list[np.ndarray] = []
        self.frozen: list[np.ndarray] = []
        self.together: list[np.ndarray] = []
        self.consumed: set[tuple[str, int]] = set()
        self.unfollowed: dict[str, None] = {}
        self.beyond: dict[str, None] = {}

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        first, self.count = self.count, self.count + math.prod(shape)
        return np.arange(first, self.count).reshape(shape)

    def fixed(self, shape: tuple[int, ...]) -> np.ndarray:
        ids = self.fresh(shape)
        self.frozen.append(ids.reshape(-1))
        return ids

    def constant(self, value: Any) -> Roles:
        return tuple(Role((axis,), self.fixed((n,)), None) for axis, n in enumerate(np.shape(value)) if n > 1)

    def freeze(self, roles: Roles) -> None:
        self.frozen.extend(role.ids.reshape(-1) for role in roles)

    def link(self, a: np.ndarray, b: np.ndarray) -> None:
        self.links.append(np.stack([a.reshape(-1), b.reshape(-1)]))

    def run(self, jaxpr: Any, consts: Sequence[Roles], inputs: Sequence[Roles]) -> list[Roles]:
        env: dict[Any, Roles] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        read = lambda atom: () if hasattr(atom, "val") else env.get(atom, ())  # noqa: E731
        for eqn in jaxpr.eqns:
            roles = [read(atom) for atom in eqn.invars]
            out = self.equation(eqn, roles)
            for var, result in zip(eqn.outvars, out, strict=True):
                env[var] = tuple(role for role in map(_simplified, result) if role.axes)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, roles: list[Roles]) -> list[Roles]:
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
                if not kept and role.source is None and not self.still(role):
                    self.beyond["a normalisation over all channels"] = None
                if kept and len(kept) < len(role.axes):
                    first = role.ids[tuple(0 if i in kept else slice(None) for i in range(role.ids.ndim))]
                    self.together.append(first.reshape(-1))
            return [_moved(roles[0], [a for a in range(len(shapes[0])) if a not in gone])]
        rule: Callable[..., Roles] | None = getattr(self, f"rule_{name}", None)
        out = rule(roles, shapes, outs[0], params) if rule else None
        if out is not None and len(outs) == 1:
            return [out]
        if name == "split":
            return self.split(roles[0], params)
        if name not in ("iota", "random_bits", "random_wrap", "random_seed", "random_unwrap"):
            self.give_up(name, [role for operand in roles for role in operand])
        return [tuple(Role((a,), self.fixed((n,)), None) for a, n in enumerate(o) if n > 1) for o in outs]

    def give_up(self, why: str, roles: Sequence[Role]) -> None:
        """Fixes entries that an operation of unknown effect touches, and reports the operation."""
        moving = tuple(role for role in roles if not self.still(role))
        if moving:
            self.unfollowed[why] = None
            self.freeze(moving)

    def still(self, role: Role) -> bool:
        """Whether all its entries are fixed already, as those of images are."""
        return bool(np.isin(role.ids, np.concatenate([np.zeros(0, int), *self.frozen])).all())

    def elementwise(self, operands: Sequence[Roles]) -> Roles:
        found: dict[tuple[int, ...], Role] = {}
        for role in itertools.chain(*operands):
            if role.axes in found:
                self.link(found[role.axes].ids, role.ids)
            else:
                found[role.axes] = role
        # Where a group's axis overlaps its members' (group norm), keep the members': they identify each channel.
        widest = sorted(found, key=len, reverse=True)
        kept: list[tuple[int, ...]] = []
        for axes in widest:
            if not any(set(axes) & set(other) for other in kept):
                kept.append(axes)
        return tuple(found[axes] for axes in sorted(kept))

    def contract(
        self, left: Roles, left_axes: Sequence[int], right: Roles, right_axes: Sequence[int], why: str
    ) -> None:
        """Links the entries that are multiplied and summed over."""
        pairs: dict[tuple[int, ...], list[Role]] = {}
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

    def rule_dot_general(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
        (contract_l, contract_r), (batch_l, batch_r) = params["dimension_numbers"]
        summed = [
            [r for r in side if set(r.axes) <= set(axes)]
            for side, axes in zip(roles, (contract_l, contract_r), strict=True)
        ]
        if all(side and all(role.source is None for role in side) for side in summed):
            self.beyond["attention"] = None
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

    def rule_conv_general_dilated(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
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
        return tuple(Role((axis,), role.ids, None) for role, axis in kept if role is not None)

    def rule_reshape(self, roles: list[Roles], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        if params.get("dimensions") is not None:
            self.give_up("reshape", roles[0])
            return ()
        found: list[Role] = []
        pending = list(roles[0])
        for before, after in _reshape_groups(shapes[0], out):
            inside = [role for role in pending if set(role.axes) <= set(before)]
            crossing = [role for role in pending if set(role.axes) & set(before) and role not in inside]
            if len(inside) > 1:
                self.give_up("reshape that merges two channel axes", inside)
                found.append(Role(tuple(after), self.fixed(tuple(out[a] for a in after)), None))
            elif inside:
                role = inside[0]
                shape = [shapes[0][a] for a in before]
                spread = np.broadcast_to(
                    role.ids.reshape([n if a in role.axes else 1 for a, n in zip(before, shape, strict=True)]), shape
                )
                found.append(Role(tuple(after), spread.reshape([out[a] for a in after]), role.source))
            if crossing:
                self.give_up("reshape across two channel axes", crossing)
            pending = [role for role in pending if not set(role.axes) & set(before)]
        return tuple(found)

    def rule_transpose(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
        return _moved(roles[0], params["permutation"])

    def rule_squeeze(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
        return _moved(roles[0], [a for a in range(len(shapes[0])) if a not in params["dimensions"]])

    def rule_broadcast_in_dim(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
        to = params["broadcast_dimensions"]
        return tuple(role._replace(axes=tuple(to[a] for a in role.axes)) for role in roles[0])

    def rule_tile(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
        reps = params["reps"]
        return tuple(role._replace(ids=np.tile(role.ids, [reps[a] for a in role.axes])) for role in roles[0])

    def rule_concatenate(self, roles: list[Roles], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        d = params["dimension"]
        joined, others = [], []
        for operand, shape in zip(roles, shapes, strict=True):
            along = [role for role in operand if d in role.axes]
            self.give_up("concatenate", [role for role in along if role.axes != (d,)])
            plain = [role.ids for role in along if role.axes == (d,)]
            joined.append(plain[0] if plain else self.fixed((shape[d],)))
            others.append(tuple(role for role in operand if d not in role.axes))
        whole = Role((d,), np.concatenate(joined), None)
        return (*self.elementwise(others), *((whole,) if out[d] > 1 else ()))

    def rule_slice(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
        strides = params["strides"] or (1,) * len(shapes[0])
        cuts = [slice(*cut) for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
        return tuple(role._replace(ids=role.ids[tuple(cuts[a] for a in role.axes)], source=None) for role in roles[0])

    def split(self, roles: Roles, params: Any) -> list[Roles]:
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

    def rule_pad(self, roles: list[Roles], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        found = []
        for role in roles[0]:
            changes = [params["padding_config"][a] for a in role.axes]
            if all(change == (0, 0, 0) for change in changes):
                found.append(role)
            elif len(changes) == 1 and changes[0][2] == 0 and min(changes[0][:2]) >= 0:
                low, high, _ = changes[0]
                found.append(Role(role.axes, np.concatenate([self.fixed((low,)), role.ids, self.fixed((high,))]), None))
            else:
                self.give_up("pad", [role])
        return tuple(found)

    def rule_reduce_window(self, roles: list[Roles], shapes: Any, out: Any, params: Any) -> Roles:
        window = params["window_dimensions"]
        touched = [role for role in roles[0] if any(window[a] != 1 for a in role.axes)]
        self.give_up("reduce_window over channels", touched)
        return tuple(role for role in roles[0] if role not in touched)

    rule_reduce_window_max = rule_reduce_window
    rule_reduce_window_sum = rule_reduce_window
    rule_reduce_window_min = rule_reduce_window


def _simplified(role: Role) -> Role:
    """The role without the axes along which identities do not change."""
    ids, kept = role.ids, []
    for axis in reversed(range(ids.ndim)):
        first = ids.take([0], axis=axis)
        if ids.shape[axis] == 1 or (ids == first).all():
            ids = first.squeeze(axis)
        else:
            kept.append(role.axes[axis])
    return role._replace(axes=tuple(reversed(kept)), ids=ids)


def _moved(roles: Roles, order: Sequence[int]) -> Roles:
    """Roles of a value whose axes were reordered to ``order``; a role that lost an axis is dropped."""
    place = {axis: i for i, axis in enumerate(order)}
    found = []
    for role in roles:
        if all(axis in place for axis in role.axes):
            axes = [place[axis] for axis in role.axes]
            by = np.argsort(axes)
            found.append(role._replace(axes=tuple(sorted(axes)), ids=role.ids.transpose(by)))
    return tuple(found)


def _sourceless(roles: Roles) -> Roles:
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
