"""Operations that move the entries of a value and leave them as they are."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from smark_jax.alignment import _elementwise
from smark_jax.alignment._identities import MOVING, PROVEN, Identities, Role, Roles, Value, moved, reshape_groups

CONSTANT = "a constant along channels"


class Shapes(Identities):
    """The part of the pass that carries identities to other axes and places."""

    def unknown(self, shape: Sequence[int], axes: Sequence[int] | None = None, why: str = PROVEN) -> Roles:
        """Fixed roles for axes along which a value changes in a way that is not followed."""
        chosen = range(len(shape)) if axes is None else axes
        return tuple(Role((a,), self.fixed((shape[a],), why)) for a in chosen if shape[a] > 1)

    def rule_reshape(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        roles = operands[0].roles
        if params.get("dimensions") is not None:
            self.give_up("reshape", roles)
            return self.unknown(out, None, self.reason(roles))
        groups = reshape_groups(shapes[0], out)
        found: list[Role] = []
        for before, after in _joined(groups, roles):
            inside = [role for role in roles if set(role.axes) <= set(before)]
            moving = [role for role in inside if not self.still(role)]
            if len(moving) > 1:
                self.give_up("reshape that merges two channel axes", moving)
            if len(moving) != 1 and len(inside) != 1:
                fixed = self.fixed(tuple(out[a] for a in after), self.reason(inside))
                found += [Role(tuple(after), fixed)] if inside else []
                continue
            role, shape = (moving or inside)[0], [shapes[0][a] for a in before]
            spread = np.broadcast_to(
                role.ids.reshape([n if a in role.axes else 1 for a, n in zip(before, shape, strict=True)]), shape
            )
            vector = role.vector if spread.size == role.ids.size else None
            told = {axis for other in inside for axis in other.axes}
            loose = role.loose or any(n > 1 for a, n in zip(before, shape, strict=True) if a not in told)
            ids = spread.reshape([out[a] for a in after])
            found.append(role._replace(axes=tuple(after), ids=ids, vector=vector, loose=loose))
        return tuple(found)

    def rule_transpose(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        return moved(operands[0].roles, params["permutation"])

    def rule_squeeze(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        return moved(operands[0].roles, [a for a in range(len(shapes[0])) if a not in params["dimensions"]])

    def rule_broadcast_in_dim(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        to = params["broadcast_dimensions"]
        return tuple(role._replace(axes=tuple(to[a] for a in role.axes)) for role in operands[0].roles)

    def rule_tile(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        reps = params["reps"]
        return tuple(
            role._replace(
                ids=np.tile(role.ids, [reps[a] for a in role.axes]),
                vector=None,
                loose=role.loose or any(reps[a] > 1 for a in role.axes),
            )
            for role in operands[0].roles
        )

    def rule_concatenate(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        d = params["dimension"]
        joined: list[Role | int] = []
        others: list[Roles] = []
        for (operand, *_), shape in zip(operands, shapes, strict=True):
            along = [role for role in operand if d in role.axes]
            across = [role for role in along if role.axes != (d,)]
            self.give_up("concatenate", across)
            lost = sorted({a for role in across for a in role.axes} - {d})
            others.append(self.unknown(out, lost, self.reason(across)))
            plain = [role for role in along if role.axes == (d,)]
            self.single(*(role for role in plain if role.squared or role.bent))
            joined.append(plain[0] if plain else shape[d])
            others.append(tuple(role for role in operand if d not in role.axes))
        why = self.reason([part for part in joined if isinstance(part, Role)])
        why = CONSTANT if why == MOVING else why
        parts = [part.ids if isinstance(part, Role) else self.fixed((part,), why) for part in joined]
        ids = np.concatenate(parts)
        again = len({operand.form.exact for operand in operands}) < len(operands)
        whole = Role((d,), ids, loose=again or any(isinstance(part, Role) and part.loose for part in joined))
        if len(parts) > 1 and all(shape[d] == 1 for shape in shapes) and self.apart_from(others):
            self.beyond["branches side by side"] = None
        return (*_elementwise.merged(self, others), *((whole,) if out[d] > 1 else ()))

    def apart_from(self, others: Sequence[Roles]) -> bool:
        """Whether values that are put side by side have units of their own along the same axes."""
        found: dict[tuple[int, ...], bytes] = {}
        moving = [role for roles in others for role in roles if not self.still(role)]
        return any(found.setdefault(role.axes, role.ids.tobytes()) != role.ids.tobytes() for role in moving)

    def cut(self, role: Role, cuts: Sequence[slice], others: Roles = ()) -> Role:
        """The role of some entries; unless all are taken, they no longer mix with the others.

        Other axes of the same leaf then mean something else in each part, so they are to be seen as one with this one.
        """
        taken = role.ids[tuple(cuts)]
        if taken.size != role.ids.size:
            self.whole(np.unique(taken))
            for other in others:
                if other is not role and not self.still(role) and not self.still(other):
                    self.request([[role], [other]])
        if taken.size == 1 < role.ids.size:
            self.freeze(taken, "channels that are taken one by one")  # no role is left to tell it from the others
        return role._replace(ids=taken, source=None, vector=None if taken.size != role.ids.size else role.vector)

    def rule_slice(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        strides = params["strides"] or (1,) * len(shapes[0])
        cuts = [slice(*cut) for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
        roles = operands[0].roles
        return tuple(self.cut(role, [cuts[a] for a in role.axes], roles) for role in roles)

    def rule_dynamic_slice(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        cut = {a for a, (n, m) in enumerate(zip(shapes[0], out, strict=True)) if n != m}
        return self.chosen("dynamic_slice", operands[0].roles, cut, out)

    def rule_gather(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        numbers = params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        followed = self.taken(operands, shapes, out, params)
        if followed is not None:
            return followed
        whole = [n == m for n, m in zip(shapes[0], params["slice_sizes"], strict=True)]
        left = [a for a in range(len(shapes[0])) if a not in gone]
        place = dict(zip(left, numbers.offset_dims, strict=True))
        through = [r for r in operands[0].roles if all(a in place and whole[a] for a in r.axes)]
        lost = [role for role in operands[0].roles if role not in through]
        kept = tuple(r._replace(axes=tuple(place[a] for a in r.axes), source=None) for r in through)
        new = [a for a in range(len(out)) if not any(a in r.axes for r in kept)]
        if operands[0].compute and operands[1].compute:  # a table of weights, at places that stay where the result does
            for role in lost:
                self.freeze(role.ids, "a table of weights")
            found = self.unknown(out, new, "a table of weights")
            ids = np.concatenate([role.ids.reshape(-1) for role in (*lost, *found)] or [np.zeros(0, int)])
            self.tie(ids[:-1], ids[1:])
            return (*kept, *found)
        self.give_up("gather", lost)
        return (*kept, *self.unknown(out, new, self.reason([*lost, *operands[1].roles])))

    def taken(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles | None:
        """Roles of entries taken along one axis in an order that the network holds; None for any other gather."""
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        at = operands[1].compute
        cut = [a for a, (n, m) in enumerate(zip(shapes[0], sizes, strict=True)) if n != m]
        if at is None or at.paths or len(cut) != 1 or tuple(numbers.start_index_map) != tuple(cut):
            return None
        if numbers.operand_batching_dims or tuple(numbers.collapsed_slice_dims) != tuple(cut):
            return None
        places = np.asarray(at({})).reshape(-1)
        new = [a for a in range(len(out)) if a not in numbers.offset_dims]
        times = np.bincount(places, minlength=shapes[0][cut[0]]) if places.min() >= 0 else np.zeros(1)
        if len(new) != 1 or len(set(times[times > 0])) != 1 or times.size > shapes[0][cut[0]]:
            return None
        order = [a for a in range(len(shapes[0])) if a != cut[0]]
        to = {**dict(zip(order, numbers.offset_dims, strict=True)), cut[0]: new[0]}
        found: list[Role] = []
        for role in operands[0].roles:
            if cut[0] in role.axes:
                if self.still(role) and len(role.axes) > 1:
                    return None
                ids = role.ids.take(places, role.axes.index(cut[0]))
                if not times.all():
                    self.whole(np.unique(ids))
                role = role._replace(ids=ids, source=None, vector=None, loose=role.loose or times.max() > 1)
            axes = [to[a] for a in role.axes]
            by = np.argsort(axes)
            vector = role.vector if len(axes) == 1 else None
            found.append(role._replace(axes=tuple(sorted(axes)), ids=role.ids.transpose(by), vector=vector))
        return tuple(found)

    def chosen(self, name: str, roles: Roles, cut: set[int], out: tuple[int, ...]) -> Roles:
        """Roles of a value of which some axes are cut at places that the weights or images decide."""
        lost = [role for role in roles if cut & set(role.axes)]
        self.give_up(name, lost)
        unknown = self.unknown(out, sorted(cut.union(*(role.axes for role in lost))), self.reason(lost))
        return (*sourceless(tuple(r for r in roles if not cut & set(r.axes))), *unknown)

    def split(self, roles: Roles, params: Any) -> list[Roles]:
        axis, ends = params["axis"], np.cumsum(params["sizes"])
        whole = slice(None)
        return [
            tuple(self.cut(role, [slice(a, b) if x == axis else whole for x in role.axes], roles) for role in roles)
            for a, b in zip([0, *ends[:-1]], ends, strict=True)
        ]

    def rule_pad(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        found = []
        for role in operands[0].roles:
            changes = [params["padding_config"][a] for a in role.axes]
            if all(change == (0, 0, 0) for change in changes):
                found.append(role)
            elif len(changes) == 1 and changes[0][2] == 0 and min(changes[0][:2]) >= 0:
                low, high, _ = changes[0]
                found.append(Role(role.axes, np.concatenate(self.padding(operands[1], role, low, high))))
            else:
                self.give_up("pad", [role])
                found += self.unknown(out, role.axes, self.reason([role]))
        return tuple(found)

    def padding(self, value: Value, role: Role, low: int, high: int) -> list[np.ndarray]:
        """A role's identities between those of what is padded, which may change places as the others do."""
        if self.still(role):
            why = self.reason([role])
            return [self.fixed((low,), why), role.ids, self.fixed((high,), why)]
        parts = [self.fresh((low,)), role.ids, self.fresh((high,))]
        added = np.concatenate([parts[0], parts[2]])
        zero = value.compute and not value.compute.paths and not np.asarray(value.compute({})).any()
        self.whole(added)
        self.padded.append(added)
        self.whole(role.ids)
        if not zero:
            self.single(Role((0,), added))
        return parts


def sourceless(roles: Roles) -> Roles:
    """Roles of a value that is no longer a leaf or what a kernel made."""
    return tuple(role._replace(source=None, maker=None) for role in roles)


def _joined(groups: list[tuple[list[int], list[int]]], roles: Roles) -> list[tuple[list[int], list[int]]]:
    """The groups of a reshape, with those joined across which a role lies."""
    found = [(list(before), list(after)) for before, after in groups]
    for role in roles:
        hit = [group for group in found if set(group[0]) & set(role.axes)]
        if len(hit) > 1:
            whole = [a for g in hit for a in g[0]], [a for g in hit for a in g[1]]
            found = [g for g in found if g not in hit]
            found.append(whole)
    return found
