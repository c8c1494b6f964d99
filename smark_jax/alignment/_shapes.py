"""Operations that move the entries of a value and leave them as they are."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from smark_jax.alignment import _elementwise
from smark_jax.alignment._identities import Identities, Role, Roles, Value, moved, reshape_groups


class Shapes(Identities):
    """The part of the pass that carries identities to other axes and places."""

    def unknown(self, shape: Sequence[int], axes: Sequence[int] | None = None) -> Roles:
        """Fixed roles for axes along which a value changes in a way that is not followed."""
        chosen = range(len(shape)) if axes is None else axes
        return tuple(Role((a,), self.fixed((shape[a],))) for a in chosen if shape[a] > 1)

    def rule_reshape(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        roles = operands[0].roles
        if params.get("dimensions") is not None:
            self.give_up("reshape", roles)
            return self.unknown(out)
        groups = reshape_groups(shapes[0], out)
        found: list[Role] = []
        for before, after in _joined(groups, roles):
            inside = [role for role in roles if set(role.axes) <= set(before)]
            moving = [role for role in inside if not self.still(role)]
            if len(moving) > 1:
                self.give_up("reshape that merges two channel axes", moving)
            if len(moving) != 1:
                found += [Role(tuple(after), self.fixed(tuple(out[a] for a in after)))] if inside else []
                continue
            role, shape = moving[0], [shapes[0][a] for a in before]
            spread = np.broadcast_to(
                role.ids.reshape([n if a in role.axes else 1 for a, n in zip(before, shape, strict=True)]), shape
            )
            vector = role.vector if spread.size == role.ids.size else None
            found.append(role._replace(axes=tuple(after), ids=spread.reshape([out[a] for a in after]), vector=vector))
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
            role._replace(ids=np.tile(role.ids, [reps[a] for a in role.axes]), vector=None)
            for role in operands[0].roles
        )

    def rule_concatenate(self, operands: list[Value], shapes: Any, out: tuple[int, ...], params: Any) -> Roles:
        d = params["dimension"]
        joined, others = [], []
        for (operand, _), shape in zip(operands, shapes, strict=True):
            along = [role for role in operand if d in role.axes]
            across = [role for role in along if role.axes != (d,)]
            self.give_up("concatenate", across)
            others.append(self.unknown(out, sorted({a for role in across for a in role.axes} - {d})))
            plain = [role for role in along if role.axes == (d,)]
            self.single(*(role for role in plain if role.squared or role.bent))
            joined.append(plain[0].ids if plain else self.fixed((shape[d],)))
            others.append(tuple(role for role in operand if d not in role.axes))
        whole = Role((d,), np.concatenate(joined))
        return (*_elementwise.merged(self, others), *((whole,) if out[d] > 1 else ()))

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
            self.freeze(taken)  # no role is left to tell it from the others
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
        whole = [n == m for n, m in zip(shapes[0], params["slice_sizes"], strict=True)]
        left = [a for a in range(len(shapes[0])) if a not in gone]
        place = dict(zip(left, numbers.offset_dims, strict=True))
        through = [r for r in operands[0].roles if all(a in place and whole[a] for a in r.axes)]
        lost = [role for role in operands[0].roles if role not in through]
        if operands[0].compute and operands[1].compute:  # a table of weights, at places that nothing moves
            for role in lost:
                self.freeze(role.ids)
        self.give_up("gather", lost)
        kept = tuple(r._replace(axes=tuple(place[a] for a in r.axes), source=None) for r in through)
        return (*kept, *self.unknown(out, [a for a in range(len(out)) if not any(a in r.axes for r in kept)]))

    def chosen(self, name: str, roles: Roles, cut: set[int], out: tuple[int, ...]) -> Roles:
        """Roles of a value of which some axes are cut at places that the weights or images decide."""
        lost = [role for role in roles if cut & set(role.axes)]
        self.give_up(name, lost)
        unknown = self.unknown(out, sorted(cut.union(*(role.axes for role in lost))))
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
                found.append(Role(role.axes, np.concatenate([self.fixed((low,)), role.ids, self.fixed((high,))])))
            else:
                self.give_up("pad", [role])
                found += self.unknown(out, role.axes)
        return tuple(found)


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
