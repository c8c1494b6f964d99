"""Operations entry by entry: what they tie together, and whether the entries may still be mixed afterwards."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smark_jax.alignment._identities import PROVEN, Compute, Gain, Identities, Role, Roles, Value, gain_name

_SAME = frozenset(
    """convert_element_type copy copy_p neg optimization_barrier real reduce_precision sharding_constraint
    stop_gradient""".split()
)
_SUMS = frozenset("add add_any sub".split())
_PRODUCTS = frozenset("mul div".split())
_OTHERS = frozenset(
    """abs acos acosh and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma eq erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min ne nextafter not or polygamma
    pow rem round rsqrt select_n sign sin sinh sqrt square tan tanh xor""".split()
)
_SCALED, _BENT = 1, 2
ALL = _SAME | _SUMS | _PRODUCTS | _OTHERS


def roles(walk: Identities, name: str, operands: Sequence[Value], params: Mapping[str, Any]) -> Roles:
    """The roles of a result; ``params`` are the operation's."""
    if name == "neg":
        return tuple(role._replace(changed=True) for role in operands[0].roles)
    if name in _SAME:
        return operands[0].roles
    weights = all(operand.compute for operand in operands)
    found: dict[tuple[int, ...], list[tuple[int, Role]]] = {}
    for at, operand in enumerate(operands):
        for role in operand.roles:
            found.setdefault(role.axes, []).append((at, role))
    for axes, members in found.items():
        found[axes] = _without_blocks(walk, name, members)
    result = {axes: _along(walk, name, operands, members, weights, params) for axes, members in found.items()}
    if name in _SUMS:
        _biases(walk, name, operands)
    return _widest(walk, result, name in _SUMS)


def merged(walk: Identities, operands: Sequence[Roles]) -> Roles:
    """The roles of values that are multiplied or joined along other axes: those along the same axes are linked."""
    found: dict[tuple[int, ...], Role] = {}
    for role in itertools.chain(*operands):
        if role.axes in found:
            walk.link(found[role.axes].ids, role.ids)
        else:
            found[role.axes] = role
    return _widest(walk, found, False)


def _without_blocks(walk: Identities, name: str, members: list[tuple[int, Role]]) -> list[tuple[int, Role]]:
    """Couples what stands for blocks to the units of the blocks, where both lie along the same axes."""
    units = [member for member in members if not member[1].block]
    blocks = [(at, r) for at, r in members if r.block and units and len(np.unique(r.ids)) < r.ids.size]
    for _, role in blocks:
        walk.couple(role, units[0][1])
        if name in _SUMS:
            walk.even.append(units[0][1].ids.reshape(-1))
    return [member for member in members if not any(member[1] is role for _, role in blocks)]


def _along(
    walk: Identities,
    name: str,
    operands: Sequence[Value],
    members: list[tuple[int, Role]],
    weights: bool,
    params: Mapping[str, Any],
) -> Role:
    """The role of a result along the axes of some of its operands' roles."""
    at, first = members[0]
    plain = first._replace(source=None, maker=None, vector=None, squared=False)
    square = (name == "square") or (name == "integer_pow" and params["y"] == 2)
    same = len(members) == 2 and np.array_equal(first.ids, members[1][1].ids)
    odd = any(role.squared for _, role in members)
    if not odd and (square or (name == "mul" and same)):
        return plain._replace(squared=True)
    if name in _PRODUCTS and len(members) == 1 and (name == "mul" or at == 0):
        vector = _vector(operands[at], first) if name == "mul" else None
        return first._replace(source=first.source if weights else None, vector=vector, changed=True)
    if name in _PRODUCTS and len(members) == 2 and not odd and not same:
        gained = _gained(walk, name, operands, members, weights)
        if gained:
            return gained
    for _, role in members[1:]:
        walk.loosened(first, role)
        if name in _SUMS:
            walk.added(first, role)
        (walk.link if name in _SUMS else walk.tie)(first.ids, role.ids)
    if name in _SUMS and not odd:
        bent = max(role.bent for _, role in members)
        bent = _BENT if weights and len(members) < len(operands) else bent
        if len(members) < len(operands) and not weights:
            walk.even.append(first.ids.reshape(-1))
        if bent == _BENT and not weights:
            walk.single(*(role for _, role in members))
        makers = {role.maker for _, role in members if role.maker}
        kept = len(members) == len(operands) and len(makers) == 1 and any(o.compute for o in operands)
        return plain._replace(bent=bent if weights else 0, maker=makers.pop() if kept else None)
    if weights:
        return plain._replace(bent=_BENT)
    walk.single(*(role for _, role in members))
    return plain


def _gained(
    walk: Identities, name: str, operands: Sequence[Value], members: list[tuple[int, Role]], weights: bool
) -> Role | None:
    """The role of a value times a vector of weights.

    Of two vectors of weights, the gain is the one that depends on its leaves in the less simple way: a batch norm's
    running mean times its gain over the root of its variance.
    """
    ranks = [(_vector(operands[at], role), role, operands[at]) for at, role in members]
    if name == "mul":
        ranks.sort(key=lambda rank: (rank[0] is not None, rank[1].bent))
    (own, before, _), (vector, other, value) = ranks
    if vector is None or before.bent == _BENT or (own is not None and not (weights and other.bent > before.bent)):
        return None
    after = walk.fresh(before.ids.shape)
    walk.reads[gain_name(len(walk.gains))] = walk.reads.get(before.maker or "", set())
    walk.tie(before.ids, after)
    walk.tie(after, other.ids)
    inverse = Compute(vector.paths, lambda leaves: 1 / np.asarray(vector(leaves))) if name == "div" else vector
    form = value.form.exact if value.compute and name == "mul" else -1
    walk.gains.append(Gain(before.ids.reshape(-1), after.reshape(-1), inverse, form))
    return Role(before.axes, after, maker=gain_name(len(walk.gains) - 1), bent=_SCALED if weights else 0)


def _vector(operand: Value, role: Role) -> Compute | None:
    """How to compute the entries along a role's axes of a value that is them times something else."""
    if role.vector is not None:
        return role.vector
    compute = operand.compute
    if compute is None or len(operand.roles) != 1:
        return None

    def entries(leaves: Mapping[str, Any]) -> np.ndarray:
        value = np.asarray(compute(leaves), np.float64)
        return value[tuple(slice(None) if a in role.axes else 0 for a in range(value.ndim))].reshape(-1)

    return Compute(compute.paths, entries)


def _biases(walk: Identities, name: str, operands: Sequence[Value]) -> None:
    """Notes which leaf is added to what a kernel makes, or that something else is."""
    for one, other in (operands, operands[::-1]):
        source = other.roles[0].source if len(other.roles) == 1 and name != "sub" else None
        source = None if source and other.roles[0].changed else source
        maker = next((role.maker for role in one.roles if role.maker), None)
        if maker and not one.compute and other.compute:
            if source is None or walk.biases.setdefault(maker, source[0]) != source[0]:
                walk.shifted.add(maker)


def _widest(walk: Identities, found: Mapping[tuple[int, ...], Role], summed: bool) -> Roles:
    """The roles that identify most entries; narrower ones along some of their axes are coupled to them."""
    kept: list[Role] = []
    held = {axis for axes, role in found.items() if walk.reason([role]) == PROVEN for axis in axes}
    for role in found.values():
        if walk.still(role) and held >= set(role.axes):  # a table for pairs of tokens
            walk.freeze(role.ids)
    for axes in sorted(found, key=len, reverse=True):
        role = found[axes]
        wider = [other for other in kept if set(axes) & set(other.axes)]
        if not wider:
            kept.append(role)
        for other in wider:
            if set(axes) <= set(other.axes):
                walk.couple(role, other)
                if summed:
                    walk.even.append(other.ids.reshape(-1))
            else:
                walk.give_up("axes that overlap", [role, other])
                covered, why = {axis for one in kept for axis in one.axes}, walk.reason([role, other])
                sizes = zip(role.axes, role.ids.shape, strict=True)
                kept += [Role((axis,), walk.fixed((n,), why)) for axis, n in sizes if axis not in covered]
    for role in kept:
        if len(role.axes) > 1:
            walk.request([[found[(axis,)]] for axis in role.axes if (axis,) in found])
    return tuple(sorted(kept, key=lambda role: role.axes))
