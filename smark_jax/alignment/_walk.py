"""The pass over a network's equations: which entries of which axes must keep together, and which stay fixed."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from smark_jax.alignment import _elementwise
from smark_jax.alignment._branches import Forms
from smark_jax.alignment._identities import PROVEN, Compute, Grouped, Role, Roles, Value, moved, simplified
from smark_jax.alignment._shapes import CONSTANT, Shapes, sourceless

_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split())
_ALONG_ONE_AXIS = frozenset("cumsum cumprod cummax cummin cumlogsumexp sort top_k rev fft argmax argmin".split())
_CALLS = frozenset(
    """pjit jit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr checkpoint remat remat2
    custom_lin""".split()
)
_RANDOM = frozenset("random_bits random_wrap random_seed random_unwrap".split())
_FRESH = _RANDOM | {"iota"}


class Walk(Shapes):
    """The pass over a jaxpr: it assigns identities, links them and fixes them.

    Args:
      dense: depthwise kernels, by path, whose channels are to be told apart from those that they read, and the axes of
        their inputs.
      grouped: the kernels of convolutions in groups that have roles as such.
    """

    def __init__(self, dense: Mapping[str, int], grouped: Mapping[str, Grouped]) -> None:
        super().__init__()
        self.dense, self.known, self.forms = dense, grouped, Forms()

    def constant(self, value: Any) -> Value:
        opaque = jax.numpy.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended)
        alike = () if opaque else [a for a in range(np.ndim(value)) if _uniform(np.asarray(value), a)]
        roles = self.unknown(np.shape(value), [a for a in range(np.ndim(value)) if a not in alike], CONSTANT)
        form = self.forms.known("constant", id(value))
        return Value(roles, Compute(frozenset(), lambda leaves: value), form)

    def run(self, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        env: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(atom: Any) -> Value:
            return (
                Value((), Compute(frozenset(), lambda leaves: atom.val), self.forms.known("literal", repr(atom.val)))
                if hasattr(atom, "val")
                else env.get(atom, Value())
            )

        for eqn in jaxpr.eqns:
            for var, result in zip(eqn.outvars, self.equation(eqn, [read(a) for a in eqn.invars]), strict=True):
                roles = tuple(role for role in map(simplified, result.roles) if role.axes)
                env[var] = result._replace(roles=roles)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS:
            inner = next((params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params), None)
            if inner is not None:
                closed = hasattr(inner, "consts")
                body, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
                if len(body.invars) == len(operands):
                    return self.run(body, [self.constant(c) for c in consts], operands)
        found = self.roles(eqn, name, operands)
        computes = [operand.compute for operand in operands]
        known = [c for c in computes if c is not None]
        forms = self.forms.of(self, eqn, operands)
        if len(known) < len(computes) or name in _RANDOM:
            return [Value(roles, None, form) for roles, form in zip(found, forms, strict=True)]
        paths = frozenset[str]().union(*(compute.paths for compute in known))
        return [
            Value(r, Compute(paths, functools.partial(_computed, eqn, known, i)), form)
            for i, (r, form) in enumerate(zip(found, forms, strict=True))
        ]

    def roles(self, eqn: Any, name: str, operands: list[Value]) -> list[Roles]:
        params = eqn.params
        shapes = [tuple(atom.aval.shape) for atom in eqn.invars]
        outs = [tuple(var.aval.shape) for var in eqn.outvars]
        roles = [operand.roles for operand in operands]
        if name in _elementwise.ALL:
            return [_elementwise.roles(self, name, operands, params)] * len(outs)
        if name in _REDUCTIONS:
            return [self.reduced(name, roles[0], params["axes"], shapes[0])]
        if name in _ALONG_ONE_AXIS:
            return self.along(name, roles, outs, params)
        rule: Callable[..., Roles] | None = getattr(self, f"rule_{name}", None)
        if rule and len(outs) == 1:
            return [rule(operands, shapes, outs[0], params)]
        if name == "split":
            return self.split(roles[0], params)
        every = [role for operand in roles for role in operand]
        if name not in _FRESH:
            self.give_up(name, every)
        return [self.unknown(out, None, self.reason(every) if name not in _FRESH else CONSTANT) for out in outs]

    def reduced(self, name: str, operand: Roles, axes: Sequence[int], shape: tuple[int, ...]) -> Roles:
        order = [a for a in range(len(shape)) if a not in axes]
        found: list[Role] = []
        for role in operand:
            gone = [i for i, axis in enumerate(role.axes) if axis in axes]
            if not gone:
                self.single(*([] if name == "reduce_sum" else [role]))
                found += moved([role._replace(source=None, maker=None)], order)
                continue
            kept = [i for i, axis in enumerate(role.axes) if axis not in axes]
            ids = role.ids.transpose([*kept, *gone])
            self.together(ids, len(kept))
            self.reduced_over.append(ids.reshape(-1))
            if name == "reduce_sum":
                self.summed(role, ids, len(kept))
            else:
                self.single(role)
            if kept:
                shared = Role(
                    tuple(role.axes[i] for i in kept), self.fresh(tuple(role.ids.shape[i] for i in kept)), block=True
                )
                self.couple(shared, role)
                found += moved([shared], order)
        return tuple(found)

    def along(
        self, name: str, roles: list[Roles], outs: list[tuple[int, ...]], params: Mapping[str, Any]
    ) -> list[Roles]:
        """Operations on whole axes of which the others know nothing."""
        ndim = len(outs[0])
        touched = params.get("dimensions", params.get("axes", params.get("axis", params.get("dimension", ndim - 1))))
        axes = {int(a) for a in np.atleast_1d(touched)}
        if name == "fft":
            axes = set(range(ndim - len(params["fft_lengths"]), ndim))
        every = [role for operand in roles for role in operand]
        lost = [role for role in every if axes & set(role.axes)]
        self.give_up(name, lost)
        why = self.reason(lost) if lost else CONSTANT
        gone, axes = axes, axes.union(*(role.axes for role in lost))
        through = tuple(r for r in every if not axes & set(r.axes))
        if name not in ("rev", "cumsum", "fft"):
            self.single(*through)
        through = sourceless(through)
        if name in ("argmax", "argmin"):
            left = [a for a in range(ndim + len(gone)) if a not in gone]
            unknown = self.unknown(outs[0], [left.index(a) for a in sorted(axes - gone)], why)
            return [(*moved(through, left), *unknown)] * len(outs)
        return [(*through, *self.unknown(out, sorted(axes), why)) for out in outs]

    def contract(
        self, sides: Sequence[Roles], axes: Sequence[Sequence[int]], batch: Sequence[Sequence[int]], why: str
    ) -> Roles:
        """Links the entries that are multiplied and summed over; the roles of the blocks that the sums are over."""
        pairs: dict[tuple[int, ...], list[Role]] = {}
        for roles, summed, batched in zip(sides, axes, batch, strict=True):
            place = {axis: i for i, axis in enumerate([*batched, *summed])}
            for role in roles:
                if not set(role.axes) & set(summed):
                    continue
                if not set(role.axes) <= set(place):
                    self.give_up(why, [role])
                    continue
                at = [place[axis] for axis in role.axes]
                key = tuple(sorted(at))
                pairs.setdefault(key, []).append(role._replace(axes=key, ids=role.ids.transpose(np.argsort(at))))
                if role.source:
                    self.consumed.add(role.source)
        for key, both in pairs.items():
            if len(key) > 1 and len(both) == 1:  # over all axes of a leaf on one side, over each on the other
                self.request([pairs.get((at,), []) for at in key])
        made: list[Role] = []
        for key, both in pairs.items():
            depth = sum(at < len(batch[0]) for at in key)
            if len(both) != 2:
                self.give_up(why, both)
                sizes, lost = both[0].ids.shape, self.reason(both)
                made += [Role((a,), self.fixed((n,), lost)) for a, n in zip(key[:depth], sizes, strict=False)]
                continue
            self.loosened(*both)
            self.read(both[1], both[0])
            self.repeated(both[0], both[1].ids)
            self.repeated(both[1], both[0].ids)
            self.flip(both[0].ids, both[1].ids)
            self.whole(both[0].ids, depth)
            self.together(both[0].ids, depth)
            self.single(*(role for role in both if role.bent or role.squared))
            if depth:
                shared = Role(key[:depth], self.fresh(both[0].ids.shape[:depth]), block=True)
                self.couple(shared, both[0])
                made.append(shared)
        return tuple(made)

    def rule_dot_general(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        (contract_l, contract_r), (batch_l, batch_r) = params["dimension_numbers"]
        sides = [operand.roles for operand in operands]
        for side, batched, summed in zip(operands, (batch_l, batch_r), (contract_l, contract_r), strict=True):
            moving = {r.axes[0]: r for r in side.roles if len(r.axes) == 1 and not self.still(r)}
            for axis, other in itertools.permutations(moving, 2):
                if axis in batched or (axis in summed and other in summed and not side.compute):
                    self.request([[moving[axis]], [moving[other]]], not side.compute)
                    self.apart.append((moving[axis].ids, moving[other].ids))
        made = self.contract(sides, (contract_l, contract_r), (batch_l, batch_r), "dot_general")
        free = [
            [a for a in range(len(shape)) if a not in (*contracted, *batch)]
            for shape, contracted, batch in ((shapes[0], contract_l, batch_l), (shapes[1], contract_r, batch_r))
        ]
        self.single(*(role for side in sides for role in side if role.bent or role.squared))
        left = moved(self.left_over(sides[0], contract_l, free[0]), [*batch_l, *free[0]])
        right = moved(self.left_over(sides[1], contract_r, free[1]), [*batch_r, *free[1]])
        shift = {axis: axis for axis in range(len(batch_l))}
        shift |= {len(batch_l) + i: len(batch_l) + len(free[0]) + i for i in range(len(free[1]))}
        right = tuple(role._replace(axes=tuple(shift[a] for a in role.axes)) for role in right)
        both = {role.axes for role in left} & {role.axes for role in right}  # multiplied entry by entry
        self.single(*(role for role in (*left, *right) if role.axes in both))
        left, right = _made(left, self.maker(operands[0])), _made(right, self.maker(operands[1]))
        return _elementwise.merged(self, [left, right, made])

    def maker(self, operand: Value) -> str | None:
        """The leaf that a kernel is; where it was one before, what is added afterwards may differ."""
        sources = {role.source[0] for role in operand.roles if role.source}
        if not operand.compute or len(sources) != 1:
            return None
        source = sources.pop()
        (self.shifted if source in self.makers else self.makers).add(source)
        return source

    def left_over(self, roles: Roles, summed: Sequence[int], free: Sequence[int]) -> Roles:
        """The roles, where those over which only some axes are summed are fixed along the others."""
        found: list[Role] = []
        for role in roles:
            if set(role.axes) & set(summed) and set(role.axes) & set(free):
                kept = {a: n for a, n in zip(role.axes, role.ids.shape, strict=True) if a not in summed}
                found += [Role((a,), self.fixed((n,), self.reason([role]))) for a, n in kept.items()]
            else:
                found.append(role)
        return tuple(found)

    def rule_conv_general_dilated(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        lhs, rhs, result = params["dimension_numbers"]
        groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
        image = {role.axes: role for role in operands[0].roles}
        kernel = {role.axes: role for role in operands[1].roles if not self.in_blocks(role)}
        for axes, role in kernel.items():
            if set(axes) & set(rhs[2:]):
                self.freeze(role.ids, PROVEN if set(axes) <= set(rhs[2:]) else "channels along two axes")
        self.give_up("convolution over channels", [r for axes, r in image.items() if set(axes) & set(lhs[2:])])
        self.single(*(role for role in (*image.values(), *kernel.values()) if role.bent or role.squared))
        feature, made = image.get((lhs[1],)), kernel.get((rhs[0],))
        depthwise = groups == shapes[0][lhs[1]] == shapes[1][rhs[0]] and not (
            made and made.source and made.source[0] in self.dense
        )
        if groups == 1 and batch_groups == 1:
            sides = operands[0].roles, operands[1].roles
            self.contract(sides, ([lhs[1]], [rhs[1]]), ((), ()), "conv_general_dilated")
        elif depthwise and batch_groups == 1 and feature and (made or not any(rhs[0] in axes for axes in kernel)):
            made = made or feature  # the same kernel for all
            self.read(made, feature)
            self.repeated(feature, made.ids)
            self.link(feature.ids, made.ids)
            self.single(feature, made)
        elif not (batch_groups == 1 and self.in_groups(operands[1].roles, feature, made, rhs, shapes[1], groups)):
            self.give_up("grouped convolution", [*operands[0].roles, *operands[1].roles])
        batch = image.get((lhs[0],))
        kept = [Role((result[0],), batch.ids)] if batch else []
        kept += _made((made._replace(axes=(result[1],)),), self.maker(operands[1])) if made else ()
        mixed = [r for r in (*image.values(), *kernel.values()) if len(r.axes) > 1]
        self.give_up("conv_general_dilated", mixed)
        lost = [a for a, role in ((result[0], batch), (result[1], made)) if mixed and role is None]
        return (*kept, *self.unknown(out, lost, self.reason(mixed)), *self.unknown(out, result[2:]))

    def in_blocks(self, role: Role) -> bool:
        """Whether a role is that of the inputs of a convolution in groups."""
        path, axis = role.source or ("", 0)
        return path in self.known and axis == self.known[path].inputs

    def in_groups(
        self, kernel: Roles, feature: Role | None, made: Role | None, rhs: Sequence[int], shape: Any, groups: int
    ) -> bool:
        """Links the inputs of a convolution in groups to its kernel's, group by group; whether it could."""
        if not feature or not made or not made.source:
            return False
        path, outputs = made.source
        if len(np.unique(made.ids)) < shape[rhs[0]] or self.known.get(path, Grouped(0, 0, groups)).groups != groups:
            return False  # repeated, or in other groups elsewhere
        blocks = next((role for role in kernel if self.in_blocks(role)), None)
        if blocks is None:
            inputs = next((r.source[1] for r in kernel if r.axes == (rhs[1],) and r.source), self.dense.get(path))
            if inputs is not None and path not in self.known:
                self.grouped[path] = Grouped(inputs, outputs, groups)  # the pass is to be repeated
            return False
        sizes = shape[rhs[0]], shape[rhs[1]]
        order = [blocks.axes.index(axis) for axis in rhs[:2] if axis in blocks.axes]
        wide = [n if axis in blocks.axes else 1 for axis, n in zip(rhs[:2], sizes, strict=True)]
        ids = np.broadcast_to(blocks.ids.transpose(order).reshape(wide), sizes)
        each = ids.reshape(groups, -1, sizes[1])
        inputs = each[:, 0]
        if (each != inputs[:, None]).any():
            return False
        self.read(made, feature)
        self.repeated(feature, inputs)
        self.flip(feature.ids, inputs)
        self.consumed.add((path, self.known[path].inputs))
        self.single(*(role for role in (feature, made, blocks) if role.bent or role.squared))
        names = self.fresh((groups,))
        for rows in (inputs, made.ids.reshape(groups, -1)):
            self.blocks.append((names, rows))
            self.whole(rows, 1)
            self.together(rows, 1)
        return True

    def rule_reduce_window(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        found = self.rule_reduce_window_sum(operands, shapes, out, params)
        self.single(*found)
        return found

    rule_reduce_window_max = rule_reduce_window
    rule_reduce_window_min = rule_reduce_window

    def rule_reduce_window_sum(self, operands: list[Value], shapes: Any, out: Any, params: Any) -> Roles:
        plain = (1, 1, (0, 0), 1, 1)
        names = "window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"
        moves = [tuple(params[name][a] for name in names) != plain for a in range(len(shapes[0]))]
        touched = [role for role in operands[0].roles if any(moves[a] for a in role.axes)]
        self.give_up("reduce_window over channels", touched)
        through = tuple(role for role in operands[0].roles if role not in touched)
        axes = [a for role in touched for a in role.axes]
        return (*sourceless(through), *self.unknown(out, axes, self.reason(touched)))


def _uniform(array: np.ndarray, axis: int) -> bool:
    """Whether an array does not change along an axis."""
    return bool((array == array.take([0], axis=axis)).all())


def _computed(eqn: Any, computes: Sequence[Compute], number: int, leaves: Mapping[str, Any]) -> Any:
    """One output of an equation of weights alone."""
    found = eqn.primitive.bind(*(compute(leaves) for compute in computes), **eqn.params)
    return found[number] if eqn.primitive.multiple_results else found


def _made(roles: Roles, maker: str | None) -> Roles:
    return tuple(r._replace(source=None, vector=None, squared=False, bent=0, maker=maker) for r in roles)
